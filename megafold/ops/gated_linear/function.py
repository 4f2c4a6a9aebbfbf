"""Gated linear layer: the public function, its validation and the choice of implementation."""

from __future__ import annotations

import torch

from megafold.ops import dispatch
from megafold.ops.checks import (
    autocast,
    autocast_dtype,
    check_dropout,
    check_floats,
    check_shape,
    described,
)
from megafold.ops.gated_linear.reference import reference
from megafold.ops.precision import in_full_fp32

NAME = "gated_linear"
WIDEST = 128  # channels, and outputs, of which a program holds the gradient of the weight
MOST_ROWS = 2**31 - 2**10  # rows are counted in 32 bits, up to a block beyond the last
# Rows from which kernels are as fast as PyTorch with gradients: those of LayerNorm + Linear on an
# H100 (docs/layer_norm_linear.md); these here have not been timed.
FEW_ROWS = 6144


def gated_linear(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    dropout: torch.Tensor | None = None,
) -> torch.Tensor:
    """``residual + dropout * linear(sigmoid(gate) * x, weight)``.

    Args:
        x: ``[..., C]``, fp32, bf16, fp16 (or fp64); any strides.
        gate: ``[..., C]``, before its sigmoid; any strides.
        weight: ``[O, C]``, as in ``torch.nn.Linear``.
        residual: ``[..., O]``, what the update is added to, or None; any strides.
        dropout: what dropout multiplies the update by, or None; its shape broadcasts to
            ``[..., O]`` (``[1, N, O]`` for pairs ``[N, N, O]``). It has no gradient.

    Returns:
        ``[..., O]``, dtype of x. Under ``torch.autocast`` x, gate and weight are multiplied in
        the autocast dtype, and the result has it, or where there is a residual what PyTorch
        promotes the two to: an fp32 residual stays as exact as it is.

    Raises:
        TypeError, ValueError: naming the argument, its shape or dtype, and what was expected.

    The end of gated attention in AlphaFold 3, Algorithms 14 and 15, with the dropout and the
    residual of Algorithm 17.
    """
    check(x, gate, weight, residual, dropout)
    choice = dispatch.choose(NAME, x, gate, weight, residual, dropout)
    x, gate, weight = autocast(x), autocast(gate), autocast(weight)
    if choice.implementation == "torch":
        out = reference(x, gate, weight, residual, dropout)
        return out.to(dtype_of(weight, residual))
    # Imported on first use: kernels compile (or are interpreted) as the environment then says.
    from megafold.ops.gated_linear.library import project

    return project(x, gate, weight, residual, dropout)


def check(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    dropout: torch.Tensor | None = None,
) -> None:
    """Raise TypeError or ValueError where the arguments are not a valid call."""
    optional = {"residual": residual, "dropout": dropout}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    check_floats(NAME, {"x": x, "gate": gate, "weight": weight, **given})
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{NAME}: x has shape {tuple(x.shape)}, expected [..., C] with C > 0")
    of = described("x", x)
    check_shape(NAME, "gate", gate, tuple(x.shape), "[..., C]", of)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{NAME}: weight has shape {tuple(weight.shape)}, expected [O, C] = "
            f"(O, {x.shape[-1]}) for {of}"
        )
    shape, of = (*x.shape[:-1], weight.shape[0]), f"{of} and {described('weight', weight)}"
    check_shape(NAME, "residual", residual, shape, "[..., O]", of)
    check_dropout(NAME, dropout, shape, "[..., O]", of)


def dtype_of(weight: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    """The dtype of the result, for a weight as it is multiplied."""
    if residual is None:
        return weight.dtype
    return torch.promote_types(residual.dtype, weight.dtype)


def _configs(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    dropout: torch.Tensor | None = None,
) -> tuple[str, ...]:
    """What this call would run in both passes: block sizes, and where they are from."""
    from megafold.ops.gated_linear import launch

    return launch.described(x, autocast(weight), residual, dropout)


def _limit(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, *rest: object, **options: object
) -> str | None:
    """Why the kernels cannot take a call; None where they can."""
    outs, channels = weight.shape
    if channels > WIDEST:
        return f"the kernels take up to {WIDEST} channels, and x has {channels}"
    if outs > WIDEST:
        return f"the kernels take up to {WIDEST} outputs, and weight has {outs}"
    rows = x.numel() // channels
    if rows > MOST_ROWS:
        return f"the kernels take up to {MOST_ROWS} rows, and x has {rows}"
    return None


def _slower(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, *rest: object, **options: object
) -> str | None:
    """fp32 in full, which is not for tensor cores, and few rows in a call with gradients."""
    if in_full_fp32(autocast_dtype(weight), x.device):
        return "in full fp32 PyTorch's products are taken"
    rows = x.numel() // x.shape[-1]
    if not torch.is_grad_enabled() or rows >= FEW_ROWS:
        return None
    return f"with gradients PyTorch is taken below {FEW_ROWS} rows, here {rows}"


dispatch.register(
    dispatch.Operator(
        NAME,
        gated_linear,
        check,
        "forward and backward are kernels",
        _configs,
        _limit,
        _slower,
        "as it is for LayerNorm + Linear, not measured here",
    )
)
