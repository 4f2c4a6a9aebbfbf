"""How far a result is from the truth, and how far it may be.

The rule for every operator: its error against the equation in fp64 is at most ``FACTOR`` times
the error of PyTorch eager in the same dtype, for the output and for every gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megafold.bench.cases import Case, Inputs, differentiable

FACTOR = 1.5  # of the error in the mean square
FACTOR_LARGEST = 3.0  # of the largest error: extremes scatter more than means do

Function = Callable[[Inputs], torch.Tensor]
Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """The error of one result (the output, or the gradient of one argument)."""

    result: str  # "output", "grad q", ...
    error: float  # root mean square error / root mean square of the exact result
    eager_error: float  # the same for PyTorch eager
    largest: float  # largest error / largest exact value
    eager_largest: float
    rounding: float  # relative spacing of the result's dtype

    @property
    def passes(self) -> bool:
        """Whether both errors are within the rule.

        A result rounded once from the exact one always is, even where eager happens to have no
        error at all: a quarter of the spacing in the mean, half of it at most.
        """
        allowed, allowed_largest = self._allowed
        return self.error <= allowed and self.largest <= allowed_largest

    @property
    def used(self) -> float:
        """How much of the error that the rule allows there is; at most 1 where it passes."""
        allowed, allowed_largest = self._allowed
        return max(self.error / allowed, self.largest / allowed_largest)

    @property
    def _allowed(self) -> tuple[float, float]:
        return (
            max(FACTOR * self.eager_error, self.rounding / 4),
            max(FACTOR_LARGEST * self.eager_largest, self.rounding / 2),
        )


def results(function: Function, inputs: Inputs, grad: torch.Tensor | None = None) -> Results:
    """The output of ``function`` and the gradient of every input that has one.

    Args:
        grad: gradient of the output; None for the forward pass alone.
    """
    if grad is None:
        with torch.no_grad():
            return {"output": function(inputs)}
    leaves = {name: t.detach().requires_grad_() for name, t in differentiable(inputs).items()}
    output = function({**inputs, **leaves})
    gradients = torch.autograd.grad(output, list(leaves.values()), grad.to(output.dtype))
    named = {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"output": output.detach(), **named}


def exact_results(case: Case, inputs: Inputs, grad: torch.Tensor | None = None) -> Results:
    """The equation in fp64 on the very values of ``inputs``, whatever dtype holds them."""
    doubles = {
        name: t.double() if t is not None and t.is_floating_point() else t
        for name, t in inputs.items()
    }
    return results(case.run_reference, doubles, grad)


def compare(candidate: Results, eager: Results, exact: Results) -> list[Comparison]:
    """Errors of ``candidate`` beside those of ``eager``, one entry per result."""
    comparisons = []
    for name, truth in exact.items():
        error, largest = relative_errors(candidate[name], truth)
        eager_error, eager_largest = relative_errors(eager[name], truth)
        rounding = torch.finfo(candidate[name].dtype).eps
        comparisons.append(Comparison(name, error, eager_error, largest, eager_largest, rounding))
    return comparisons


def compare_case(
    case: Case, device: torch.device | str, dtype: torch.dtype, *, seed: int = 0
) -> list[Comparison]:
    """Errors of the implementation in force on random inputs of a case, with every gradient."""
    generator = torch.Generator().manual_seed(seed)
    inputs = case.make_inputs(device, dtype, generator)
    grad = torch.randn(case.output_shape, generator=generator).to(device, dtype)
    return compare(
        results(case.run, inputs, grad),
        results(case.run_reference, inputs, grad),
        exact_results(case, inputs, grad),
    )


def relative_errors(value: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Root mean square and largest error, each relative to that of ``exact``.

    Infinite where a value is not finite, or where the exact result is zero and the value is not.
    """
    if value.shape != exact.shape:
        raise ValueError(f"shapes differ: {tuple(value.shape)} and {tuple(exact.shape)}")
    if exact.numel() == 0:
        return 0.0, 0.0
    difference = (value.double() - exact).abs()
    if not torch.isfinite(difference).all():
        return float("inf"), float("inf")
    return (
        _ratio(difference.square().mean().sqrt(), exact.square().mean().sqrt()),
        _ratio(difference.max(), exact.abs().max()),
    )


def _ratio(error: torch.Tensor, scale: torch.Tensor) -> float:
    if scale == 0:
        return 0.0 if error == 0 else float("inf")
    return (error / scale).item()
