"""Block sizes that are worth trying: what a search goes through, and what sliders offer.

An operator declares those of its kernels in ``candidates(kernel, bits)`` of its module
``candidates``; those of a kernel or of a block argument that nothing is declared of lie around the
default table's.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from megafold.ops.tuning.config import Config
from megafold.ops.tuning.table import DEFAULT, tables

SMALLEST_BLOCK = 16  # the least that tensor cores multiply
STAGES = (1, 2, 3)


@dataclass(frozen=True)
class Candidates:
    """The values worth trying of every choice there is for one kernel; all go with all."""

    blocks: Mapping[str, tuple[int, ...]]  # of every block argument, by name
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = STAGES
    registers: tuple[int | None, ...] = (None,)  # at most, per thread; NVIDIA only
    # Whether to try one, for the sizes that the kernel is looked up by.
    sensible: Callable[[Config, Mapping[str, int]], bool] = lambda config, sizes: True

    def configs(self, sizes: Mapping[str, int]) -> list[Config]:
        """Every combination that is sensible for a call of such sizes."""
        names = tuple(self.blocks)
        choices = itertools.product(
            itertools.product(*self.blocks.values()), self.warps, self.stages, self.registers
        )
        configs = (Config(dict(zip(names, sizes, strict=True)), *rest) for sizes, *rest in choices)
        return [config for config in configs if self.sensible(config, sizes)]


def per_thread(config: Config, *sides: int) -> float:
    """Numbers that a thread of an NVIDIA GPU holds of a tile with these sides."""
    return math.prod(sides) / (32 * config.num_warps)


def candidates(kernel: str, bits: int) -> Candidates:
    """What is worth trying for a kernel on operands of ``bits`` bits.

    Raises:
        ValueError: no such kernel has block sizes in tables.
    """
    names = block_names(kernel)
    module = f"megafold.ops.{kernel.partition('.')[0]}.candidates"
    if importlib.util.find_spec(module) is not None:
        declared = importlib.import_module(module).candidates(kernel, bits)
        if declared is not None:
            blocks = {**_around_default(kernel, bits).blocks, **declared.blocks}
            return replace(declared, blocks={name: blocks[name] for name in names})
    return _around_default(kernel, bits)


def block_names(kernel: str) -> tuple[str, ...]:
    """The block arguments of a kernel, as its configurations name them.

    Raises:
        ValueError: no such kernel has block sizes in tables.
    """
    for entry in tables()[DEFAULT]:
        if entry.kernel == kernel:
            return tuple(entry.blocks)
    raise ValueError(f"unknown kernel {kernel!r}; choose one of {kernels()}")


def kernels() -> tuple[str, ...]:
    """Every kernel that has block sizes in tables."""
    return tuple(dict.fromkeys(entry.kernel for entry in tables()[DEFAULT]))


def _around_default(kernel: str, bits: int) -> Candidates:
    """The default's sizes, half and twice of them; a switch, which is 0 or 1, both ways."""
    own = [entry for entry in tables()[DEFAULT] if entry.kernel == kernel]
    own = [entry for entry in own if entry.bits == bits] or own
    blocks = {}
    for name in own[0].blocks:
        shipped = {entry.blocks[name] for entry in own}
        least = SMALLEST_BLOCK if name.startswith("BLOCK") else 1
        near = {size * by // 2 for size in shipped for by in (1, 2, 4)}
        blocks[name] = (0, 1) if shipped <= {0, 1} else tuple(sorted(n for n in near if n >= least))
    warps = {4, 8} | {entry.num_warps for entry in own}
    stages = {*STAGES} | {entry.num_stages for entry in own}
    return Candidates(blocks, tuple(sorted(warps)), tuple(sorted(stages)))
