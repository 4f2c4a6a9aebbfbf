"""Triangle attention: the public function, its validation and the choice of implementation."""

from __future__ import annotations

import torch

from megafold.ops import dispatch
from megafold.ops.checks import (
    autocast,
    check_dropout,
    check_floats,
    check_mask,
    check_shape,
    described,
)
from megafold.ops.evo_attention.function import WIDEST, evo_attention
from megafold.ops.gated_linear.function import gated_linear
from megafold.ops.gated_linear.reference import reference as gated_linear_reference
from megafold.ops.layer_norm_linear.function import layer_norm_linear
from megafold.ops.triangle_attention.joint import in_rows, joint_weight, parts
from megafold.ops.triangle_attention.reference import reference

NAME = "triangle_attention"


def triangle_attention(
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
    """Update every edge of the pair representation from those that share a node with it.

    ``update_ij = out (sigmoid(g n_ij) * attention_ij)``, where attention goes over k with queries
    of ``n_ij``, keys and values of ``n_ik``, a bias ``b n_jk``, and ``n = layer_norm(z)``. Around
    the ending node keys and values are those of ``n_kj``, the bias ``b n_ki``.

    Args:
        z: ``[B, N, N, C]``, fp32, bf16, fp16 (or fp64); any strides.
        mask: bool ``[B, N, N]``, True = real, or None. Edges outside it are attended by none;
            their own outputs are computed all the same.
        norm_weight, norm_bias: ``[C]`` or None.
        q_weight, k_weight, v_weight, g_weight: ``[H D, C]``; b_weight: ``[H, C]``; D at most 128.
        out_weight: ``[C, H D]``.
        starting: around the starting node (algorithm 14) or the ending node (algorithm 15).
        eps: added to the variance.
        dropout: what dropout multiplies the update by, or None; its shape broadcasts to
            ``[B, N, N, C]``. It has no gradient.
        residual: whether the result is ``z + dropout * update``; else it is without z.

    Returns:
        ``[B, N, N, C]``, dtype of z. Under ``torch.autocast`` the update is in the autocast
        dtype, and with the residual the result is in what PyTorch promotes z's and that to: an
        fp32 residual stays as exact as it is.

    Raises:
        TypeError, ValueError: naming the argument, its shape or dtype, and what was expected.

    Algorithms 14 and 15 of AlphaFold 3, with the dropout and the residual of Algorithm 17.
    """
    weights = (q_weight, k_weight, v_weight, b_weight, g_weight)
    call = (z, mask, norm_weight, norm_bias, *weights, out_weight)
    options = {"starting": starting, "eps": eps, "dropout": dropout, "residual": residual}
    check(*call, **options)
    choice = dispatch.choose(NAME, z)
    if dispatch.backend() == "torch":
        return reference(*call, **options)
    heads, weight = len(b_weight), joint_weight(*weights)
    if choice.implementation == "triton" and apart(z, norm_weight, weight, out_weight) is None:
        # Imported on first use: kernels compile (or are interpreted) as the environment then says.
        from megafold.ops.triangle_attention.library import attend

        return attend(
            z, mask, norm_weight, norm_bias, autocast(weight), autocast(out_weight), dropout,
            heads=heads, starting=starting, residual=residual, eps=eps,
        )  # fmt: skip
    joint = layer_norm_linear(z, norm_weight, norm_bias, weight, eps=eps)
    of = parts(joint, len(q_weight), heads, starting)
    rows = None if mask is None else in_rows(mask, starting)
    out = in_rows(evo_attention(of.q, of.k, of.v, rows, of.bias), starting).flatten(-2)
    added = z if residual else None
    if choice.implementation == "triton" and _too_wide(z, out_weight) is not None:
        return gated_linear_reference(out, of.gate, autocast(out_weight), added, dropout)
    return gated_linear(out, of.gate, out_weight, added, dropout)


def check(
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
) -> None:
    """Raise TypeError or ValueError where the arguments are not a valid call."""
    norms = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    like_q = {"k_weight": k_weight, "v_weight": v_weight, "g_weight": g_weight}
    dropped = {} if dropout is None else {"dropout": dropout}
    check_floats(
        NAME,
        {"z": z, "q_weight": q_weight, **like_q, "b_weight": b_weight, "out_weight": out_weight},
        {**norms, **dropped},
    )
    if z.dim() != 4 or z.shape[1] != z.shape[2] or z.shape[3] == 0:
        raise ValueError(f"{NAME}: z has shape {tuple(z.shape)}, expected [B, N, N, C] with C > 0")
    channels, of = z.shape[-1], described("z", z)
    for name, tensor in norms.items():
        check_shape(NAME, name, tensor, (channels,), "[C]", of)
    for name, tensor, letters in (("b_weight", b_weight, "H"), ("q_weight", q_weight, "H D")):
        if tensor.dim() != 2 or tensor.shape[1] != channels or not len(tensor):
            raise ValueError(
                f"{NAME}: {name} has shape {tuple(tensor.shape)}, expected [{letters}, C] = "
                f"({letters}, {channels}) for {of}"
            )
    heads, hidden = len(b_weight), len(q_weight)
    if hidden % heads or hidden // heads > WIDEST:
        raise ValueError(
            f"{NAME}: q_weight has shape {tuple(q_weight.shape)}, expected [H D, C] with D from 1 "
            f"to {WIDEST} for {described('b_weight', b_weight)}"
        )
    of = f"{of} and {described('q_weight', q_weight)}"
    for name, tensor in like_q.items():
        check_shape(NAME, name, tensor, (hidden, channels), "[H D, C]", of)
    check_shape(NAME, "out_weight", out_weight, (channels, hidden), "[C, H D]", of)
    check_dropout(NAME, dropout, tuple(z.shape), "[B, N, N, C]", described("z", z))
    if mask is not None:
        check_mask(NAME, mask, z)
        check_shape(NAME, "mask", mask, tuple(z.shape[:3]), "[B, N, N]", described("z", z))


def apart(
    z: torch.Tensor,
    norm_weight: torch.Tensor | None,
    weight: torch.Tensor,
    out_weight: torch.Tensor,
) -> str | None:
    """Why the parts of a call that kernels take are operators of their own; None: they are one.

    Args:
        weight: of all projections.
    """
    too_wide = _too_wide(z, out_weight)
    if too_wide is not None:
        return f"gated_linear is PyTorch's: {too_wide}"
    attended = _attended(z, out_weight)
    choices = (
        dispatch.choose("layer_norm_linear", z, norm_weight, None, weight),
        dispatch.choose("gated_linear", attended, attended, out_weight),
    )
    for choice in choices:
        if choice.implementation == "torch":
            return f"{choice.operator} is PyTorch's: {choice.reason}"
    return None


def _attended(z: torch.Tensor, out_weight: torch.Tensor) -> torch.Tensor:
    """What has the shape and dtype that attention's result has."""
    return z[..., :1].expand(*z.shape[:-1], out_weight.shape[1])


def _too_wide(z: torch.Tensor, out_weight: torch.Tensor) -> str | None:
    """Why the kernels of the gated linear layer cannot take what attention gives."""
    attended = _attended(z, out_weight)
    return dispatch.REGISTRY["gated_linear"].limit(attended, attended, out_weight)


def _configs(
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
    **options: object,
) -> tuple[str, ...]:
    """Whether the gradients of projections lie side by side, and what each part runs."""
    weight = joint_weight(q_weight, k_weight, v_weight, b_weight, g_weight)
    why = apart(z, norm_weight, weight, out_weight)
    together = f"parts are operators of their own: {why}" if why else "gradients side by side"
    joint = autocast(weight).new_empty((*z.shape[:-1], len(weight)))
    of = parts(joint, len(q_weight), len(b_weight), starting)
    attended = of.gate
    calls = [
        ("layer_norm_linear", (z, norm_weight, norm_bias, weight)),
        ("evo_attention", (of.q, of.k, of.v, mask, of.bias)),
    ]
    if _too_wide(z, out_weight) is None:
        calls.append(("gated_linear", (attended, attended, out_weight)))
    explained = (str(dispatch.explain(name, *call)).split("\n  ") for name, call in calls)
    return (together, *(line for lines in explained for line in lines))


dispatch.register(
    dispatch.Operator(
        NAME, triangle_attention, check, "its parts are kernels, forward and backward", _configs
    )
)
