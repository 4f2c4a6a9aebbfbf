"""LayerNorm + Linear as PyTorch operators: what torch.compile, autograd and opcheck see of it."""

from __future__ import annotations

import torch

from megafold.ops.layer_norm_linear import launch
from megafold.ops.registration import Passes, register


def _fake(x, norm_weight, norm_bias, weight, bias, eps):
    out = weight.new_empty((*x.shape[:-1], weight.shape[0]))
    return out, x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)


_call = register(
    Passes(
        name="layer_norm_linear",
        operands=(
            "Tensor x", "Tensor? norm_weight", "Tensor? norm_bias", "Tensor weight", "Tensor? bias",
        ),
        options=("float eps",),
        kept=("Tensor stats",),
        forward=launch.forward,
        backward=launch.backward,
        fake=_fake,
    )
)  # fmt: skip


def project(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """LayerNorm + Linear by the kernels; arguments validated, the result in weight's dtype."""
    return _call(x, norm_weight, norm_bias, weight, bias, eps)[0]
