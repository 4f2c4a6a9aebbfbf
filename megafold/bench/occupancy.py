"""How many programs of a kernel run on one multiprocessor at a time, from what it was compiled to.

More of them hide more of the time that memory takes; each takes its registers, its shared
memory and its threads from what the multiprocessor has.
"""

from __future__ import annotations

from dataclasses import dataclass

from megafold.bench.compile import TARGETS, Compiled

KIB = 1024
PARTS = 4  # of a multiprocessor (SIMDs of a compute unit), each with a quarter of the registers


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor of a chip has; AMD calls it a compute unit, shared memory LDS."""

    shared_per_program: int  # bytes of shared memory that one program may use
    shared: int  # bytes of it in all
    shared_step: int  # what a program gets is a multiple of this
    shared_reserved: int  # bytes that the driver keeps of it for each program
    registers: int  # of 32 bits
    registers_per_thread: int  # AMD: vector registers, accumulation registers included
    register_step: int  # what a thread gets is a multiple of this
    threads: int
    programs: int
    source: str


_CUDA = "CUDA C++ Programming Guide, technical specifications of compute capability"
_AMD = "LLVM's AMDGPU backend and the AMD Instinct MI200 and MI300 instruction set guides"

# By the names in ``compile.TARGETS``.
LIMITS: dict[str, Limits] = {
    "sm_80": Limits(163 * KIB, 164 * KIB, 128, KIB, 65536, 255, 8, 2048, 32, f"{_CUDA} 8.0"),
    "sm_90": Limits(227 * KIB, 228 * KIB, 128, KIB, 65536, 255, 8, 2048, 32, f"{_CUDA} 9.0"),
    "sm_100": Limits(227 * KIB, 228 * KIB, 128, KIB, 65536, 255, 8, 2048, 32, f"{_CUDA} 10.0"),
    "gfx90a": Limits(64 * KIB, 64 * KIB, 512, 0, 131072, 512, 8, 2048, 16, _AMD),
    "gfx942": Limits(64 * KIB, 64 * KIB, 512, 0, 131072, 512, 8, 2048, 16, _AMD),
}


@dataclass(frozen=True)
class Occupancy:
    """How full a multiprocessor gets."""

    programs: int  # at a time; 0 where not even one fits
    limited_by: str  # "registers", "shared memory", "threads" or "programs"
    share: float  # of the threads that there is room for


def occupancy(compiled: Compiled) -> Occupancy:
    """How many programs of a compiled kernel a multiprocessor of its target holds, and why."""
    limits = LIMITS[compiled.target]
    warp = TARGETS[compiled.target][2]
    per_warp = warp * _up(max(compiled.registers, 1), limits.register_step)
    warps = PARTS * (limits.registers // PARTS // per_warp)
    needed = _up(compiled.shared_bytes + limits.shared_reserved, limits.shared_step)
    fit = {  # the first of the least counts
        "threads": limits.threads // compiled.threads,
        "programs": limits.programs,
        "registers": warps * warp // compiled.threads,
        "shared memory": limits.shared // needed if needed else limits.programs,
    }
    if compiled.shared_bytes > limits.shared_per_program:
        fit["shared memory"] = 0
    limited_by = min(fit, key=lambda name: fit[name])
    programs = fit[limited_by]
    return Occupancy(programs, limited_by, programs * compiled.threads / limits.threads)


def too_large(compiled: Compiled) -> str:
    """Why a compiled kernel cannot run on its target, in a sentence; empty where it can."""
    limit = LIMITS[compiled.target].shared_per_program
    if compiled.shared_bytes <= limit:
        return ""
    return shortage("shared memory", compiled.shared_bytes, limit)


def shortage(resource: str, asked: int, available: int) -> str:
    """What a program asks for and does not get, in a sentence."""
    unit = "bytes of " if resource == "shared memory" else ""
    return (
        f"A program asks for {asked:,} {unit}{resource}, and {available:,} are available: "
        "take smaller blocks or fewer stages."
    )


def _up(number: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-number // step) * step
