"""Triangle multiplication on Hopper GPUs: when kernels of its own run.

They are written in Gluon, Triton's language of layouts and warps with roles, which compiles for
this chip alone. What they do not take, those of ``forward``, ``backward`` and ``weights`` do.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from megafold.ops.hopper import HALVES, is_hopper
from megafold.ops.tuning import is_overridden

CHANNELS = 128
FEWEST_PAIRS = 32_768  # of 64,800 and more they were measured to be faster; of fewer none were


@cache
def has_gluon() -> bool:
    """Whether this Triton has what the kernels are written in."""
    try:
        from megafold.ops.triangle_multiplication import (  # noqa: F401
            hopper_backward,
            hopper_forward,
            hopper_weights,
        )
    except (ImportError, AttributeError, TypeError):
        return False
    return True


def why_not(problem: Any, z: torch.Tensor, dtype: torch.dtype, kernel: str) -> str:
    """Why a kernel is not Hopper's, in words; empty where it is.

    Decided from what `explain` knows too; a call may yet be laid out in memory in a way that TMA
    does not read (:func:`megafold.ops.hopper.readable`).

    Args:
        dtype: of the weights.
        kernel: that which runs otherwise.
    """
    if not is_hopper(z.device):
        return "not a Hopper GPU"
    if is_overridden(kernel):
        return "use_config has another kernel in force"
    if dtype not in HALVES or z.dtype != dtype:
        return "operands that are not all of one dtype of 16 bits"
    if problem.channels != CHANNELS:
        return f"{problem.channels} channels, not {CHANNELS}"
    if problem.pairs % 8:
        return f"{problem.pairs} pairs, no multiple of 8"
    if problem.pairs < FEWEST_PAIRS:
        return f"fewer than {FEWEST_PAIRS} pairs"
    return "" if has_gluon() else "this Triton has no Gluon for it"
