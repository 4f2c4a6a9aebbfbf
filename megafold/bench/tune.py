"""Try block sizes of a case's kernels on this GPU, and write the best as a table."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from megafold.atomic import atomic_write
from megafold.bench import accuracy, measure
from megafold.bench.cases import Case, case
from megafold.bench.launches import Pass, Tunable, distinct_candidates, tunable
from megafold.bench.occupancy import shortage
from megafold.ops.precision import TF32, adopt, name_of, precision_of
from megafold.ops.recording import Launch
from megafold.ops.tuning import Config, Entry, use_config

# How far results may be from those of the configuration in force, relative: another order of
# sums moves 16-bit numbers by some spacings, sums of fp32 over many rows by far more of theirs.
TOLERANCE = 2e-4  # of fp32
SPACINGS = 8  # of numbers of fewer bits, those of fp32 in TF32 included
TF32_SPACING = 2**-10


@dataclass(frozen=True)
class Trial:
    """One configuration of one kernel, tried."""

    kernel: str
    config: Config
    ms: float | None  # median; None where it did not run, was wrong, or spilt
    note: str = ""  # why there is no time


class Bench:
    """A case on a device, whose kernels are tried one by one.

    A configuration is right if the whole pass, forward and backward, gives with it the output
    and the gradients that it gives with those in force. What is timed is the kernel alone: all
    its launches of one pass, again.
    """

    def __init__(self, of: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.whole = Pass(of, device, dtype)
        self.right, launched = self.whole.launched()
        kept = (*self.whole.inputs.values(), self.whole.grad, *self.right.values())
        self._kept = {t.untyped_storage().data_ptr() for t in kept if t is not None}
        self._spoil(launched)

    def launches(self, kernel: str, config: Config) -> list[Launch]:
        """Every launch of a kernel in one pass with a configuration."""
        with use_config(kernel, config):
            _, launched = self.whole.launched()
        return [one for one in launched if one.kernel == kernel]

    def attempt(self, kernel: str, config: Config, seconds: float) -> Trial:
        """Run, check and time one configuration; wrong results and spills have no time."""
        try:
            with use_config(kernel, config):
                results, launched = self.whole.launched()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except OutOfResources as error:
            why = shortage(error.name, error.required, error.limit)
            return Trial(kernel, config, None, why)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            return Trial(kernel, config, None, reason)
        own = [one for one in launched if one.kernel == kernel]
        note = _spills(own) or self._difference(results)
        ms = None
        if not note:
            ms = measure.time_call(again(own), self.device, seconds=seconds, min_repeats=7).ms
        self._spoil(launched, results.values())
        return Trial(kernel, config, ms, note)

    def compare(self, kernel: str, configs: Iterable[Config], seconds: float) -> list[float]:
        """Milliseconds of a kernel with each configuration, measured in turns."""
        calls = [again(self.launches(kernel, config)) for config in configs]
        return [t.ms for t in measure.time_in_turns(calls, self.device, seconds=seconds)]

    def compare_passes(self, kernel: str, configs: Iterable[Config], seconds: float) -> list[float]:
        """Milliseconds of the whole pass with each configuration of a kernel, in turns."""
        calls = [self._pass_with(kernel, config) for config in configs]
        return [t.ms for t in measure.time_in_turns(calls, self.device, seconds=seconds)]

    def _pass_with(self, kernel: str, config: Config) -> Callable[[], object]:
        def call() -> object:
            with use_config(kernel, config):
                return self.whole()

        return call

    def _difference(self, results: accuracy.Results) -> str:
        """Where results are not those of the configuration in force, in words."""
        for name, value in results.items():
            error, _ = accuracy.relative_errors(value, self.right[name].double())
            if error > _allowed(value):
                return f"wrong: {name} differs by {error:.1e}"
        return ""

    @torch.no_grad()
    def _spoil(self, launched: Iterable[Launch], results: Iterable[torch.Tensor] = ()) -> None:
        """Leave no right result in memory that the next run gets, and perhaps fails to write."""
        for t in (*results, *(t for one in launched for t in one.tensors)):
            if t is not None and t.untyped_storage().data_ptr() not in self._kept:
                memory = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
                memory.fill_(float("nan") if t.is_floating_point() else 0)


def _allowed(value: torch.Tensor) -> float:
    if precision_of(value.dtype, value.device) == TF32:
        return SPACINGS * TF32_SPACING
    if value.dtype == torch.float32:
        return TOLERANCE
    return SPACINGS * torch.finfo(value.dtype).eps


def again(launched: Iterable[Launch]) -> Callable[[], None]:
    """What launches kernels once more."""
    launched = list(launched)

    def call() -> None:
        for one in launched:
            one.again()

    return call


def _spills(launched: Iterable[Launch]) -> str:
    spilt = max((getattr(one.compiled, "n_spills", 0) for one in launched), default=0)
    return f"{spilt} registers spilt" if spilt else ""


def compile_candidates(
    of: Case, kernels: Iterable[str], device: torch.device, dtype: torch.dtype, workers: int
) -> None:
    """Fill Triton's cache with every candidate, several processes at a time.

    What does not compile here fails again, with its reason, when it is tried.
    """
    work = [
        (of.op, of.shape, str(device), name_of(dtype, device), kernel, share, workers)
        for kernel in kernels
        for share in range(workers)
    ]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_compile_share, work, chunksize=1)


def _compile_share(work: tuple[str, str, str, str, str, int, int]) -> None:
    op, shape, device_name, operands, kernel, share, workers = work
    device, dtype, of = torch.device(device_name), adopt(operands), case(op, shape)
    whole = Pass(of, device, dtype, zeros=True)
    for config in distinct_candidates(of, kernel, dtype)[share::workers]:
        try:
            with use_config(kernel, config):
                whole()
        except Exception:  # tried again, and reported, by `Bench.attempt`
            continue


def try_candidates(
    of: Case,
    device: torch.device,
    dtype: torch.dtype,
    *,
    kernels: Iterable[str],
    seconds: float = 0.02,
) -> Iterator[Trial]:
    """Run every candidate of some kernels of a case."""
    bench = Bench(of, device, dtype)
    for kernel in kernels:
        for config in distinct_candidates(of, kernel, dtype):
            yield bench.attempt(kernel, config, seconds)


def try_config(
    of: Case,
    kernel: str,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    *,
    seconds: float = 0.2,
) -> Trial:
    """Run one configuration of one kernel, as :func:`try_candidates` runs each.

    Raises:
        ValueError: the case does not launch this kernel.
    """
    tunable(of, kernel, dtype)
    return Bench(of, device, dtype).attempt(kernel, config, seconds)


def entry(of: Tunable, config: Config) -> Entry:
    """A configuration of a kernel as a row of a table, at the sizes it is looked up by."""
    return Entry(
        of.kernel, of.bits, dict(of.sizes[0]), dict(config.blocks), config.num_warps,
        config.num_stages, config.max_registers,
    )  # fmt: skip


def merged(old: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """Entries with those of the same kernel, bits and sizes replaced by new ones."""
    by_key = {(e.kernel, e.bits, tuple(sorted(e.sizes.items()))): e for e in (*old, *new)}
    return list(by_key.values())


def write_table(path: Path | str, devices: Iterable[str], entries: Iterable[Entry]) -> None:
    """Write a table, one line for each entry, in one step."""
    ordered = sorted(entries, key=lambda e: (e.kernel, e.bits, *sorted(e.sizes.items())))
    lines = ",\n".join(f"    {json.dumps(asdict(entry))}" for entry in ordered)
    text = f'{{\n  "devices": {json.dumps(list(devices))},\n  "entries": [\n{lines}\n  ]\n}}\n'
    atomic_write(Path(path), text.encode())
