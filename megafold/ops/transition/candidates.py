"""Block sizes of the transition that are worth trying."""

from __future__ import annotations

from megafold.ops.transition import launch
from megafold.ops.tuning.candidates import Candidates


def candidates(kernel: str, bits: int) -> Candidates | None:
    """What is worth trying for a kernel; they multiply operands of 16 bits only."""
    if kernel == launch.FORWARD:
        blocks = {"BLOCK_M": (32, 64, 128), "BLOCK_H": (16, 32, 64, 128)}
        return Candidates(blocks, stages=(1, 2, 3, 4))
    if kernel == launch.GRAD_ROWS:
        return Candidates({"BLOCK_M": (32, 64, 128), "BLOCK_H": (16, 32, 64)})
    if kernel == launch.GRAD_WEIGHTS:
        blocks = {"BLOCK_U": (32, 64, 128), "BLOCK_K": (32, 64), "WAVES": (1, 2, 4)}
        return Candidates(blocks, stages=(2, 3, 4))
    return None
