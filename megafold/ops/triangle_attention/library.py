"""Triangle attention as PyTorch operators: what torch.compile, autograd and opcheck see of it."""

from __future__ import annotations

import torch

from megafold.ops.gated_linear.function import dtype_of
from megafold.ops.registration import Passes, register
from megafold.ops.triangle_attention import passes


def _fake(
    z, mask, norm_weight, norm_bias, weight, out_weight, dropout, heads, starting, residual, eps
):  # fmt: skip
    batch, rows, columns, _ = z.shape
    if not starting:
        rows, columns = columns, rows
    outs, hidden = out_weight.shape
    fp32 = {"dtype": torch.float32}
    return (
        weight.new_empty(
            (*z.shape[:-1], outs), dtype=dtype_of(out_weight, z if residual else None)
        ),
        weight.new_empty((*z.shape[:-1], weight.shape[0])),
        z.new_empty((2, z.numel() // z.shape[-1]), **fp32),
        weight.new_empty((batch, rows, columns, heads, hidden // heads)),
        z.new_empty((2, batch * rows, heads, columns), **fp32),
    )


_call = register(
    Passes(
        name="triangle_attention",
        operands=(
            "Tensor z", "Tensor? mask", "Tensor? norm_weight", "Tensor? norm_bias",
            "Tensor weight", "Tensor out_weight", "Tensor? dropout",
        ),
        options=("int heads", "bool starting", "bool residual", "float eps"),
        kept=("Tensor joint", "Tensor stats", "Tensor attended", "Tensor sums"),
        forward=passes.forward,
        backward=passes.backward,
        fake=_fake,
        for_backward=("heads", "starting", "residual"),
    )
)  # fmt: skip


def attend(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    out_weight: torch.Tensor,
    dropout: torch.Tensor | None,
    *,
    heads: int,
    starting: bool,
    residual: bool,
    eps: float,
) -> torch.Tensor:
    """Triangle attention by the kernels of its parts; arguments validated, weights of one dtype."""
    operands = (z, mask, norm_weight, norm_bias, weight, out_weight, dropout)
    return _call(*operands, heads, starting, residual, eps)[0]
