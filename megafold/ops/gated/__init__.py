"""The operator, its reference and its validation."""

from megafold.ops.gated.function import check, gated
from megafold.ops.gated.reference import reference

__all__ = ["check", "gated", "reference"]
