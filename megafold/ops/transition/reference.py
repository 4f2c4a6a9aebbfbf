"""The equation of the SwiGLU transition in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def reference(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: bool = False,
) -> torch.Tensor:
    """``weight_out @ (silu(weight_gate @ n) * (weight_value @ n))``, n the normalised x.

    With ``residual`` x is added to this update.

    PyTorch stores four hidden tensors for the backward pass: gate, value, silu(gate) and
    their product. Arguments as in :func:`megafold.ops.transition`.
    """
    normalised = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    gate = F.linear(normalised, weight_gate)
    value = F.linear(normalised, weight_value)
    update = F.linear(swiglu_reference(gate, value), weight_out)
    return x + update if residual else update


def swiglu_reference(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * value``, element by element."""
    return F.silu(gate) * value
