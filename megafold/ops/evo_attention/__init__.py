"""The operator, its reference and its validation."""

from megafold.ops.evo_attention.function import check, evo_attention
from megafold.ops.evo_attention.reference import reference

__all__ = ["check", "evo_attention", "reference"]
