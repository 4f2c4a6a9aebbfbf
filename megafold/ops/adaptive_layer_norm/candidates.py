"""Block sizes of adaptive LayerNorm that are worth trying."""

from __future__ import annotations

from megafold.ops.adaptive_layer_norm import launch
from megafold.ops.layer_norm.candidates import by_rows
from megafold.ops.tuning.candidates import Candidates


def candidates(kernel: str, bits: int) -> Candidates | None:
    """What is worth trying for a kernel, whatever its operands."""
    known = {launch.MODULATE: False, launch.GRADIENT: True, launch.GRADIENT_ROWS: True}
    return by_rows(known[kernel]) if kernel in known else None
