"""Training: the step, the loop around it, checkpoints."""

from megafold.train.trainer import StepRecord, TrainConfig, Trainer

__all__ = ["StepRecord", "TrainConfig", "Trainer"]
