"""Fit a small head on the few examples whose labels are known, and let it label the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from attrs import field, frozen, validators
from torch import Tensor

from vflair_core import AttackError, Guess


@frozen
class LabelCompletion:
    """Logistic regression from the mean state of an example to its label, on known labels.

    Fu et al., "Label Inference Attacks Against Vertical Federated Learning", USENIX Security 2022 (passive model
    completion). Differs from the paper: the new top is a logistic regression on standardised states and the body
    is not trained on, so there is no semi-supervised stage.

    Attributes:
        on: Which states: returned or smashed.
        strength: Inverse strength of the L2 penalty (scikit-learn's C).
        positive: The class that scores speak of, where it is known.
    """

    on: Literal["returned", "smashed"] = "returned"
    strength: float = field(default=1.0, validator=validators.gt(0))
    positive: int = field(default=1, validator=validators.ge(0))

    def __call__(
        self,
        returned: Tensor,  # (N, T, D), or (N, C) in HT
        smashed: Tensor,  # (N, T, D)
        lengths: Tensor,  # (N,)
        known_labels: Mapping[int, int],
    ) -> Guess:
        """Return labels (N,), and scores (N,) where the positive class is known."""
        if len(set(known_labels.values())) < 2:
            raise AttackError(
                "label-completion learns from known labels of at least two classes; known are "
                f"{sorted(set(known_labels.values()))}. Raise victims.known."
            )
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        given = returned if self.on == "returned" else smashed
        states = given.sum(1) / lengths[:, None] if given.dim() == 3 else given  # padding is zero
        x, rows = states.double().numpy(), list(known_labels)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=self.strength, max_iter=1000))
        model.fit(x[rows], [known_labels[n] for n in rows])
        labels = torch.from_numpy(model.predict(x)).long()
        classes = model.classes_.tolist()
        if self.positive not in classes:
            return Guess(labels=labels)
        chance = model.predict_proba(x)[:, classes.index(self.positive)]
        return Guess(labels=labels, scores=torch.from_numpy(chance), positive=self.positive)
