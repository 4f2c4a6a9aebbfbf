"""The operator, its reference and its validation."""

from megafold.ops.conditioned_transition.function import check, conditioned_transition
from megafold.ops.conditioned_transition.reference import reference

__all__ = ["check", "conditioned_transition", "reference"]
