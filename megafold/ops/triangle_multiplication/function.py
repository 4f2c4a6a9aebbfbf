"""Triangle multiplication: the public function, its validation and the choice."""

from __future__ import annotations

import torch

from megafold.ops import dispatch
from megafold.ops.checks import (
    autocast,
    autocast_dtype,
    check_dropout,
    check_floats,
    check_mask,
    check_shape,
    described,
)
from megafold.ops.precision import in_full_fp32
from megafold.ops.triangle_multiplication.reference import reference

NAME = "triangle_multiplication"
WIDEST = 256  # channels of which a kernel holds whole rows
# Channels up to which the kernels are faster than PyTorch in TF32, on an H100; of 128 they take
# twice as long (docs/triangle_multiplication.md).
WIDEST_IN_TF32 = 64


def triangle_multiplication(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    norm_in_weight: torch.Tensor | None,
    norm_in_bias: torch.Tensor | None,
    p_in_weight: torch.Tensor,
    g_in_weight: torch.Tensor,
    norm_out_weight: torch.Tensor | None,
    norm_out_bias: torch.Tensor | None,
    p_out_weight: torch.Tensor,
    g_out_weight: torch.Tensor,
    *,
    outgoing: bool = True,
    eps: float = 1e-5,
    dropout: torch.Tensor | None = None,
    residual: bool = False,
) -> torch.Tensor:
    """Update every edge of the pair representation from the triangles it is part of.

    ``update_ij = sigmoid(g_out n_ij) * p_out layer_norm(sum_k a_ik * b_jk)``, with
    ``a, b = sigmoid(g_in n) * (p_in n)`` and ``n = layer_norm(z)``. Incoming edges use
    ``a_ki * b_kj``. The result is ``dropout * update``, or with ``residual``
    ``z + dropout * update``.

    Args:
        z: ``[B, N, N, C]``, fp32, bf16, fp16 (or fp64); any strides.
        mask: bool ``[B, N, N]``, True = real, or None. Edges outside it are left out of the
            sum; their own outputs are computed all the same.
        norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias: ``[C]`` or None.
        p_in_weight, g_in_weight: ``[2 C, C]``; the first C rows give a, the rest b.
        p_out_weight, g_out_weight: ``[C, C]``.
        outgoing: outgoing edges (algorithm 12) or incoming ones (algorithm 13).
        eps: added to the variances.
        dropout: what dropout multiplies the update by, or None; its shape broadcasts to
            ``[B, N, N, C]`` (``[1, 1, N, C]`` where it is shared along rows). It has no gradient.
        residual: whether z is added.

    Returns:
        ``[B, N, N, C]``, dtype of z. Under ``torch.autocast`` the result has the autocast dtype,
        as that of ``torch.nn.functional.linear`` has, or with ``residual`` what PyTorch promotes
        this and the dtype of z to: an fp32 z stays as exact as it is.

    Raises:
        TypeError, ValueError: naming the argument, its shape or dtype, and what was expected.

    Algorithms 12 and 13 of AlphaFold 3, with the dropout and the residual of Algorithm 17.
    """
    tensors = (
        z,
        mask,
        norm_in_weight,
        norm_in_bias,
        p_in_weight,
        g_in_weight,
        norm_out_weight,
        norm_out_bias,
        p_out_weight,
        g_out_weight,
    )
    options = {"outgoing": outgoing, "eps": eps, "dropout": dropout, "residual": residual}
    check(*tensors, **options)
    if dispatch.choose(NAME, *tensors).implementation == "torch":
        out = reference(*tensors, **options)
        return out.to(dtype_of(z, autocast_dtype(p_in_weight), residual))
    # Imported on first use: kernels compile (or are interpreted) as the environment then says.
    from megafold.ops.triangle_multiplication.library import multiply

    p_in, g_in, p_out, g_out = map(autocast, (p_in_weight, g_in_weight, p_out_weight, g_out_weight))
    return multiply(
        z, mask, norm_in_weight, norm_in_bias, p_in, g_in, norm_out_weight, norm_out_bias, p_out,
        g_out, **options,
    )  # fmt: skip


def check(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    norm_in_weight: torch.Tensor | None,
    norm_in_bias: torch.Tensor | None,
    p_in_weight: torch.Tensor,
    g_in_weight: torch.Tensor,
    norm_out_weight: torch.Tensor | None,
    norm_out_bias: torch.Tensor | None,
    p_out_weight: torch.Tensor,
    g_out_weight: torch.Tensor,
    *,
    outgoing: bool = True,
    eps: float = 1e-5,
    dropout: torch.Tensor | None = None,
    residual: bool = False,
) -> None:
    """Raise TypeError or ValueError where the arguments are not a valid call."""
    norms = {
        "norm_in_weight": norm_in_weight,
        "norm_in_bias": norm_in_bias,
        "norm_out_weight": norm_out_weight,
        "norm_out_bias": norm_out_bias,
    }
    linears_in = {"p_in_weight": p_in_weight, "g_in_weight": g_in_weight}
    linears_out = {"p_out_weight": p_out_weight, "g_out_weight": g_out_weight}
    dropped = {} if dropout is None else {"dropout": dropout}
    check_floats(NAME, {"z": z, **linears_in, **linears_out, **dropped}, norms)
    if z.dim() != 4 or z.shape[1] != z.shape[2] or z.shape[3] == 0:
        raise ValueError(f"{NAME}: z has shape {tuple(z.shape)}, expected [B, N, N, C] with C > 0")
    channels, of = z.shape[-1], described("z", z)
    for name, tensor in norms.items():
        check_shape(NAME, name, tensor, (channels,), "[C]", of)
    for name, tensor in linears_in.items():
        check_shape(NAME, name, tensor, (2 * channels, channels), "[2 C, C]", of)
    for name, tensor in linears_out.items():
        check_shape(NAME, name, tensor, (channels, channels), "[C, C]", of)
    if mask is not None:
        check_mask(NAME, mask, z)
        check_shape(NAME, "mask", mask, tuple(z.shape[:3]), "[B, N, N]", of)
    check_dropout(NAME, dropout, tuple(z.shape), "[B, N, N, C]", of)
    if not isinstance(residual, bool):
        raise TypeError(
            f"{NAME}: residual must be True or False (whether z is added), got "
            f"{type(residual).__name__}"
        )


def dtype_of(z: torch.Tensor, product: torch.dtype, residual: bool) -> torch.dtype:
    """The dtype of the result, for that of the weights as they are multiplied."""
    return torch.promote_types(z.dtype, product) if residual else product


def _configs(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    norm_in_weight: torch.Tensor | None,
    norm_in_bias: torch.Tensor | None,
    p_in_weight: torch.Tensor,
    *rest: object,
    dropout: torch.Tensor | None = None,
    **options: object,
) -> tuple[str, ...]:
    """The block sizes of every kernel this call would run, and where they are from."""
    from megafold.ops.triangle_multiplication import launch

    return launch.described(z, autocast(p_in_weight), dropped=dropout is not None)


def _limit(z: torch.Tensor, *rest: object, **options: object) -> str | None:
    """Why the kernels cannot take this z; None where they can."""
    if z.shape[-1] <= WIDEST:
        return None
    return f"the kernels take up to {WIDEST} channels, and z has {z.shape[-1]}"


def _slower(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    norm_in_weight: torch.Tensor | None,
    norm_in_bias: torch.Tensor | None,
    p_in_weight: torch.Tensor,
    *rest: object,
    **options: object,
) -> str | None:
    """fp32 in full, which is not for tensor cores, or in TF32 of wide pairs."""
    dtype, channels = autocast_dtype(p_in_weight), z.shape[-1]
    if dtype != torch.float32:
        return None
    if in_full_fp32(dtype, z.device):
        return "in full fp32 PyTorch's products are faster"
    if channels <= WIDEST_IN_TF32:
        return None
    return f"in TF32 PyTorch is faster for more than {WIDEST_IN_TF32} channels, here {channels}"


dispatch.register(
    dispatch.Operator(
        NAME,
        triangle_multiplication,
        check,
        "forward and backward are kernels, the product over triangles is torch.bmm",
        _configs,
        _limit,
        _slower,
    )
)
