"""The equation of a gated linear layer with dropout and a residual, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def reference(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    dropout: torch.Tensor | None = None,
) -> torch.Tensor:
    """``residual + dropout * linear(sigmoid(gate) * x, weight)``.

    The sigmoid, its product with x and the update are stored for the backward pass. Arguments as
    in :func:`megafold.ops.gated_linear`.
    """
    update = F.linear(torch.sigmoid(gate) * x, weight)
    if dropout is None:
        return update if residual is None else residual + update
    return dropout * update if residual is None else torch.addcmul(residual, dropout, update)
