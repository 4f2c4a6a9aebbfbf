"""The operator, its reference and its validation."""

from megafold.ops.adaptive_layer_norm.function import adaptive_layer_norm, check
from megafold.ops.adaptive_layer_norm.reference import reference

__all__ = ["adaptive_layer_norm", "check", "reference"]
