"""Block sizes of the kernels on whole rows that are worth trying."""

from __future__ import annotations

from collections.abc import Mapping

from megafold.ops.layer_norm import launch
from megafold.ops.tuning import Config
from megafold.ops.tuning.candidates import Candidates, per_thread

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)  # more rows of few channels, fewer of many
TILE_REGISTERS = (4, 32)  # of a thread, for one tile of rows: two or three are there at a time
WAVES = (1, 2, 4, 8)  # programs per multiprocessor, whose sums are added up afterwards


def by_rows(waves: bool) -> Candidates:
    """For a kernel that reads rows once: nothing to be read ahead, so there is one stage.

    Args:
        waves: whether its programs add up rows.
    """
    blocks = {"ROWS": ROWS, "WAVES": WAVES} if waves else {"ROWS": ROWS}
    return Candidates(blocks, warps=(1, 2, 4, 8), stages=(1,), sensible=_fills_registers)


def _fills_registers(config: Config, sizes: Mapping[str, int]) -> bool:
    low, high = TILE_REGISTERS
    return low <= per_thread(config, config.blocks["ROWS"], sizes["C"]) <= high


def candidates(kernel: str, bits: int) -> Candidates | None:
    """What is worth trying for a kernel, whatever its operands."""
    known = {launch.NORMALISE: False, launch.GRADIENT: True}
    return by_rows(known[kernel]) if kernel in known else None
