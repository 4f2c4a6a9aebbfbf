"""The gate as a PyTorch operator: what torch.compile, autograd and opcheck see."""

from __future__ import annotations

import torch

from megafold.ops.gated import launch
from megafold.ops.gated.function import dtype_of
from megafold.ops.registration import Passes, register


def _fake(x, gate, residual):
    return x.new_empty(x.shape, dtype=dtype_of(x, residual))


_call = register(
    Passes(
        name="gated",
        operands=("Tensor x", "Tensor gate", "Tensor? residual"),
        options=(),
        kept=(),
        forward=launch.forward,
        backward=launch.backward,
        fake=_fake,
        added="residual",
    )
)


def apply(x: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """The gate by the kernels; arguments validated, x and gate of one dtype."""
    return _call(x, as_last(x, gate), residual)


def as_last(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """What broadcasts to x, with as many of its last dimensions as are needed."""
    while gate.dim() > 1 and gate.shape[0] == 1:
        gate = gate[0]
    if gate.shape != x.shape[x.dim() - gate.dim() :]:  # 1 between others: not one period
        gate = gate.expand(x.shape)
    return gate
