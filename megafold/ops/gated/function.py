"""The gate: the public function, its validation and the choice of implementation."""

from __future__ import annotations

import torch

from megafold.ops import dispatch
from megafold.ops.checks import autocast, broadcasts, check_floats, check_shape, described
from megafold.ops.gated.reference import reference

NAME = "gated"
MOST_ROWS = 2**31 - 2**20  # rows are counted in 32 bits, up to some blocks beyond the last


def gated(
    x: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """``residual + sigmoid(gate) * x``.

    Args:
        x: ``[..., C]``, fp32, bf16, fp16 (or fp64); any strides.
        gate: ``[..., C]``, before its sigmoid; any strides. Its leading dimensions broadcast to
            those of x: ``[1, N, C]`` or ``[N, C]`` for samples ``[S, N, C]`` that share it.
        residual: ``[..., C]`` as x, what the update is added to, or None; any strides.

    Returns:
        ``[..., C]``, dtype of x. Under ``torch.autocast`` x and gate have the autocast dtype, and
        so has the result, or where there is a residual what PyTorch promotes the two to: an fp32
        residual stays as exact as it is.

    Raises:
        TypeError, ValueError: naming the argument, its shape or dtype, and what was expected.

    Both gates of AlphaFold 3's Algorithm 24, the second with the residual of Algorithm 23. By the
    kernels nothing is kept for the backward pass but x and gate.
    """
    check(x, gate, residual)
    choice = dispatch.choose(NAME, x, gate, residual)
    x, gate = autocast(x), autocast(gate)
    if choice.implementation == "torch":
        return reference(x, gate, residual)
    # Imported on first use: kernels compile (or are interpreted) as the environment then says.
    from megafold.ops.gated.library import apply

    return apply(x, gate, residual)


def check(x: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor | None = None) -> None:
    """Raise TypeError or ValueError where the arguments are not a valid call."""
    given = {} if residual is None else {"residual": residual}
    check_floats(NAME, {"x": x, "gate": gate, **given})
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{NAME}: x has shape {tuple(x.shape)}, expected [..., C] with C > 0")
    shape, own = tuple(x.shape), tuple(gate.shape)
    if not broadcasts(own, shape) or own[-1:] != shape[-1:]:
        raise ValueError(
            f"{NAME}: gate has shape {own}, expected [..., C] with C = {shape[-1]} and leading "
            f"dimensions that broadcast to those of {described('x', x)}"
        )
    check_shape(NAME, "residual", residual, shape, "[..., C]", described("x", x))


def dtype_of(x: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    """The dtype of the result, for an x as it is multiplied."""
    return x.dtype if residual is None else torch.promote_types(residual.dtype, x.dtype)


def _configs(
    x: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor | None = None
) -> tuple[str, ...]:
    """What this call would run in both passes: block sizes, and where they are from."""
    from megafold.ops.gated import launch
    from megafold.ops.gated.library import as_last

    return launch.described(autocast(x), as_last(x, gate))


def _limit(x: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor | None = None) -> str | None:
    """Why the kernels cannot take a call; None where they can."""
    rows = x.numel() // x.shape[-1]
    return (
        f"the kernels take up to {MOST_ROWS} rows, and x has {rows}" if rows > MOST_ROWS else None
    )


dispatch.register(
    dispatch.Operator(NAME, gated, check, "forward and backward are kernels", _configs, _limit)
)
