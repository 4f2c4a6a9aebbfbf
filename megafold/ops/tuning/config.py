"""Which block sizes a kernel runs with: an override, the table of the device, or the default."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from megafold.ops.tuning.table import DEFAULT, Entry, measured_on, tables

Sizes = tuple[tuple[str, int], ...]  # ordered, so that they can be looked up quickly


@dataclass(frozen=True)
class Config:
    """Block sizes of one kernel, and how Triton compiles it."""

    blocks: Mapping[str, int]  # the kernel's block arguments by name, such as BLOCK_Q
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread, NVIDIA only: more programs at a time

    def __hash__(self) -> int:
        return hash((frozenset(self.blocks.items()), self.num_warps, self.num_stages))

    @property
    def options(self) -> dict[str, int]:
        """What a kernel's launch takes besides its arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options

    def __str__(self) -> str:
        blocks = " ".join(f"{name} {size}" for name, size in self.blocks.items())
        limit = "" if self.max_registers is None else f" registers {self.max_registers}"
        return f"{blocks} warps {self.num_warps} stages {self.num_stages}{limit}"


@dataclass(frozen=True)
class Found:
    """A configuration and where it comes from, in words."""

    config: Config
    source: str


class Asked(NamedTuple):
    """What a call looked up: the block sizes of one kernel."""

    kernel: str
    bits: int
    sizes: Sizes


# Process-wide: the backward pass runs in threads of its own and must see the same.
_overrides: dict[str, Config] = {}
_listening: list[list[Asked]] = []


@contextmanager
def use_config(kernel: str, config: Config) -> Iterator[None]:
    """Run one kernel with these block sizes, whatever the tables say; for the whole process.

    Holds in backward passes that begin inside. Raises nothing by itself: a configuration that
    does not fit the GPU fails in the call, with Triton's ``OutOfResources``.

    Args:
        kernel: ``"evo_attention.forward"`` and the like; ``megafold.ops.explain`` names them.
        config: every block argument of that kernel.
    """
    before = _overrides.get(kernel)
    _overrides[kernel] = config
    try:
        yield
    finally:
        if before is None:
            _overrides.pop(kernel, None)
        else:
            _overrides[kernel] = before


def is_overridden(*kernels: str) -> bool:
    """Whether ``use_config`` is in force for one of these kernels."""
    return any(kernel in _overrides for kernel in kernels)


def reset_configs() -> None:
    """Forget every override, those of ``use_config`` blocks that are still open too."""
    _overrides.clear()


@contextmanager
def lookups() -> Iterator[list[Asked]]:
    """Every look-up inside, in order, also by a backward pass; for the whole process."""
    asked: list[Asked] = []
    _listening.append(asked)
    try:
        yield asked
    finally:
        _listening[:] = [other for other in _listening if other is not asked]


def lookup(kernel: str, device: torch.device, bits: int, sizes: Sizes) -> Found:
    """The configuration a kernel runs with, and where it is from.

    Args:
        bits: of an operand, as it is multiplied: 16, 32, or 19 for fp32 in TF32
            (``megafold.ops.precision.bits_of``).
        sizes: name and number; the first must agree with an entry's, and of those entries the
            one nearest in the others counts (by ratios).

    Raises:
        LookupError: no table has the kernel at this first size.
    """
    for asked in _listening:
        asked.append(Asked(kernel, bits, sizes))
    override = _overrides.get(kernel)
    if override is not None:
        return Found(override, "use_config")
    return _from_tables(kernel, device_slug(device), bits, sizes)


@lru_cache(maxsize=4096)
def _from_tables(kernel: str, device: str, bits: int, sizes: Sizes) -> Found:
    (key, wanted), *others = sizes
    origin = measured_on().get(device, device)
    own = f"table of {device}" if origin == device else f"table of {origin}, taken for {device}"
    for name, source in ((device, own), (DEFAULT, "safe default")):
        entries = [
            entry
            for entry in tables().get(name, [])
            if (entry.kernel, entry.bits, entry.sizes.get(key)) == (kernel, bits, wanted)
        ]
        if entries:
            best = min(entries, key=lambda entry: _distance(entry, others))
            measured = [f"{n} {best.sizes[n]}" for n, _ in sizes if n in best.sizes]
            config = Config(dict(best.blocks), best.num_warps, best.num_stages, best.max_registers)
            return Found(config, f"{source}, {' '.join(measured)}")
    raise LookupError(f"no block sizes for {kernel} with {key} = {wanted} at {bits} bits")


def _distance(entry: Entry, others: list[tuple[str, int]]) -> float:
    return sum(
        abs(math.log2(max(size, 1) / max(entry.sizes[name], 1)))
        for name, size in others
        if name in entry.sizes
    )


@lru_cache(maxsize=64)
def device_slug(device: torch.device) -> str:
    """The name of a device in the tables: ``"nvidia-h200"``, ``"cpu"``."""
    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device).lower()
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")
