"""The same run without Flower: the core's own parties in one process, and averages computed by hand."""

from __future__ import annotations

import torch

from vflair_core import (
    Example,
    FineTuning,
    Lora,
    Partition,
    Train,
    load_data_party,
    load_model_party,
    tune,
)


def rows_of(texts, size, step, seed=0):
    """The records of a step: epochs one after the other, each in an order drawn from seed + epoch."""
    order = []
    epoch = 0
    while len(order) < (step + 1) * size:
        generator = torch.Generator().manual_seed(seed + epoch)
        order += [texts[n] for n in torch.randperm(len(texts), generator=generator)]
        epoch += 1
    return order[step * size : (step + 1) * size]


def weighted_mean(states, counts):
    """The mean of equal dicts of tensors, each weighted by its count."""
    total = sum(counts)
    return {
        name: sum(
            state[name] * (count / total) for state, count in zip(states, counts, strict=True)
        )
        for name in states[0]
    }


class WithoutFlower:
    """Parties that take the steps a run of our Flower apps should take.

    Args:
        run: The run config.
        texts: The records of each node, by name.
    """

    def __init__(self, run, texts):
        self.run, self.texts = run, texts
        head, tail = map(int, run["partition"].split(","))
        self.cut = Partition(head=head, tail=tail)
        self.loading = {"gguf_file": run["gguf-file"]} if "gguf-file" in run else {}
        self.lora = Lora(r=run["lora-r"])
        self.model_party = load_model_party(run["model"], self.cut, **self.loading)
        tune(self.model_party, adapters=self.lora)
        self.model_party.sharing = run.get("sharing", "mean")
        self.tunings = {name: self._tuning() for name in texts}
        self.losses = {name: [] for name in texts}

    def _tuning(self):
        party = load_data_party(
            self.run["model"], self.cut, channel=self.model_party.handle, **self.loading
        )
        tune(party, adapters=self.lora)
        steps = self.run["steps"] * self.run.get("rounds", 1)
        return FineTuning(party, Train(steps=steps, learning_rate=self.run["learning-rate"]))

    def step(self, name, step):
        """Let one party take one step."""
        tuning = self.tunings[name]
        rows = rows_of(self.texts[name], self.run["batch-size"], step)
        batch = tuning.party.encode(
            [Example(text) for text in rows], max_length=self.run.get("max-length", 64)
        )
        self.losses[name].append(tuning.step(batch))

    def round(self, number):
        """One round: in turns one party after the other, else all of them step by step."""
        steps = range(number * self.run["steps"], (number + 1) * self.run["steps"])
        names = list(self.texts)
        if self.model_party.sharing == "turns":
            order = [(name, step) for name in names for step in steps]
        else:
            order = [(name, step) for step in steps for name in names]
        for name, step in order:
            self.step(name, step)

    def adapters(self, name):
        """What a party trains."""
        party = self.tunings[name].party
        return {n: w.detach().clone() for n, w in party.named_parameters() if w.requires_grad}

    def average(self):
        """Give all parties the mean of their adapters, weighted by their records, and return it."""
        counts = [len(texts) for texts in self.texts.values()]
        mean = weighted_mean([self.adapters(name) for name in self.texts], counts)
        with torch.no_grad():
            for tuning in self.tunings.values():
                for name, weight in tuning.party.named_parameters():
                    if weight.requires_grad:
                        weight.copy_(mean[name])
        return mean
