"""Learn a label from the smashed data of texts of one's own, and apply it to the victims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import field, frozen, validators
from torch import Tensor

from vflair_core import AttackError, Guess


@frozen
class AttributeProbe:
    """A probe on mean-pooled smashed data, trained on a few labelled texts that the attacker encodes itself.

    Song & Raghunathan, "Information Leakage in Embedding Models", CCS 2020, arXiv 2004.00053 (sensitive attribute
    inference). It attacks forward messages only, so it works at inference too. Differs from the paper: states are
    averaged over tokens; the probe is a logistic regression or one hidden layer on standardised states; texts
    pass through the defense's deterministic part, if it is known.

    Attributes:
        hidden: Width of the probe's hidden layer; 0 for logistic regression.
        strength: Inverse strength of the L2 penalty.
        max_length: Tokens kept of each text.
        positive: The class that scores speak of, where it occurs.
    """

    hidden: int = field(default=0, validator=validators.ge(0))
    strength: float = field(default=1.0, validator=validators.gt(0))
    max_length: int = field(default=512, validator=validators.ge(1))
    positive: int = field(default=1, validator=validators.ge(0))

    def __call__(
        self,
        smashed: Tensor,  # (N, T, D)
        lengths: Tensor,  # (N,)
        few_labelled: Sequence[Any],
        head: Any,
        tokenizer: Any,
        generator: torch.Generator,
        mechanism: Any = None,
        parameters: Any = None,
    ) -> Guess:
        """Return labels (N,), and scores (N,) where the positive class occurs."""
        known = parameters if parameters is not None else mechanism
        classes = sorted({example.label for example in few_labelled})
        if len(classes) < 2 or not all(isinstance(label, int) for label in classes):
            raise AttackError(
                f"attribute-probe learns classes from few_labelled; there the labels are {classes}. It needs "
                "whole-number labels of at least two classes."
            )
        own = [
            self._pooled(example.text, head, tokenizer, known, generator)
            for example in few_labelled
        ]
        probe = self._probe(int(torch.randint(2**31, (1,), generator=generator)))
        probe.fit(torch.stack(own).double().numpy(), [example.label for example in few_labelled])
        seen = (smashed.sum(1) / lengths[:, None]).double().numpy()  # padding is zero
        labels = torch.from_numpy(probe.predict(seen)).long()
        if self.positive not in classes:
            return Guess(labels=labels)
        chance = probe.predict_proba(seen)[:, classes.index(self.positive)]
        return Guess(labels=labels, scores=torch.from_numpy(chance), positive=self.positive)

    def _pooled(
        self, text: str, head: Any, tokenizer: Any, known: Any, generator: torch.Generator
    ) -> Tensor:
        rows = tokenizer(text, truncation=True, max_length=self.max_length, return_tensors="pt")
        ids = rows["input_ids"].to(head.device)
        with torch.no_grad():
            if known is None:
                return head(ids)[0].mean(0).cpu()
            embeds = known.sample_embeddings(head.vectors()[ids], generator)
            return known.sample(head(inputs_embeds=embeds), generator)[0].mean(0).cpu()

    def _probe(self, seed: int) -> Any:
        from sklearn.linear_model import LogisticRegression
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if self.hidden:
            options = {"alpha": 1 / self.strength, "solver": "lbfgs", "random_state": seed}
            return make_pipeline(
                StandardScaler(), MLPClassifier((self.hidden,), max_iter=2000, **options)
            )
        return make_pipeline(
            StandardScaler(), LogisticRegression(C=self.strength, max_iter=1000, random_state=seed)
        )
