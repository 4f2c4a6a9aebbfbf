"""What the tests of the operators with a LayerNorm share: the kernels, and their rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.bench.cases import Inputs
from tests.numerics import assert_accurate, assert_case_accurate

ON_GPU = pytest.mark.gpu
# The interpreter cuts bf16 off where a GPU rounds.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=ON_GPU)]
HALF = DTYPES[1:]


def results_of(case: cases.Case, inputs: Inputs, grad: torch.Tensor) -> accuracy.Results:
    """Output and gradients by the kernels."""

    def fused(given: Inputs) -> torch.Tensor:
        with ops.use("triton"):
            return case.run(given)

    return accuracy.results(fused, inputs, grad)


def assert_kernels_accurate(case: cases.Case, inputs: Inputs, grad: torch.Tensor) -> None:
    """Hold the kernels to the rule on these arguments."""
    assert_accurate(
        results_of(case, inputs, grad),
        accuracy.results(case.run_reference, inputs, grad),
        accuracy.exact_results(case, inputs, grad),
    )


def assert_shape_accurate(
    op: str,
    shape: str,
    dtype: torch.dtype,
    change: Callable[[Inputs], Inputs] = lambda inputs: inputs,
) -> None:
    """Hold the kernels to the rule at one size."""
    with ops.use("triton"):
        assert_case_accurate(cases.case(op, shape), dtype, change)
