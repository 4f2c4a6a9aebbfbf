"""Block sizes of the gate that are worth trying."""

from __future__ import annotations

from collections.abc import Mapping

from megafold.ops.gated import launch
from megafold.ops.tuning import Config
from megafold.ops.tuning.candidates import Candidates, per_thread

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
TILE_REGISTERS = (4, 32)  # of a thread, for one tile of rows: two or three are there at a time


def candidates(kernel: str, bits: int) -> Candidates | None:
    """What is worth trying for a kernel: nothing to be read ahead, so there is one stage."""
    if kernel not in launch.KERNELS:
        return None
    blocks = {"ROWS": ROWS, "BLOCK_C": (64, 128, 256, 512)}
    return Candidates(blocks, warps=(1, 2, 4, 8), stages=(1,), sensible=_fills_registers)


def _fills_registers(config: Config, sizes: Mapping[str, int]) -> bool:
    low, high = TILE_REGISTERS
    block = min(config.blocks["BLOCK_C"], sizes["C"])
    return low <= per_thread(config, config.blocks["ROWS"], block) <= high
