"""Triangle multiplication as PyTorch operators: what compilers, autograd and opcheck see of it."""

from __future__ import annotations

import torch

from megafold.ops.registration import Passes, register
from megafold.ops.triangle_multiplication import passes


def _fake(z, mask, norm_in_weight, norm_in_bias, p_in_weight, *rest):
    channels = z.shape[-1]
    pairs = z.shape[0] * z.shape[1] * z.shape[2]
    return (
        p_in_weight.new_empty(z.shape),
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
        ),
        options=("bool outgoing", "float eps"),
        kept=("Tensor edges", "Tensor stats"),
        forward=passes.forward,
        backward=passes.backward,
        fake=_fake,
        for_backward=("outgoing",),
    )
)  # fmt: skip


def multiply(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    *parameters: torch.Tensor | None,
    outgoing: bool,
    eps: float,
) -> torch.Tensor:
    """Triangle multiplication by the kernels; arguments validated, weights of one dtype."""
    return _call(z, mask, *parameters, outgoing, eps)[0]
