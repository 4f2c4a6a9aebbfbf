"""The operator, its reference and its validation."""

from megafold.ops.gated_linear.function import check, gated_linear
from megafold.ops.gated_linear.reference import reference

__all__ = ["check", "gated_linear", "reference"]
