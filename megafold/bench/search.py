"""The best block sizes of every kernel of a case on this GPU, and the table they go into."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megafold.bench import measure, tune
from megafold.bench.cases import Case
from megafold.ops.evo_attention import launch
from megafold.ops.tuning import Config, Entry, Found, read_table, use_config
from megafold.ops.tuning.config import device_slug
from megafold.ops.tuning.table import FOLDER


@dataclass(frozen=True)
class Best:
    """The best configuration of one kernel, beside the one that was in force."""

    kernel: str
    before: Found  # the configuration in force, and where it is from
    before_ms: float
    config: Config  # the fastest of all; that of before where no candidate beat it
    ms: float  # measured in turns with before_ms
    trials: tuple[tune.Trial, ...]

    @property
    def ran(self) -> int:
        """How many candidates ran, were right and did not spill."""
        return sum(trial.ms is not None for trial in self.trials)

    @property
    def gain(self) -> float:
        """How many times faster this kernel becomes."""
        return self.before_ms / self.ms


def search(
    of: Case, device: torch.device, dtype: torch.dtype, *, workers: int, seconds: float = 0.2
) -> list[Best]:
    """Try every candidate of every kernel of a case, and measure the fastest of each again.

    A candidate's own time is that of a few runs among hundreds of candidates. So the fastest is
    timed once more in turns with the configuration in force, and replaces it only if it wins.

    Args:
        workers: processes that compile candidates beforehand.
        seconds: how long each of the two is timed.

    Raises:
        ValueError: the case is of an operator that has no tables.
    """
    kernels = [run.kernel for run in tune.runs(of, device, dtype)]
    tune.compile_candidates(of, kernels, device, dtype, workers)
    trials = list(tune.try_candidates(of, device, dtype, kernels=kernels))
    found = []
    for run in tune.runs(of, device, dtype):
        run.call()  # later kernels read what this one wrote
        tried = tuple(trial for trial in trials if trial.kernel == run.kernel)
        before = in_force(of, run.kernel, device, dtype)
        fastest = min(
            (trial for trial in tried if trial.ms is not None), key=lambda t: t.ms, default=None
        )
        configs = [before.config]
        if fastest is not None and fastest.config != before.config:
            configs.append(fastest.config)
        timings = measure.time_in_turns([_with(run, c) for c in configs], device, seconds=seconds)
        times = [timing.ms for timing in timings]
        best = times.index(min(times))
        found.append(Best(run.kernel, before, times[0], configs[best], times[best], tried))
    return found


def in_force(of: Case, kernel: str, device: torch.device, dtype: torch.dtype) -> Found:
    """The configuration a kernel runs a case with now, and where it is from."""
    q, k, bias = (
        torch.empty(of.arguments[name].shape, device="meta") for name in ("q", "k", "pair_bias")
    )
    return launch.config_of(kernel, launch.Problem.of(q, k, bias), device, dtype)


def _with(run: tune.KernelRun, config: Config) -> Callable[[], object]:
    def call() -> object:
        with use_config(run.kernel, config):
            return run.call()

    return call


def entries(found: Iterable[Best], of: Case, dtype: torch.dtype) -> list[Entry]:
    """The best configurations of a case as rows of a table."""
    return [tune.entry(tune.Trial(best.kernel, best.config, best.ms), of, dtype) for best in found]


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
                f"take {name} out of its devices, or write another table with --out"
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
            "write another table with --out"
        )
    if path.exists():
        devices, _ = read_table(path)
        if device_slug(device) not in devices:
            raise ValueError(
                f"{path} is the table of {', '.join(devices)}, not of {device_slug(device)}"
            )


def add_to_table(path: Path, device: torch.device, new: Iterable[Entry]) -> None:
    """Write entries into a table, in place of those of the same kernel, width in bits and sizes."""
    devices, old = read_table(path) if path.exists() else ([device_slug(device)], [])
    tune.write_table(path, devices, tune.merged(old, new))
