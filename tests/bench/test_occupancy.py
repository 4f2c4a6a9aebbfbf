"""Programs per multiprocessor, against figures that others measured or the vendors state."""

from __future__ import annotations

import pytest

from megafold.bench.compile import TARGETS, Compiled
from megafold.bench.occupancy import LIMITS, Occupancy, occupancy, too_large


def compiled(target: str, *, registers: int = 32, shared: int = 0, threads: int = 128) -> Compiled:
    return Compiled("kernel", target, TARGETS[target][3], registers, 0, shared, threads)


def test_every_target_has_limits_with_their_source():
    assert set(LIMITS) == set(TARGETS)
    assert all(limits.source for limits in LIMITS.values())


@pytest.mark.parametrize(
    ("registers", "programs"),
    [(64, 8), (65, 7), (128, 4), (129, 3), (168, 3), (169, 2), (255, 2)],
)
def test_registers_of_nvidia_bound_the_warps_of_each_quarter(registers, programs):
    """65,536 registers: 16 warps of 128 registers, 12 of 168; CUDA's occupancy calculator."""
    assert occupancy(compiled("sm_90", registers=registers)) == Occupancy(
        programs, "registers", programs * 128 / 2048
    )


@pytest.mark.parametrize(
    ("kilobytes", "programs"), [(227, 1), (113, 2), (114, 1), (75, 3), (56, 4), (0, 16)]
)
def test_shared_memory_of_nvidia_counts_the_kilobyte_that_the_driver_keeps(kilobytes, programs):
    found = occupancy(compiled("sm_90", shared=kilobytes * 1024))
    assert found.programs == programs
    assert found.limited_by == ("shared memory" if kilobytes else "threads")


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "share"),
    [
        (136, 256, 0, 0.375),  # three waves for each SIMD
        (104, 256, 0, 0.5),
        (100, 256, 0, 0.5),  # as 104: registers come by eight
        (176, 384, 0, 0.1875),  # eight waves, six for each program
        (8, 320, 0, 0.9375),  # six programs of five waves in 32 places
        (8, 256, 32768, 0.25),
        (8, 256, 13000, 0.5),  # as 13,312: shared memory comes by 512 bytes
    ],
)
def test_amd_as_measured_on_an_mi300x(registers, threads, shared, share):
    """hipOccupancyMaxActiveBlocksPerMultiprocessor, as OpenXLA's tests state it."""
    found = occupancy(compiled("gfx942", registers=registers, threads=threads, shared=shared))
    assert found.share == share


def test_a_program_that_asks_for_too_much_shared_memory_does_not_run():
    assert occupancy(compiled("sm_80", shared=164 * 1024)) == Occupancy(0, "shared memory", 0.0)
    assert occupancy(compiled("gfx90a", shared=64 * 1024)).programs == 1


def test_small_programs_are_bound_by_their_number():
    assert occupancy(compiled("sm_90", threads=32)) == Occupancy(32, "programs", 0.5)


def test_what_is_too_large_is_a_sentence_with_bytes_asked_and_available():
    assert too_large(compiled("sm_90", shared=1_053_184)) == (
        "A program asks for 1,053,184 bytes of shared memory, and 232,448 are available: "
        "take smaller blocks or fewer stages."
    )
    assert too_large(compiled("sm_90", shared=232_448)) == ""
