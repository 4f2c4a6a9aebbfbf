"""The operator, its reference and its validation."""

from megafold.ops.triangle_multiplication.function import check, triangle_multiplication
from megafold.ops.triangle_multiplication.reference import reference

__all__ = ["check", "reference", "triangle_multiplication"]
