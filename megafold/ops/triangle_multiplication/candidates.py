"""Block sizes of triangle multiplication that are worth trying."""

from __future__ import annotations

from collections.abc import Mapping

from megafold.ops.triangle_multiplication import launch
from megafold.ops.tuning import Config
from megafold.ops.tuning.candidates import Candidates, per_thread


def candidates(kernel: str, bits: int) -> Candidates | None:
    """What is worth trying for a kernel on operands of ``bits`` bits."""
    if kernel not in launch.KERNELS:
        return None
    of_weights = kernel in launch.OF_WEIGHTS
    waves = {"WAVES": (1, 2)} if of_weights else {}
    if bits == 16:
        # A program holds BLOCK_O rows of two weights and of their gradients: few pairs beside.
        pairs = (32, 64) if of_weights else (32, 64, 128)
        outputs = (32, 64, 128) if of_weights else (16, 32, 64, 128)
        blocks = {"BLOCK_M": pairs, "BLOCK_O": outputs, **waves}
        return Candidates(blocks, sensible=_leaves_registers)
    # fp32 products go through the registers of every thread: small tiles.
    return Candidates({"BLOCK_M": (16, 32), "BLOCK_O": (16, 32), **waves}, stages=(1, 2))


def _leaves_registers(config: Config, sizes: Mapping[str, int]) -> bool:
    """Several tiles of pairs are held at a time; one alone must not take the registers."""
    return per_thread(config, config.blocks["BLOCK_M"], config.blocks["BLOCK_O"]) <= 32
