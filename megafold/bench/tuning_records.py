"""Configurations that were tried, as rows of CSV: what the kernel tuner replays without a GPU.

One file per device and operator, ``data/records/<device>/<op>_tuning.csv``; rows are only ever
appended. Rows of one run share one date::

    rows = tuning_records.rows(case, dtype, trials, "cuda")
    tuning_records.append(rows, records.folder(), records.device_name("cuda"))
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megafold.atomic import atomic_write
from megafold.bench.cases import Case
from megafold.bench.records import TUNING, environment, folder
from megafold.ops.tuning import Config

if TYPE_CHECKING:
    from megafold.bench.tune import Trial


@dataclass(frozen=True)
class TuningRecord:
    """One configuration of one kernel on one case, tried on one device."""

    kernel: str  # "evo_attention.forward"
    shape: str  # the case's key: "B1 S384 N384 H4 D32"
    dtype: str  # "float32", "bfloat16", "float16"
    blocks: str  # the kernel's block arguments: "ROWS 1 BLOCK_Q 64 BLOCK_K 64"
    num_warps: int
    num_stages: int
    max_registers: int | None  # None: as the compiler likes
    ms: float | None  # median milliseconds; None where it did not run, was wrong, or spilt
    note: str  # why there is no time
    device: str  # in words: "NVIDIA H200"
    revision: str  # of this project: commit, with "+" where files were changed
    date: str  # when the run began, UTC, ISO 8601

    def __post_init__(self) -> None:
        if self.ms is None and not self.note:
            raise ValueError(f"a trial of {self.kernel} without a time needs a note that says why")
        blocks_of(self.blocks)

    @property
    def config(self) -> Config:
        """The configuration, as ``megafold.ops.use_config`` takes it."""
        return Config(blocks_of(self.blocks), self.num_warps, self.num_stages, self.max_registers)

    @property
    def op(self) -> str:
        """The operator whose kernel this is: ``"evo_attention"``."""
        return self.kernel.partition(".")[0]


COLUMNS = tuple(f.name for f in fields(TuningRecord))


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
            kernel=trial.kernel,
            shape=of.shape,
            dtype=str(dtype).removeprefix("torch."),
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
    """Append rows to ``root/<device>/<op>_tuning.csv``, one file per operator.

    Each file is replaced in one step: whoever reads sees all of the old rows or all of the new.

    Args:
        device: the folder's name, as ``records.device_name`` gives it.

    Raises:
        ValueError: a file that is there already has other columns; it is left as it is.
    """
    by_op: dict[str, list[TuningRecord]] = {}
    for record in records:
        by_op.setdefault(record.op, []).append(record)
    texts = {}
    for op, new in by_op.items():
        path = Path(root) / device / f"{op}{TUNING}.csv"
        texts[path] = _to_csv([*(_read_file(path) if path.exists() else []), *new])
    for path, text in texts.items():
        atomic_write(path, text.encode())
    return list(texts)


def read(root: Path | str, device: str | None = None, op: str | None = None) -> list[TuningRecord]:
    """All rows below ``root``, of one device and one operator where given, in file order.

    Raises:
        FileNotFoundError: ``root`` is no folder.
        ValueError: a file's columns or a value are not those of :class:`TuningRecord`.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of records at {root}")
    paths = sorted(root.glob(f"{device or '*'}/{op or '*'}{TUNING}.csv"))
    return [record for path in paths for record in _read_file(path)]


def stored(of: Case, dtype: torch.dtype) -> list[TuningRecord]:
    """The checkout's rows of a case in one dtype, of every device: the last of each configuration.

    Raises:
        FileNotFoundError: not a checkout.
    """
    name = str(dtype).removeprefix("torch.")
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


def _read_file(path: Path) -> list[TuningRecord]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path}: columns are {reader.fieldnames}, expected {','.join(COLUMNS)}"
            )
        return [_parse(path, number, row) for number, row in enumerate(reader, start=2)]


def _parse(path: Path, number: int, row: dict[str, str]) -> TuningRecord:
    try:
        values: dict[str, object] = dict(row)
        for name in ("num_warps", "num_stages"):
            values[name] = int(row[name])
        values["max_registers"] = int(row["max_registers"]) if row["max_registers"] else None
        values["ms"] = float(row["ms"]) if row["ms"] else None
        return TuningRecord(**values)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def _to_csv(records: list[TuningRecord]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in records:
        row = {name: "" if value is None else value for name, value in asdict(record).items()}
        if record.ms is not None:
            row["ms"] = f"{record.ms:.6g}"
        writer.writerow(row)
    return text.getvalue()
