"""The transition on Hopper GPUs: when gradients of weights come from a kernel of their own.

The kernel (:mod:`~megafold.ops.transition.hopper_weights`) is written in Gluon, which compiles for
this chip alone. What it does not take, that of :mod:`~megafold.ops.transition.weights` does.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch

from megafold.ops.hopper import Box, box, described, is_hopper
from megafold.ops.launcher import Launcher, on
from megafold.ops.sizes import cdiv, multiprocessors
from megafold.ops.tuning import is_overridden

CHANNELS = 128
SLICE = 256  # hidden columns of a program
TILE = 64  # rows of a product
FEWEST_ROWS = 16_384
REGISTERS = 216
HALVES = (torch.float16, torch.bfloat16)


@cache
def has_gluon() -> bool:
    """Whether this Triton has what the kernel is written in."""
    try:
        from megafold.ops.transition import hopper_weights  # noqa: F401
    except (ImportError, AttributeError, TypeError):
        return False
    return True


def why_not(problem: Any, device: torch.device, dtype: torch.dtype, kernel: str) -> str:
    """Why gradients of weights are not by this kernel, in words; empty where they are.

    Args:
        dtype: of the weights.
        kernel: that which runs otherwise.
    """
    if not is_hopper(device):
        return "not a Hopper GPU"
    if is_overridden(kernel):
        return "use_config has another kernel in force"
    if dtype not in HALVES or problem.channels != CHANNELS:
        return f"not {CHANNELS} channels of 16 bits"
    if problem.hidden % SLICE:
        return f"{problem.hidden} hidden units, no multiple of {SLICE}"
    if problem.rows < FEWEST_ROWS:
        return f"fewer than {FEWEST_ROWS} rows"
    return "" if has_gluon() else "this Triton has no Gluon for it"


def splits_of(hidden: int, longest: int, device: torch.device) -> int:
    """Splits of the rows of a chunk, each a program for each slice of hidden columns."""
    return max(1, min(multiprocessors(device) // (3 * hidden // SLICE), cdiv(longest, TILE)))


def launch(hidden, normalised, grad, partial, first: bool) -> Any:
    """Fill ``partial``, or add to it where this is not the ``first`` chunk of rows."""
    tile = _tile(hidden.dtype)
    launcher = _launcher(*hidden.shape, partial.shape[0], hidden.dtype, hidden.device, first)
    with on(hidden.device):
        return launcher(*(described(t, tile) for t in (hidden, normalised, grad)), partial)


@cache
def _tile(dtype: torch.dtype) -> Box:
    from triton.experimental.gluon import language as gl

    return box((TILE, CHANNELS), gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


@lru_cache(maxsize=1024)
def _launcher(
    rows: int, width: int, splits: int, dtype: torch.dtype, device: torch.device, first: bool
) -> Launcher:
    from triton.experimental.gluon import language as gl

    from megafold.ops.transition.hopper_weights import hopper_weights_kernel

    constants = {
        "FIRST": first,
        "REGISTERS": REGISTERS,
        "HALVES": gl.NVMMASharedLayout(128, 16, rank=2),
    }
    numbers = (rows, width // 3, TILE * cdiv(rows, TILE * splits))
    programs = splits * (width // SLICE)
    return Launcher(hopper_weights_kernel, programs, numbers, constants, {"num_warps": 4})
