"""The equation of the conditioned transition in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megafold.ops.adaptive_layer_norm.reference import reference as adaptive_layer_norm
from megafold.ops.transition.reference import swiglu_reference


def reference(
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    norm_weight_gate: torch.Tensor,
    norm_bias_gate: torch.Tensor | None,
    norm_weight_shift: torch.Tensor,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    weight_scale: torch.Tensor,
    bias_scale: torch.Tensor | None,
    eps: float = 1e-5,
    *,
    residual: bool = False,
) -> torch.Tensor:
    """``sigmoid(weight_scale @ s + bias_scale) * (weight_out @ (silu(gate) * value))``.

    gate and value are projections of ``n = adaptive_layer_norm(a, s)``; with ``residual`` a is
    added. Arguments as in
    :func:`megafold.ops.conditioned_transition`.
    """
    n = adaptive_layer_norm(
        a, s, norm_weight_s, norm_weight_gate, norm_bias_gate, norm_weight_shift, eps
    )
    hidden = swiglu_reference(F.linear(n, weight_gate), F.linear(n, weight_value))
    update = torch.sigmoid(F.linear(s, weight_scale, bias_scale)) * F.linear(hidden, weight_out)
    return a + update if residual else update
