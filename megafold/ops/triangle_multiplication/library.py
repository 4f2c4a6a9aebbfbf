"""Triangle multiplication as PyTorch operators: what compilers, autograd and opcheck see of it."""

from __future__ import annotations

import torch

from megafold.ops.registration import Passes, register
from megafold.ops.triangle_multiplication import passes
from megafold.ops.triangle_multiplication.function import dtype_of


def _fake(z, mask, norm_in_weight, norm_in_bias, p_in_weight, *rest):
    *_, residual = rest
    channels = z.shape[-1]
    pairs = z.shape[0] * z.shape[1] * z.shape[2]
    return (
        p_in_weight.new_empty(z.shape, dtype=dtype_of(z, p_in_weight.dtype, residual)),
        p_in_weight.new_empty((2 * channels, pairs)),
        z.new_empty((2, 2, pairs), dtype=torch.float32),
    )


_call = register(
    Passes(
        name="triangle_multiplication",
        operands=(
            "Tensor z", "Tensor? mask", "Tensor? norm_in_weight", "Tensor? norm_in_bias",
            "Tensor p_in_weight", "Tensor g_in_weight", "Tensor? norm_out_weight",
            "Tensor? norm_out_bias", "Tensor p_out_weight", "Tensor g_out_weight",
            "Tensor? dropout",
        ),
        options=("bool outgoing", "float eps", "bool residual"),
        kept=("Tensor edges", "Tensor stats"),
        forward=passes.forward,
        backward=passes.backward,
        fake=_fake,
        for_backward=("outgoing", "residual"),
    )
)  # fmt: skip


def multiply(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    *parameters: torch.Tensor | None,
    dropout: torch.Tensor | None,
    residual: bool,
    outgoing: bool,
    eps: float,
) -> torch.Tensor:
    """Triangle multiplication by the kernels; arguments validated, weights of one dtype."""
    return _call(z, mask, *parameters, dropout, outgoing, eps, residual)[0]
