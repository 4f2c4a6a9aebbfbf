"""The equation of gated self-attention along rows or columns of pairs, in plain PyTorch."""

from __future__ import annotations

import torch

from megafold.ops.evo_attention.reference import reference as attention
from megafold.ops.gated_linear.reference import reference as gated_linear
from megafold.ops.layer_norm_linear.reference import reference as layer_norm_linear
from megafold.ops.triangle_attention.joint import in_rows, joint_weight, parts


def reference(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    v_weight: torch.Tensor,
    b_weight: torch.Tensor,
    g_weight: torch.Tensor,
    out_weight: torch.Tensor,
    *,
    starting: bool = True,
    eps: float = 1e-5,
    dropout: torch.Tensor | None = None,
    residual: bool = False,
) -> torch.Tensor:
    """The references of its parts one after the other; logits ``[B, N, H, N, N]`` are stored.

    Arguments as in :func:`megafold.ops.triangle_attention`.
    """
    weight = joint_weight(q_weight, k_weight, v_weight, b_weight, g_weight)
    joint = layer_norm_linear(z, norm_weight, norm_bias, weight, eps=eps)
    of = parts(joint, len(q_weight), len(b_weight), starting)
    rows = None if mask is None else in_rows(mask, starting)
    out = in_rows(attention(of.q, of.k, of.v, rows, of.bias), starting).flatten(-2)
    return gated_linear(out, of.gate, out_weight, z if residual else None, dropout)
