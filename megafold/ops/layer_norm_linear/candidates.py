"""Block sizes of LayerNorm + Linear that are worth trying."""

from __future__ import annotations

from megafold.ops.layer_norm_linear import launch
from megafold.ops.tuning.candidates import Candidates


def candidates(kernel: str, bits: int) -> Candidates | None:
    """What is worth trying for a kernel; they multiply operands of 16 bits only."""
    if kernel == launch.FORWARD:
        return Candidates({"BLOCK_M": (32, 64, 128), "BLOCK_O": (32, 64, 128), "HELD": (0, 1)})
    if kernel == launch.BACKWARD:
        return Candidates({"BLOCK_M": (16, 32, 64), "WAVES": (1, 2, 4), "SHARED": (0, 1)})
    if kernel == launch.GRAD_X:
        return Candidates({"BLOCK_M": (32, 64, 128), "BLOCK_O": (32, 64, 128), "WAVES": (1, 2)})
    if kernel == launch.PRODUCT:
        return Candidates(
            {
                "BLOCK_M": (32, 64, 128),
                "BLOCK_O": (64, 128, 256),
                "WAVES": (1, 2),
                "SHARED": (0, 1),
            }
        )
    return None
