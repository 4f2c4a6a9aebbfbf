"""The equation of adaptive LayerNorm in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def reference(
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    weight_gate: torch.Tensor,
    bias_gate: torch.Tensor | None,
    weight_shift: torch.Tensor,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``sigmoid(weight_gate @ n + bias_gate) * layer_norm(a) + weight_shift @ n``.

    n is s normalised with ``norm_weight_s`` and without offset; the norm of a has neither.
    Arguments as in :func:`megafold.ops.adaptive_layer_norm`.
    """
    condition = F.layer_norm(s, s.shape[-1:], norm_weight_s, None, eps)
    gate = torch.sigmoid(F.linear(condition, weight_gate, bias_gate))
    shift = F.linear(condition, weight_shift)
    return torch.addcmul(shift, gate, F.layer_norm(a, a.shape[-1:], eps=eps))
