"""The operators that make AlphaFold-3-class models slow, and what makes them fast.

Nine functions of tensors, usable in any model: :func:`evo_attention`,
:func:`layer_norm_linear`, :func:`gated_linear`, :func:`transition`,
:func:`triangle_multiplication`, :func:`triangle_attention`, :func:`adaptive_layer_norm`,
:func:`conditioned_transition` and :func:`gated`.
:func:`use` switches the implementation of all of them, :func:`explain` says which one a call
would run and why, and ``megafold.ops.reference`` holds the equation of each in plain PyTorch.
Needs torch and triton, nothing else.
"""

from megafold.ops import reference
from megafold.ops.adaptive_layer_norm import adaptive_layer_norm
from megafold.ops.conditioned_transition import conditioned_transition
from megafold.ops.dispatch import Choice, backend, explain, interpret, use
from megafold.ops.evo_attention import evo_attention
from megafold.ops.gated import gated
from megafold.ops.gated_linear import gated_linear
from megafold.ops.layer_norm_linear import layer_norm_linear
from megafold.ops.transition import transition
from megafold.ops.triangle_attention import triangle_attention
from megafold.ops.triangle_multiplication import triangle_multiplication
from megafold.ops.tuning import Config, reset_configs, use_config

__all__ = [
    "Choice",
    "Config",
    "adaptive_layer_norm",
    "backend",
    "conditioned_transition",
    "evo_attention",
    "explain",
    "gated",
    "gated_linear",
    "interpret",
    "layer_norm_linear",
    "reference",
    "reset_configs",
    "transition",
    "triangle_attention",
    "triangle_multiplication",
    "use",
    "use_config",
]
