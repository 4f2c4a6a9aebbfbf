"""Configurations that were tried, as rows of CSV: what the kernel tuner replays without a GPU.

One file per device and operator, ``data/records/<device>/<op>_tuning.csv``; rows are only ever
appended. Rows of one run share one date::

    rows = tuning_records.rows(case, dtype, trials, "cuda")
    tuning_records.append(rows, records.folder(), records.device_name("cuda"))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from megafold.bench import rows as csv_rows
from megafold.bench.cases import Case
from megafold.bench.records import environment, folder
from megafold.ops.precision import name_of
from megafold.ops.tuning import Config

if TYPE_CHECKING:
    from megafold.bench.tune import Trial


@dataclass(frozen=True)
class TuningRecord:
    """One configuration of one kernel on one case, tried on one device."""

    op: str  # the operator of the case: "conditioned_transition"
    kernel: str  # what was tried of what it launches: "transition.forward"
    shape: str  # the case's key: "B1 S384 N384 H4 D32"
    dtype: str  # "float32", "tf32" (float32 with products in TF32), "bfloat16", "float16"
    blocks: str  # the kernel's block arguments: "ROWS 1 BLOCK_Q 64 BLOCK_K 64"
    num_warps: int
    num_stages: int
    max_registers: int | None  # None: as the compiler likes
    ms: float | None  # median milliseconds; None where it did not run, was wrong, or spilt
    note: str  # why there is no time
    device: str  # in words: "NVIDIA H200"
    revision: str  # of this project: commit, with "+" where files were changed
    date: str  # when the run began, UTC, ISO 8601

    SUFFIX: ClassVar[str] = "_tuning"

    def __post_init__(self) -> None:
        if self.ms is None and not self.note:
            raise ValueError(f"a trial of {self.kernel} without a time needs a note that says why")
        blocks_of(self.blocks)

    @property
    def config(self) -> Config:
        """The configuration, as ``megafold.ops.use_config`` takes it."""
        return Config(blocks_of(self.blocks), self.num_warps, self.num_stages, self.max_registers)


COLUMNS = csv_rows.columns(TuningRecord)


def rows(
    of: Case, dtype: torch.dtype, trials: Iterable[Trial], device: torch.device | str
) -> list[TuningRecord]:
    """What was tried now, on this device, as rows of one date.

    Args:
        of: the case that was tried.
        trials: of :func:`megafold.bench.tune.try_candidates` or ``try_config``.
    """
    around = environment(device)
    return [
        TuningRecord(
            op=of.op,
            kernel=trial.kernel,
            shape=of.shape,
            dtype=name_of(dtype, torch.device(device)),
            blocks=blocks_text(trial.config.blocks),
            num_warps=trial.config.num_warps,
            num_stages=trial.config.num_stages,
            max_registers=trial.config.max_registers,
            ms=trial.ms,
            note=trial.note,
            device=around.device,
            revision=around.revision,
            date=around.date,
        )
        for trial in trials
    ]


def append(records: Iterable[TuningRecord], root: Path | str, device: str) -> list[Path]:
    """Append rows to ``root/<device>/<op>_tuning.csv``; see ``megafold.bench.rows.append``."""
    return csv_rows.append(TuningRecord, records, root, device)


def read(root: Path | str, device: str | None = None, op: str | None = None) -> list[TuningRecord]:
    """All rows below ``root``, of one device and operator where given; see ``rows.read``."""
    return csv_rows.read(TuningRecord, root, device, op)


def stored(of: Case, dtype: torch.dtype) -> list[TuningRecord]:
    """The checkout's rows of a case in one dtype, of every device: the last of each configuration.

    Raises:
        FileNotFoundError: not a checkout.
    """
    name = name_of(dtype)
    latest: dict[tuple[object, ...], TuningRecord] = {}
    for r in sorted(read(folder(), op=of.op), key=lambda r: r.date):
        if (r.shape, r.dtype) == (of.shape, name):
            options = (r.num_warps, r.num_stages, r.max_registers)
            latest[(r.kernel, r.blocks, *options, r.device)] = r
    return list(latest.values())


def blocks_text(blocks: Mapping[str, int]) -> str:
    """Block arguments in words: ``"BLOCK_Q 64 BLOCK_K 32"``."""
    return " ".join(f"{name} {size}" for name, size in blocks.items())


def blocks_of(text: str) -> dict[str, int]:
    """Block arguments from what :func:`blocks_text` makes of them.

    Raises:
        ValueError: it is nothing of the kind.
    """
    words = text.split()
    if not words or len(words) % 2:
        raise ValueError(f'blocks must be names and sizes, like "BLOCK_Q 64", not {text!r}')
    return {name: int(size) for name, size in zip(words[::2], words[1::2], strict=True)}
