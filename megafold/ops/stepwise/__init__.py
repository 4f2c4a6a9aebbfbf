"""Small operators of steps without gradient, each one kernel."""

from megafold.ops.stepwise.function import gated, modulated, swiglu

__all__ = ["gated", "modulated", "swiglu"]
