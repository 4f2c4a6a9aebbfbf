"""The gated linear layer as PyTorch operators: what torch.compile, autograd and opcheck see."""

from __future__ import annotations

import torch

from megafold.ops.gated_linear import launch
from megafold.ops.gated_linear.function import dtype_of
from megafold.ops.registration import Passes, register


def _fake(x, gate, weight, residual, dropout):
    shape = (*x.shape[:-1], weight.shape[0])
    return weight.new_empty(shape, dtype=dtype_of(weight, residual))


_call = register(
    Passes(
        name="gated_linear",
        operands=(
            "Tensor x", "Tensor gate", "Tensor weight", "Tensor? residual", "Tensor? dropout",
        ),
        options=(),
        kept=(),
        forward=launch.forward,
        backward=launch.backward,
        fake=_fake,
        added="residual",
        laid_out=("x",),
    )
)  # fmt: skip


def project(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    dropout: torch.Tensor | None,
) -> torch.Tensor:
    """The gated linear layer by the kernels; arguments validated, x, gate, weight of one dtype."""
    return _call(x, gate, weight, residual, dropout)
