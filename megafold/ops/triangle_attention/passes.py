"""Triangle attention on the host: the kernels of its parts, and one memory for five gradients.

The gradients of queries, keys, values, gates and biases are written where the gradient of their
joint projection lies. As results of operators of their own they would be put together by a copy of
all of them. The gradient of the residual is added by the kernel that writes that of z.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megafold.ops.evo_attention import launch as evo_attention
from megafold.ops.gated_linear import launch as gated_linear
from megafold.ops.layer_norm_linear import launch as layer_norm_linear
from megafold.ops.triangle_attention.joint import in_rows, parts


def forward(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    out_weight: torch.Tensor,
    dropout: torch.Tensor | None,
    heads: int,
    starting: bool,
    residual: bool,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """The output ``[B, N, N, C]``, and what backward needs.

    That is: the projections, and the norm's statistics; what attention gives, ``[B, S, N, H, D]``,
    and its statistics.
    """
    joint, stats = layer_norm_linear.forward(z, norm_weight, norm_bias, weight, None, eps)
    of = parts(joint, out_weight.shape[1], heads, starting)
    rows = None if mask is None else in_rows(mask, starting)
    out, sums = evo_attention.forward(of.q, of.k, of.v, rows, of.bias, scale_of(of.q))
    added = z if residual else None
    pairs = in_rows(out, starting).flatten(-2)
    return gated_linear.forward(pairs, of.gate, out_weight, added, dropout), joint, stats, out, sums


def backward(
    grad: torch.Tensor,
    z: torch.Tensor,
    mask: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    out_weight: torch.Tensor,
    dropout: torch.Tensor | None,
    joint: torch.Tensor,
    stats: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    heads: int,
    starting: bool,
    residual: bool,
    asked: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradients asked for of z, norm_weight, norm_bias, weight and out_weight, in order."""
    *of_projection, of_output = asked
    inner = any(of_projection)
    of = parts(joint, out_weight.shape[1], heads, starting)
    grad_joint = torch.empty_like(joint) if inner else None
    into = parts(grad_joint, out_weight.shape[1], heads, starting) if inner else None
    of_out = gated_linear.backward(
        grad, in_rows(out, starting).flatten(-2), of.gate, out_weight, dropout,
        (inner, inner, of_output), into_gate=into.gate if inner else None,
    )  # fmt: skip
    last = [of_out.pop()] if of_output else []
    if not inner:
        return last
    grad_out = in_rows(of_out[0].unflatten(-1, out.shape[-2:]), starting)
    del of_out
    rows = None if mask is None else in_rows(mask, starting)
    *_, grad_bias = evo_attention.backward(
        grad_out, of.q, of.k, of.v, rows, of.bias, out, sums, scale_of(of.q), (True,) * 4,
        into=into[:3],
    )  # fmt: skip
    del grad_out
    into.bias.copy_(grad_bias)
    into.zeros.zero_()
    del grad_bias
    found = layer_norm_linear.backward(
        grad_joint, z, norm_weight, norm_bias, weight, None, stats, (*of_projection, False),
        added=grad if residual else None,
    )  # fmt: skip
    return found + last


def scale_of(q: torch.Tensor) -> float:
    """Of the logits: one over the root of D."""
    return q.shape[-1] ** -0.5
