"""The transition as PyTorch operators: what torch.compile, autograd and opcheck see of it."""

from __future__ import annotations

import torch

from megafold.ops.keeping import register_keeping
from megafold.ops.registration import Passes, has_gradient, register
from megafold.ops.transition import launch, passes
from megafold.ops.transition.passes import dtype_of

OPERANDS = (
    "Tensor x", "Tensor? norm_weight", "Tensor? norm_bias",
    "Tensor weight_gate", "Tensor weight_value", "Tensor weight_out",
)  # fmt: skip
OPTIONS = ("float? eps", "bool residual")


def _fake(x, norm_weight, norm_bias, weight_gate, weight_value, weight_out, eps, residual):
    statistics = 0 if eps is None else 2
    rows = x.numel() // x.shape[-1]
    stats = x.new_empty((statistics, rows), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype_of(x, weight_gate, residual)), stats


def _fake_keeping(x, norm_weight, norm_bias, weight_gate, weight_value, weight_out, eps, residual):
    hidden, channels = weight_gate.shape
    operands = x, norm_weight, norm_bias, weight_gate, weight_value, weight_out
    y, stats = _fake(*operands, eps, residual)
    rows = x.numel() // x.shape[-1]
    normalised = weight_gate.new_empty((0 if eps is None else rows, channels))
    pairs = weight_gate.new_empty((rows, 2 * hidden))
    return y, stats, normalised, pairs, weight_gate.new_empty((2 * hidden, channels))


_call = register(
    Passes(
        name="transition",
        operands=OPERANDS,
        options=OPTIONS,
        kept=("Tensor stats",),
        forward=passes.forward,
        backward=passes.backward,
        fake=_fake,
        for_backward=("eps", "residual"),
    )
)

_call_keeping = register_keeping(
    Passes(
        name="transition_keeping",
        operands=OPERANDS,
        options=OPTIONS,
        kept=("Tensor stats", "Tensor normalised", "Tensor pairs", "Tensor both"),
        forward=passes.forward_keeping,
        backward=passes.backward_from_kept,
        fake=_fake_keeping,
        for_backward=("residual",),
    )
)


def apply(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    eps: float | None,
    residual: bool = False,
) -> torch.Tensor:
    """A transition by the kernels; arguments validated, the weights of one dtype.

    Args:
        eps: of the norm; None where x is not to be normalised.
        residual: whether x is added.
    """
    operands = x, norm_weight, norm_bias, weight_gate, weight_value, weight_out
    if launch.keeps(x.shape[-1]) and has_gradient(*operands):
        return _call_keeping(*operands, eps, residual)
    return _call(*operands, eps, residual)[0]
