"""The operator, its reference and its validation."""

from megafold.ops.transition.function import check, transition
from megafold.ops.transition.reference import reference

__all__ = ["check", "reference", "transition"]
