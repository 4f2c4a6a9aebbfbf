"""The operator, its reference and its validation."""

from megafold.ops.triangle_attention.function import check, triangle_attention
from megafold.ops.triangle_attention.reference import reference

__all__ = ["check", "reference", "triangle_attention"]
