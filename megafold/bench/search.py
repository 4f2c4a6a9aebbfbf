"""The best block sizes of every kernel of a case on this GPU, and the table they go into."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megafold.bench import tune
from megafold.bench.cases import Case
from megafold.bench.launches import Tunable, tunables
from megafold.bench.tune import Trial
from megafold.ops.tuning import Config, Entry, Found, read_table
from megafold.ops.tuning.config import device_slug
from megafold.ops.tuning.table import FOLDER

AGAIN = 3  # of the fastest candidates that are timed once more


@dataclass(frozen=True)
class Best:
    """The best configuration of one kernel, beside the one that was in force."""

    of: Tunable
    before: Found  # the configuration in force, and where it is from
    before_ms: float
    config: Config  # the fastest of all; that of before where no candidate beat it
    ms: float  # measured in turns with before_ms
    trials: tuple[Trial, ...]

    @property
    def kernel(self) -> str:
        return self.of.kernel

    @property
    def ran(self) -> int:
        """How many candidates ran, were right and did not spill."""
        return sum(trial.ms is not None for trial in self.trials)

    @property
    def gain(self) -> float:
        """How many times faster this kernel becomes."""
        return self.before_ms / self.ms

    @property
    def entry(self) -> Entry:
        """The best configuration as a row of a table."""
        return tune.entry(self.of, self.config)


def search(
    of: Case, device: torch.device, dtype: torch.dtype, *, workers: int, seconds: float = 0.2
) -> list[Best]:
    """Try every candidate of every kernel of a case, and measure the fastest of each again.

    A candidate's own time is that of a few runs among hundreds of candidates. So the fastest are
    timed once more in turns with the configuration in force. One replaces it only if it wins, and
    if with it the whole pass wins: what is done around a kernel may depend on its block sizes.

    Args:
        workers: processes that compile candidates beforehand.
        seconds: how long each is timed again.

    Raises:
        ValueError: the case launches no kernel with tables of block sizes.
    """
    found = tunables(of, dtype)
    tune.compile_candidates(of, found, device, dtype, workers)
    trials = list(tune.try_candidates(of, device, dtype, kernels=found))
    bench = tune.Bench(of, device, dtype)
    best = []
    for kernel, of_kernel in found.items():
        tried = tuple(trial for trial in trials if trial.kernel == kernel)
        before = of_kernel.in_force(device)
        configs = [before.config, *fastest(tried, before.config)]
        alone = bench.compare(kernel, configs, seconds)
        chosen = min(range(len(configs)), key=alone.__getitem__)
        if chosen:
            was, becomes = bench.compare_passes(kernel, [configs[0], configs[chosen]], seconds)
            chosen = chosen if becomes < was else 0
        best.append(Best(of_kernel, before, alone[0], configs[chosen], alone[chosen], tried))
    return best


def fastest(tried: Iterable[Trial], other_than: Config) -> list[Config]:
    """The configurations with the least times, fastest first."""
    ran = [trial for trial in tried if trial.ms is not None and trial.config != other_than]
    return [trial.config for trial in sorted(ran, key=lambda trial: trial.ms)[:AGAIN]]


def table_of(device: torch.device) -> Path:
    """The shipped table of a device; where there is none, its path to be.

    Raises:
        ValueError: the device shares another one's table, for which these times do not hold.
    """
    name = device_slug(device)
    own = FOLDER / f"{name}.json"
    for path in sorted(FOLDER.glob("*.json")):
        if path != own and name in read_table(path)[0]:
            raise ValueError(
                f"{path} holds the block sizes of {name} and of other devices; "
                f"take {name} out of its devices, or write another table with --table"
            )
    return own


def check_table(path: Path, device: torch.device) -> None:
    """Make sure, before a long search, that its results can go into the table at ``path``.

    Raises:
        PermissionError: nothing can be written there.
        ValueError: the file there is no table, or that of another device.
    """
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise PermissionError(
            f"{path} cannot be written: no new file can be made in {folder}; "
            "write another table with --table"
        )
    if path.exists():
        devices, _ = read_table(path)
        if device_slug(device) not in devices:
            raise ValueError(
                f"{path} is the table of {', '.join(devices)}, not of {device_slug(device)}"
            )


def add_to_table(path: Path, device: torch.device, new: Iterable[Entry]) -> None:
    """Write entries into a table, in place of those of the same kernel, bits and sizes."""
    devices, old = read_table(path) if path.exists() else ([device_slug(device)], [])
    tune.write_table(path, devices, tune.merged(old, new))
