"""LayerNorm by rows on the host: block sizes and launches."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.layer_norm.kernels import gradient_kernel, normalise_kernel
from megafold.ops.sizes import cdiv, multiprocessors, power_of_two
from megafold.ops.tuning import Config, Found, lookup

NORMALISE = "layer_norm.normalise"
GRADIENT = "layer_norm.gradient"
KERNELS = (NORMALISE, GRADIENT)

NARROWEST, WIDEST = 16, 1024  # of the tables; wider rows take the blocks of the widest


def padded(channels: int) -> int:
    """The width that a tile of whole rows has: the next power of two, 16 at least."""
    return max(NARROWEST, power_of_two(channels))


def config_of(kernel: str, like: torch.Tensor, rows: int, channels: int) -> Found:
    """The block sizes a kernel runs with on rows of the dtype of ``like``."""
    sizes = (("C", min(padded(channels), WIDEST)), ("M", rows))
    return lookup(kernel, like.device, 8 * like.dtype.itemsize, sizes)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """A view ``[M, C]`` of ``[..., C]`` whose channels are neighbours; a copy if there is none."""
    flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def packed(vector: torch.Tensor | None) -> torch.Tensor | None:
    """A vector with its numbers side by side."""
    return vector if vector is None or vector.stride(0) == 1 else vector.contiguous()


def as_operand(gradient: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    """A gradient in the shape and dtype of what it is the gradient of."""
    if gradient.shape != operand.shape:
        gradient = gradient.view(operand.shape)
    return gradient if gradient.dtype == operand.dtype else gradient.to(operand.dtype)


def normalise(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    stats: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    given: bool,
) -> torch.Tensor:
    """LayerNorm of x ``[M, C]`` in ``dtype``; fills the statistics, or reads them if ``given``."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows, channels = x.shape
    if out.numel():
        config = config_of(NORMALISE, x, rows, channels).config
        launcher = _normalise(
            normalise_kernel, config, rows, channels, eps, given, x.device,
            layout(x), layout(weight), layout(bias), dtype,
        )  # fmt: skip
        with on(x.device):
            launcher(x, weight, bias, out, stats)
    return out


def gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    *,
    for_x: bool,
    for_parameters: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x ``[M, C]`` and, fp32 ``[2, C]``, of weight and bias.

    Args: as :func:`gradient_with_sums` has them.
    """
    grad_x, sums = gradient_with_sums(
        grad, x, weight, stats, for_x=for_x, for_parameters=for_parameters
    )
    return grad_x, None if sums is None else sums.sum(dim=1)


def gradient_with_sums(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    *,
    for_x: bool,
    for_parameters: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradient of x ``[M, C]``, and what programs leave: fp32 ``[2, programs, C]``.

    The sums over the programs are the gradients of weight and bias.

    Args:
        grad: of the normalised x, ``[M, C]``, contiguous. It is no more after the call: where
            its dtype is that of x, the gradient of x is written over it.
    """
    rows, channels = x.shape
    config = config_of(GRADIENT, x, rows, channels).config
    blocks = cdiv(rows, fitted(config, channels)["ROWS"])
    wanted = config.blocks["WAVES"] * multiprocessors(x.device) if for_parameters else blocks
    per_program = cdiv(blocks, max(1, min(blocks, wanted)))
    programs = cdiv(blocks, per_program)
    grad_x = (grad if grad.dtype == x.dtype else torch.empty_like(x)) if for_x else None
    sums = None
    if for_parameters:
        sums = torch.empty((2, programs, channels), dtype=torch.float32, device=x.device)
    launcher = _gradient(
        gradient_kernel, config, rows, channels, programs, per_program, x.device,
        layout(grad), layout(x), layout(weight), for_x, for_parameters,
    )  # fmt: skip
    with on(x.device):
        launcher(grad, x, weight, stats, grad_x, sums)
    return grad_x, sums


def fitted(config: Config, channels: int) -> dict[str, int]:
    """The constants of a kernel on whole rows: fewer rows where they are wider than the tables."""
    wide = padded(channels)
    rows = max(1, config.blocks["ROWS"] * WIDEST // max(wide, WIDEST))
    return {"ROWS": rows, "BLOCK_C": wide}


@lru_cache(maxsize=4096)
def _normalise(
    kernel: Any, config: Config, rows: int, channels: int, eps: float, given: bool,
    device: torch.device, x: Layout, weight: Layout | None, bias: Layout | None,
    dtype: torch.dtype,
) -> Launcher:  # fmt: skip
    constants = {"GIVEN": given, **fitted(config, channels)}
    programs = cdiv(rows, constants["ROWS"])
    return Launcher(kernel, programs, (x[0][0], eps, rows, channels), constants, config.options)


@lru_cache(maxsize=4096)
def _gradient(
    kernel: Any, config: Config, rows: int, channels: int, programs: int, per_program: int,
    device: torch.device, grad: Layout, x: Layout, weight: Layout | None, for_x: bool,
    for_parameters: bool,
) -> Launcher:  # fmt: skip
    numbers = (x[0][0], rows, channels, per_program)
    return Launcher(kernel, programs, numbers, fitted(config, channels), config.options)
