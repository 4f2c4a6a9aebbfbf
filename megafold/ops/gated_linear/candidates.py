"""Block sizes of the gated linear layer that are worth trying."""

from __future__ import annotations

from megafold.ops.gated_linear import launch
from megafold.ops.tuning.candidates import Candidates


def candidates(kernel: str, bits: int) -> Candidates | None:
    """What is worth trying for a kernel; in 16 bits a forward program holds all outputs."""
    if bits != 16:
        return None
    if kernel == launch.FORWARD:
        waves = (2, 4, 8, 16, 1024)  # the last: a program for each block of rows
        return Candidates({"BLOCK_M": (32, 64, 128), "BLOCK_O": (128,), "WAVES": waves})
    if kernel == launch.BACKWARD:
        blocks = {"BLOCK_M": (32, 64, 128), "BLOCK_C": (32, 64, 128), "WAVES": (1, 2, 4)}
        return Candidates(blocks)
    return None
