"""What the smooth lDDT costs, measured."""

from __future__ import annotations

from megafold.bench.accuracy import FACTOR
from megafold.bench.smooth_lddt import smooth_lddt_costs


def test_blocks_take_less_memory_than_the_formula_and_are_as_accurate():
    ours, eager = smooth_lddt_costs(8, 900, "cpu", seconds=0.0)
    assert (ours.op, ours.shape, ours.impl) == ("smooth_lddt", "S8 A900", "megafold")
    assert eager.impl == "eager"
    assert eager.peak_mb > 4 * 8 * 900 * 900 / 1e6  # at least one tensor over copies and pairs
    assert ours.peak_mb < eager.peak_mb / 2
    assert ours.error <= FACTOR * eager.error
