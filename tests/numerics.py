"""The rule that every implementation of every operator is held to.

The error against the equation in fp64 is at most 1.5 times the error of PyTorch eager in the
same dtype, for the output and for every gradient (and the largest single error at most 3 times,
so that one bad element cannot hide in the mean). The factors stand in
``megafold.bench.accuracy``, where notebooks and benchmarks read them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from megafold.bench import accuracy
from megafold.bench.cases import Case, Inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # what the operators are tested on
# How the errors of a few numbers compare is chance, so there are several draws of them where there
# is time: in the interpreter there is not, but the same draw has the same errors on any machine.
DRAWS = 1 if DEVICE == "cpu" else 4
MANY = 2**18  # numbers of an output of which one draw is enough

Triple = tuple[accuracy.Results, accuracy.Results, accuracy.Results]


def assert_accurate(
    candidate: accuracy.Results, eager: accuracy.Results, exact: accuracy.Results
) -> None:
    """Fail, naming every result that breaks the rule."""
    broken = [c for c in accuracy.compare(candidate, eager, exact) if not c.passes]
    assert not broken, "\n" + "\n".join(
        f"{c.result}: error {c.error:.2e}, eager {c.eager_error:.2e}; "
        f"largest {c.largest:.2e}, eager {c.eager_largest:.2e}"
        for c in broken
    )


def pooled(draws: Iterable[Triple]) -> Triple:
    """The results of several draws as one: kernels', eager's and exact ones, in this order."""
    found, eager, exact = (
        {name: torch.cat([results[name].flatten() for results in of_one]) for name in of_one[0]}
        for of_one in zip(*draws, strict=True)
    )
    return found, eager, exact


def assert_case_accurate(
    case: Case, dtype: torch.dtype, change: Callable[[Inputs], Inputs] = lambda inputs: inputs
) -> None:
    """Hold the implementation in force to the rule, on random inputs of ``case``."""

    def results_of(seed: int) -> Triple:
        inputs, grad = draw(case, dtype, seed=seed)
        inputs = change(inputs)
        return (
            accuracy.results(case.run, inputs, grad),
            accuracy.results(case.run_reference, inputs, grad),
            accuracy.exact_results(case, inputs, grad),
        )

    draws = 1 if math.prod(case.output_shape) >= MANY else DRAWS
    assert_accurate(*pooled(map(results_of, range(draws))))


def draw(
    case: Case, dtype: torch.dtype, device: torch.device | str = DEVICE, seed: int = 0
) -> tuple[Inputs, torch.Tensor]:
    """Random inputs of a case and a random gradient of its output."""
    generator = torch.Generator().manual_seed(seed)
    inputs = case.make_inputs(device, dtype, generator)
    grad = torch.randn(case.output_shape, generator=generator).to(device, dtype)
    return inputs, grad


def assert_alike(found: accuracy.Results, expected: accuracy.Results) -> None:
    """The same bits; on a GPU up to rounding: its library may multiply what lies otherwise so."""
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        most = 0.0 if DEVICE == "cpu" else 8 * torch.finfo(t.dtype).eps * t.abs().max().item()
        torch.testing.assert_close(found[name], t, atol=most, rtol=0, msg=name)
