"""What split-and-denoise corrects answers with: a transformer over positions, where a perceptron sees one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


class TransformerDenoiser(nn.Module):
    """Encoder layers between two linear maps; the last one starts at zero, so that it starts by correcting nothing.

    Positions need no encoding of their own: hidden states tell theirs. No dropout.
    """

    def __init__(self, width: int, hidden: int, out: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            hidden, math.gcd(8, hidden), 4 * hidden, dropout=0.0, batch_first=True, norm_first=True
        )
        self.enter, self.leave = nn.Linear(width, hidden), nn.Linear(hidden, out)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, features: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
        """Correct each position (B, T, F) -> (B, T, D) from those that are no padding, `causal` from earlier ones only."""
        length = features.shape[1]
        bias = torch.zeros(length, length, device=features.device)
        if causal:
            bias = bias.masked_fill(torch.ones_like(bias).triu(1).bool(), -math.inf)
        padding = None
        if mask is not None:
            padding = torch.zeros(mask.shape, device=features.device)
            padding = padding.masked_fill(mask.to(features.device) == 0, -1e9)
        found: Tensor = self.leave(self.encoder(self.enter(features), bias, padding))
        return found


def fit(
    denoiser: TransformerDenoiser,
    features: Sequence[Tensor],
    errors: Sequence[Tensor],
    *,
    causal: bool,
) -> Tensor:
    """Return the mean squared error of texts (T, F) and what should be corrected in them (T, D), all at once."""
    seen, wanted = (pad_sequence(list(rows), batch_first=True) for rows in (features, errors))
    ones = [rows.new_ones(len(rows)) for rows in features]
    mask = pad_sequence(ones, batch_first=True)
    gap = denoiser(seen, mask, causal=causal) - wanted
    return gap[mask.bool()].square().mean()
