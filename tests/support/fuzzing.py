"""Mutated messages against a model party: ``python tests/support/fuzzing.py --count 1000000 --seed 0``.

Real messages of training and generation are changed in their bytes, their header, their facts and their tensors, and sent
in any order by sessions that come and go. Whatever is sent: only our own errors leave, they are short and name nothing of
the host, memory grows by no more than a cap, another data party goes on as if it were alone, and `close` works.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import random
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import attrs
import torch
from attrs import define

from vflair_core import FineTuning, Partition, Train, split
from vflair_core.communication import codec
from vflair_core.communication.cache_kinds import LAYERS
from vflair_core.communication.message import Message
from vflair_core.communication.program import OPERATIONS
from vflair_core.errors import ProtocolError, VflairError
from vflair_core.testing import tiny_batch, tiny_model

EPISODE = 40  # messages of a session, about
PEAK = 192 * 2**20  # bytes that one message may take
GROWTH = 512 * 2**20  # bytes that all may leave behind
SECONDS = 5.0  # that one message may take
TEXT = 2000  # characters of an error
HOST = re.compile(r"/tmp/|/home/|/usr/|site-packages|\.cpp|frame #|0x[0-9a-f]{8}|Traceback")
CAPS = {  # small, where this version has them: what is within a cap is no finding
    "graph_bytes": 2**25,
    "cache_bytes": 2**25,
    "step_bytes": 2**25,
    "cache_rows": 64,
    "positions": 512,
    "saved_bytes": 2**25,
    "saved_steps": 8,
    "sessions": 40,
}
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 7, 255, 4096, 2**31 - 1, 2**31, 2**63 - 1, -(2**63)),
    *(0.0, 0.5, -1.0, 1e308, math.inf, -math.inf, math.nan),
    *("", "x", "a" * 2000, "é\0\n", "../../x", "lr", "sgd", "adamw", "linear", "float32", "mean"),
    *([], {}, [[]], [0] * 50, ["tuple", ["tuple", ["tuple"]]], ["value", 2**40], ["leaf", 9]),
    *(["out", 0], ["ellipsis"], ["slice", None, None, -1], {"id": "x"}, [["a", "b"]], [[0, 1]]),
    *(["DynamicLayer", {}], ["LinearAttentionLayer", {"number_of_states": 2**20}]),
    *LAYERS,
    *OPERATIONS,
]


@define
class Finding:
    """Something that must not be, with the frames that lead to it."""

    what: str
    seed: int
    number: int  # of the message
    frames: list[bytes]

    def keep(self, folder: Path) -> Path:
        """Write the frames, in order, for a test that repeats them."""
        place = folder / f"finding-{self.seed}-{self.number}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "what.txt").write_text(self.what)
        for number, frame in enumerate(self.frames):
            (place / f"{number:03}.frame").write_bytes(frame)
        return place


@define(eq=False)
class Honest:
    """A data party beside the liars, and one alone with a model party of its own: both must get the same."""

    party: object
    alone: object
    batch: dict

    def is_undisturbed(self):
        """Let both take a step of their own weights and generate; return whether all of it is equal."""
        ours, theirs = self.step(self.party), self.step(self.alone)
        return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))

    def step(self, party):
        model = party.model
        out = model(**self.batch, use_cache=False)
        out.loss.backward()
        norms = party.connection.request("norms").tensors[0].tensor
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 1e-3 * weight.grad
        model.zero_grad(set_to_none=True)
        words = model.generate(
            self.batch["input_ids"][:, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False
        )
        return [out.logits.detach(), norms, words, *model.parameters()]


def recorded(folder):
    """Frames of real messages, by session, of two kinds of training and of generation."""
    model = tiny_model("llama")
    batch = tiny_batch(model, labels="tokens")
    frames = []
    for optimizer in ("adamw", "sgd"):
        party, model_party = split(copy.deepcopy(model), Partition(1, 1))
        model_party.checkpoints = folder / "recorded"
        handle = party.channel._handle
        said = []

        def listen(message, handle=handle, said=said):
            said.append(codec.encode(message))
            return handle(message)

        party.channel._handle = listen
        run = FineTuning(party, Train(steps=4, learning_rate=1e-3, optimizer=optimizer))
        run.step(batch)
        run.save(folder / f"data-{optimizer}")
        run.step(batch)
        party.model.eval()
        with torch.no_grad():
            party.model(**batch)
            words = batch["input_ids"][:, :5]
            party.model.generate(words, max_new_tokens=4, min_new_tokens=4, do_sample=False)
            party.model.generate(words, max_new_tokens=3, num_beams=2, do_sample=False)
        gc.collect()
        party.connection.request("release")
        run.load(folder / f"data-{optimizer}")
        party.connection.facts()
        party.close()
        frames.append(said)
    return frames


def paths_in(value, path=()):
    """All places in nested lists and maps."""
    yield path
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in entries:
        yield from paths_in(item, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


class Mutator:
    """Changes real messages, by one stream of random numbers."""

    def __init__(self, rng, corpus):
        self.rng = rng
        self.spare = [
            at(m.meta, path)
            for m in corpus
            for path in list(paths_in(m.meta))[1:]
            if rng.random() < 0.05
        ]
        self.tensors = [crossing for message in corpus for crossing in message.tensors]

    def value(self):
        rng = self.rng
        return copy.deepcopy(
            rng.choice(self.spare) if self.spare and rng.random() < 0.4 else rng.choice(VALUES)
        )

    def frame(self, frame):
        """Change bytes."""
        rng, raw = self.rng, bytearray(frame)
        for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
            place = (
                rng.randrange(len(raw)) if rng.random() < 0.3 else rng.randrange(min(len(raw), 400))
            )
            match rng.randrange(5):
                case 0:
                    raw[place] ^= 1 << rng.randrange(8)
                case 1:
                    raw[place] = rng.randrange(256)
                case 2:
                    raw[place:place] = rng.randbytes(rng.choice([1, 4, 60]))
                case 3 if len(raw) > 16:
                    del raw[place : place + rng.choice([1, 4, 60])]
                case _:
                    raw[place : place + 4] = rng.choice(
                        [b"\xff" * 4, b"\0" * 4, b"\xdd\xff\xff\xff"]
                    )
            if not raw:
                raw = bytearray(frame)
        return bytes(raw)

    def message(self, message):
        """Change header, facts or tensors."""
        for _ in range(self.rng.choice([1, 1, 2, 4])):
            match self.rng.randrange(10):
                case 0:
                    message = self.numbers(message)
                case 1 | 2 | 3:
                    message = self.crossings(message)
                case _:
                    message = self.facts(message)
        return message

    def numbers(self, message):
        rng = self.rng
        name = rng.choice(["kind", "step", "exchange", "seq", "phase", "session"])
        numbers = [
            0,
            1,
            2,
            3,
            10**6,
            2**63 - 1,
            message.step + 1,
            message.seq + 1,
            message.exchange + 1,
        ]
        made = {
            "kind": lambda: rng.choice([*codec.get_args(codec.Kind)]),
            "phase": lambda: rng.choice([*codec.get_args(codec.Phase)]),
            "session": lambda: rng.choice(["", "s" * 128, "é" * 100, f"other-{rng.randrange(9)}"]),
        }.get(name, lambda: rng.choice(numbers))
        return attrs.evolve(message, **{name: made()})

    def facts(self, message):
        rng, meta = self.rng, copy.deepcopy(dict(message.meta))
        places = list(paths_in(meta))[1:]
        if not places or rng.random() < 0.08:
            known = [
                "cache",
                "adapters",
                "counterparts",
                "released_graphs",
                "released_caches",
                "copied_caches",
            ]
            known += [
                "released_programs",
                "autocast",
                "wants",
                "keep",
                "groups",
                "scale",
                "resume",
                "optimizer",
            ]
            meta[rng.choice(known)] = self.value()
            return attrs.evolve(message, meta=meta)
        *above, key = rng.choice(places)
        holder = at(meta, above)
        match rng.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, list):
                holder.insert(key, self.value())
            case 2 if isinstance(holder, list):
                holder[key:key] = copy.deepcopy(holder[: rng.choice([1, 2, 30])])
            case 3 if isinstance(holder, list):
                rng.shuffle(holder)
            case 4 if type(holder[key]) in (int, float):
                holder[key] += rng.choice([-1, 1, -100, 2**31])
            case _:
                holder[key] = self.value()
        return attrs.evolve(message, meta=meta)

    def crossings(self, message):
        rng, all_ = self.rng, list(message.tensors)
        if not all_ or rng.random() < 0.1:
            all_.insert(rng.randrange(len(all_) + 1), rng.choice(self.tensors))
            return attrs.evolve(message, tensors=tuple(all_))
        n = rng.randrange(len(all_))
        tensor = all_[n].tensor
        match rng.randrange(8):
            case 0:
                del all_[n]
            case 1:
                all_.append(all_[n])
            case 2:
                rng.shuffle(all_)
            case 3:
                role = rng.choice([*codec.get_args(codec.Role)])
                all_[n] = attrs.evolve(all_[n], role=role)
            case 4:
                all_[n] = attrs.evolve(all_[n], tensor=self.filled(tensor))
            case 5:
                dtype = rng.choice([*codec.DTYPES.values()])
                source = tensor.real if tensor.is_complex() else tensor
                all_[n] = attrs.evolve(all_[n], tensor=source.to(dtype))
            case _:
                all_[n] = attrs.evolve(all_[n], tensor=self.reshaped(tensor))
        return attrs.evolve(message, tensors=tuple(all_))

    def filled(self, tensor):
        value = self.rng.choice([0, 1, -1, 2**20, math.nan, math.inf, 1e30])
        if not (tensor.is_floating_point() or tensor.is_complex()):
            value = 7 if not math.isfinite(value) or abs(value) > 2**20 else int(value)
        if tensor.dtype in (torch.uint8, torch.int8, torch.int16):
            value %= 100
        return torch.full_like(tensor, value if tensor.dtype is not torch.bool else bool(value))

    def reshaped(self, tensor):
        rng = self.rng
        match rng.randrange(6):
            case 0:
                return tensor.flatten()
            case 1:
                return tensor[None]
            case 2 if tensor.dim():
                return tensor[:0]
            case 3 if tensor.dim():
                return tensor.transpose(0, -1)
            case 4 if tensor.dim():
                return torch.cat([tensor] * rng.choice([2, 3, 9]), rng.randrange(tensor.dim()))
            case _:
                return tensor[..., :-1] if tensor.dim() else tensor.expand(3)


class Fuzz:
    """A model party under fire. With `trains`, the liars may train its weights too, and these are put back."""

    def __init__(self, seed, folder, *, trains=False):
        torch.manual_seed(0)
        self.seed, self.trains, self.rng = seed, trains, random.Random(seed)
        self.frames = recorded(folder)
        corpus = [codec.decode(frame) for said in self.frames for frame in said]
        self.mutator = Mutator(self.rng, corpus)
        model = tiny_model("llama")
        batch = tiny_batch(model, labels="tokens")
        alone, other = split(copy.deepcopy(model), Partition(1, 1))
        party, self.party = split(model, Partition(1, 1), wire=True)
        if not trains:
            for weight in (*self.party.parameters(), *other.parameters()):
                weight.requires_grad_(False)
        self.party.checkpoints = folder / "model"
        for name, value in CAPS.items():
            if hasattr(self.party.caps, name):
                setattr(self.party.caps, name, value)
        party.open()
        alone.open()
        self.honest = Honest(party, alone, batch)
        self.weights = {n: w.detach().clone() for n, w in self.party.named_parameters()}
        self.number, self.sent, self.findings = 0, [], []
        self.answered = self.refused = 0
        self.start = None

    def run(self, count):
        """Send `count` messages in episodes; return the findings."""
        gc.collect()
        self.start = resident()
        while self.number < count:
            self.episode()
        return self.findings

    def episode(self):
        """One liar's session, or two, from an honest 'open' to a 'close' that must work."""
        rng, self.sent = self.rng, []
        names = [f"liar-{self.seed}-{self.number}-{n}" for n in range(rng.choice([1, 1, 2]))]
        liars = [Liar(self, name, rng.choice(self.frames)) for name in names]
        if self.trains:
            self.attempt(lambda: setattr(self.party, "sharing", rng.choice(["turns", "mean"])))
        for liar in liars:
            liar.open()
        for _ in range(rng.randrange(2 * EPISODE)):
            rng.choice(liars).say()
        for liar in liars:
            liar.close()
        self.clear()

    def attempt(self, do):
        try:
            do()
        except VflairError:
            return False
        return True

    def clear(self):
        """See that nothing stays of the liars, and that who is honest is undisturbed."""
        own = self.honest.party.connection.session
        for name in [name for name in self.party.sessions if name != own]:
            if not self.attempt(lambda name=name: self.party.drop(name)):
                self.found(f"session {name[:40]!r} cannot be dropped")
                self.party.sessions.pop(name, None)
        for name in [name for name in self.party.steps if name != own]:
            del self.party.steps[name]
        if self.trains:
            with torch.no_grad():
                for name, weight in self.party.named_parameters():
                    weight.copy_(self.weights[name])
        try:
            same = self.honest.is_undisturbed()
        except Exception:  # noqa: BLE001 - a finding, whatever it is
            self.found(f"the honest data party fails:\n{traceback.format_exc()}")
            same = True
        if not same:
            self.found("the honest data party gets something else")
            with torch.no_grad():
                for here, there in zip(
                    self.honest.party.parameters(), self.honest.alone.parameters(), strict=True
                ):
                    here.copy_(there)
        if resident() - self.start > GROWTH:
            gc.collect()
            if resident() - self.start > GROWTH:
                self.found(f"{(resident() - self.start) >> 20} MiB stay behind")
                self.start = resident()

    def send(self, frame):
        """Send one frame; return the reply, or None if it was refused."""
        self.number += 1
        self.sent.append(frame)
        peak, since = peak_memory(), time.perf_counter()
        reply = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                message = codec.decode(frame)
                reply = self.party.handle(message)
                codec.encode(reply)
        except VflairError as error:
            self.refused += 1
            if len(str(error)) > TEXT or HOST.search(str(error)):
                self.found(f"this text crosses: {str(error)[:3000]}")
        except Exception:  # noqa: BLE001 - a finding, whatever it is
            self.found(traceback.format_exc())
        self.answered += reply is not None
        if (seconds := time.perf_counter() - since) > SECONDS:
            self.found(f"a message took {seconds:.1f} s")
        if peak_memory() - max(peak, resident()) > PEAK or peak_memory() - peak > PEAK:
            self.found(f"a message took {(peak_memory() - peak) >> 20} MiB")
        return reply

    def found(self, what):
        self.findings.append(Finding(what, self.seed, self.number, list(self.sent)))


@define(eq=False)
class Liar:
    """A session that says real messages in any order, most of them changed."""

    fuzz: Fuzz
    name: str
    frames: list
    seq: int = 0
    step: int = 0
    where: int = 0  # in the real messages
    last: bytes = b""

    def real(self, frame):
        """A real message, as this session would say it now."""
        message = codec.decode(frame)
        return attrs.evolve(message, session=self.name, seq=self.seq + 1, step=self.step)

    def open(self):
        self.deliver(self.real(self.frames[0]))

    def say(self):
        rng = self.fuzz.rng
        if self.last and rng.random() < 0.03:
            self.fuzz.send(self.last)  # once more
            return
        in_order = rng.random() < 0.6
        self.where = (
            (self.where + 1) % len(self.frames) if in_order else rng.randrange(len(self.frames))
        )
        message = self.real(self.frames[self.where])
        if message.kind == "close" and rng.random() < 0.8:
            return
        chance = rng.random()
        if chance < 0.3:
            self.deliver(message)
        elif chance < 0.8:
            self.deliver(self.fuzz.mutator.message(message))
        else:
            self.send(self.fuzz.mutator.frame(codec.encode(message)))

    def deliver(self, message):
        try:
            frame = codec.encode(message)
        except ProtocolError:  # what cannot be written cannot come
            return None
        return self.send(frame)

    def send(self, frame):
        """Send a frame, and count as the model party does."""
        reply = self.fuzz.send(frame)
        if reply is not None and reply.session == self.name:
            self.seq, self.last = min(reply.seq, 2**60), frame
            self.step += reply.kind == "commit"
            if reply.kind == "open":
                self.step = min(reply.meta["step"], 2**60)
        return reply

    def close(self):
        """End the session, which must work if there is one."""
        session = self.fuzz.party.sessions.get(self.name)
        if session is None:
            return
        if type(session.step) is not int:
            self.fuzz.found(f"{self.name} is at step {session.step!r}")
        said = Message("close", self.name, int(session.step), 0, self.seq + 1)
        tried = (attrs.evolve(said, seq=self.seq + n) for n in range(1, 6))
        if not any(self.fuzz.send(codec.encode(each)) for each in tried):
            self.fuzz.found(f"'close' of {self.name} is refused")


def resident():
    """Bytes of memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_memory():
    """Bytes of memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="messages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="where findings lie")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for trains in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            fuzz = Fuzz(options.seed, Path(folder), trains=trains)
            since, told, seen = time.perf_counter(), 0, set()
            while fuzz.number < options.count // 2:
                fuzz.episode() if fuzz.start else fuzz.run(1)
                for finding in fuzz.findings:
                    key = finding.what.strip().splitlines()[-1][:80]
                    if key not in seen:
                        seen.add(key)
                        say(f"{finding.keep(options.keep)}: {finding.what[-600:]}")
                failed |= bool(fuzz.findings)
                fuzz.findings.clear()
                if fuzz.number - told >= 20_000:
                    told = fuzz.number
                    rate = fuzz.number / (time.perf_counter() - since)
                    say(f"{fuzz.number} messages, {fuzz.answered} answered, {rate:.0f} a second")
            say(
                f"trains={trains}: {fuzz.number} messages, {fuzz.answered} answered, {len(seen)} findings"
            )
    return int(failed)


def say(text):
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
