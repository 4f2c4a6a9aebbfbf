"""The operator, its reference and its validation."""

from megafold.ops.layer_norm_linear.function import check, layer_norm_linear
from megafold.ops.layer_norm_linear.reference import reference

__all__ = ["check", "layer_norm_linear", "reference"]
