"""Heads on the trunk. The confidence head is not here yet; see the changelog."""

from __future__ import annotations

import torch
from torch import nn

from megafold.model.config import ModelConfig
from megafold.model.primitives import linear


class DistogramHead(nn.Module):
    """Logits over distance bins between representative atoms, symmetric in the pair."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = linear(config.c_z, config.distogram_bins, bias=True, init="final")

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """z ``[N, N, c_z]``; returns logits ``[N, N, bins]``."""
        return self.linear(z + z.transpose(0, 1))


def distance_breaks(bins: int, device: torch.device | None = None) -> torch.Tensor:
    """The ``bins - 1`` inner edges between bins from 2 to 22 angstrom."""
    return torch.linspace(2.0, 22.0, bins + 1, device=device)[1:-1]
