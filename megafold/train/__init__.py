"""Training: the step, memorising one structure.

Public names are imported on first use, so that the command line starts without PyTorch. A
module never has the name of a public function.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megafold.train.memorising import (
        MEMORISING,
        Evaluation,
        Memorised,
        Recipe,
        load_or_memorise,
        memorise,
        sample_memorised,
        save_run,
    )
    from megafold.train.runs import RecordedRun, read_run, read_runs, write_run
    from megafold.train.trainer import StepRecord, TrainConfig, Trainer

_HOMES = {
    "MEMORISING": "memorising",
    "Evaluation": "memorising",
    "Memorised": "memorising",
    "Recipe": "memorising",
    "RecordedRun": "runs",
    "StepRecord": "trainer",
    "TrainConfig": "trainer",
    "Trainer": "trainer",
    "load_or_memorise": "memorising",
    "memorise": "memorising",
    "read_run": "runs",
    "read_runs": "runs",
    "sample_memorised": "memorising",
    "save_run": "memorising",
    "write_run": "runs",
}

__all__ = [
    "MEMORISING",
    "Evaluation",
    "Memorised",
    "Recipe",
    "RecordedRun",
    "StepRecord",
    "TrainConfig",
    "Trainer",
    "load_or_memorise",
    "memorise",
    "read_run",
    "read_runs",
    "sample_memorised",
    "save_run",
    "write_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
