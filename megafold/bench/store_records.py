"""What the stores and the steps of the data pipeline cost, as rows of CSV.

``data/records/<device>/feature_cache_stores.csv`` and ``..._steps.csv``; rows are only ever
appended, and those of one run share one date. Their columns are their own, since neither is a
measurement of an operator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from megafold.bench import rows
from megafold.bench.records import folder

DESIGNS = ("uncached", "gzip pickle", "megafold")
STAGES = ("structure", "alignments", "featurize", "load", "crop", "batch", "step")


@dataclass(frozen=True)
class StoreRecord:
    """One store, holding the same entries as the others of its run. Times are medians."""

    store: str  # of stores.STORES, or "uncached": everything made afresh
    entry: str  # that the crops are of
    tokens: int  # of it
    rows: int  # of its alignment
    made_up_rows: int  # of these, recombined from the real ones to reach the depth asked for
    crop: int  # tokens
    crop_rows: int  # rows drawn
    entries: int  # that the store holds
    build_s: float | None  # to write all of them; None where nothing is stored
    size_mb: float | None  # of all of them on disk, 10^6 bytes
    draw_ms: float  # for one crop, on one core, files in the system's memory
    draw_ms_q1: float
    draw_ms_q3: float
    readers: int  # processes that draw at once
    draws_per_s: float | None  # of all of them together
    kills: int  # of a process that writes, at random moments
    torn: int | None  # kills that left an entry which is there and cannot be read
    wrong: int | None  # kills that left an entry which is read, and is not what was written
    device: str
    revision: str
    date: str

    SUFFIX: ClassVar[str] = "_stores"
    op: ClassVar[str] = "feature_cache"


@dataclass(frozen=True)
class StepRecord:
    """One stage of making a training example, or all of it as a training loop sees it."""

    design: str  # of DESIGNS
    entry: str
    tokens: int
    rows: int
    made_up_rows: int
    crop: int
    crop_rows: int
    stage: str  # of STAGES; "step" is the wait for one example, all stages and the loader
    workers: int  # of the loader; 0: the training process itself
    ms: float  # median
    ms_q1: float
    ms_q3: float
    device: str
    revision: str
    date: str

    SUFFIX: ClassVar[str] = "_steps"
    op: ClassVar[str] = "feature_cache"

    def __post_init__(self) -> None:
        if self.design not in DESIGNS:
            raise ValueError(f"design must be one of {DESIGNS}, not {self.design!r}")
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {STAGES}, not {self.stage!r}")


AnyRecord = TypeVar("AnyRecord", StoreRecord, StepRecord)


def newest_run(kind: type[AnyRecord]) -> list[AnyRecord]:
    """The checkout's rows of the last run, in the order they were measured.

    Raises:
        FileNotFoundError: Not a checkout, or there are none.
    """
    found = rows.read(kind, folder(), "cpu")
    if not found:
        raise FileNotFoundError(
            f"no {kind.op}{kind.SUFFIX} records: megafold bench-data makes them"
        )
    last = max(record.date for record in found)
    return [record for record in found if record.date == last]
