"""AlphaFold 3, built on ``megafold.ops``: one file per block of the paper."""

from megafold.model.alphafold3 import AlphaFold3
from megafold.model.config import CONFIGS, ModelConfig
from megafold.model.losses import Losses, training_loss
from megafold.model.sampler import Trajectory, sample

__all__ = [
    "CONFIGS",
    "AlphaFold3",
    "Losses",
    "ModelConfig",
    "Trajectory",
    "sample",
    "training_loss",
]
