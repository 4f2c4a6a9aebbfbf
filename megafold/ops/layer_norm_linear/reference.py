"""The equation of LayerNorm followed by a linear layer, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def reference(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``linear(layer_norm(x))``; the normalised x is stored for the backward pass.

    Statistics accumulate in fp32 for half inputs. Arguments as in
    :func:`megafold.ops.layer_norm_linear`.
    """
    normalised = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    return F.linear(normalised, weight, bias)
