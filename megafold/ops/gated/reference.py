"""The equation of a gate with a residual, in plain PyTorch."""

from __future__ import annotations

import torch


def reference(
    x: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """``residual + sigmoid(gate) * x``.

    The sigmoid is stored for the backward pass. Arguments as in :func:`megafold.ops.gated`.
    """
    update = torch.sigmoid(gate) * x
    return update if residual is None else residual + update
