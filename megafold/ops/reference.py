"""The equation of every operator in plain PyTorch, under the operator's name.

``megafold.ops.reference.transition(...)`` takes the arguments of ``megafold.ops.transition(...)``
and always computes the same plain PyTorch expression. In float64 it is the oracle which every
implementation is held to; in the dtype at hand it is the eager baseline of the benchmarks.
"""

from megafold.ops.adaptive_layer_norm.reference import reference as adaptive_layer_norm
from megafold.ops.conditioned_transition.reference import reference as conditioned_transition
from megafold.ops.evo_attention.reference import reference as evo_attention
from megafold.ops.gated.reference import reference as gated
from megafold.ops.gated_linear.reference import reference as gated_linear
from megafold.ops.layer_norm_linear.reference import reference as layer_norm_linear
from megafold.ops.transition.reference import reference as transition
from megafold.ops.triangle_attention.reference import reference as triangle_attention
from megafold.ops.triangle_multiplication.reference import reference as triangle_multiplication

__all__ = [
    "adaptive_layer_norm",
    "conditioned_transition",
    "evo_attention",
    "gated",
    "gated_linear",
    "layer_norm_linear",
    "transition",
    "triangle_attention",
    "triangle_multiplication",
]
