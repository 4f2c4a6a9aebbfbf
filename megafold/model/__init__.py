"""AlphaFold 3, built on ``megafold.ops``: one file per block of the paper."""

from megafold.model.alphafold3 import AlphaFold3
from megafold.model.confidence import Confidence, predict_confidence
from megafold.model.config import CONFIGS, ModelConfig
from megafold.model.losses import Losses, training_loss
from megafold.model.memory import BatchTooLargeError
from megafold.model.sampler import Trajectory, sample
from megafold.model.stages import STAGES, Stage

__all__ = [
    "CONFIGS",
    "STAGES",
    "AlphaFold3",
    "BatchTooLargeError",
    "Confidence",
    "Losses",
    "ModelConfig",
    "Stage",
    "Trajectory",
    "predict_confidence",
    "sample",
    "training_loss",
]
