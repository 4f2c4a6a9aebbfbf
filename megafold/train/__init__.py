"""Training: the step, memorising one structure."""

from megafold.train.memorise import (
    MEMORISING,
    Evaluation,
    Memorised,
    Recipe,
    load_or_memorise,
    memorise,
    sample_memorised,
    save_run,
)
from megafold.train.trainer import StepRecord, TrainConfig, Trainer

__all__ = [
    "MEMORISING",
    "Evaluation",
    "Memorised",
    "Recipe",
    "StepRecord",
    "TrainConfig",
    "Trainer",
    "load_or_memorise",
    "memorise",
    "sample_memorised",
    "save_run",
]
