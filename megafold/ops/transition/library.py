"""The transition as PyTorch operators: what torch.compile, autograd and opcheck see of it."""

from __future__ import annotations

import torch

from megafold.ops.registration import Passes, register
from megafold.ops.transition import passes


def _fake(x, norm_weight, norm_bias, weight_gate, weight_value, weight_out, eps):
    statistics = 0 if eps is None else 2
    rows = x.numel() // x.shape[-1]
    stats = x.new_empty((statistics, rows), dtype=torch.float32)
    return weight_gate.new_empty(x.shape), stats


_call = register(
    Passes(
        name="transition",
        operands=(
            "Tensor x", "Tensor? norm_weight", "Tensor? norm_bias",
            "Tensor weight_gate", "Tensor weight_value", "Tensor weight_out",
        ),
        options=("float? eps",),
        kept=("Tensor stats",),
        forward=passes.forward,
        backward=passes.backward,
        fake=_fake,
        for_backward=("eps",),
    )
)  # fmt: skip


def apply(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    eps: float | None,
) -> torch.Tensor:
    """A transition by the kernels; arguments validated, the weights of one dtype.

    Args:
        eps: of the norm; None where x is not to be normalised.
    """
    return _call(x, norm_weight, norm_bias, weight_gate, weight_value, weight_out, eps)[0]
