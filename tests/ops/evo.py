"""What the tests of EvoAttention's kernels share: drawn inputs, and the rule they are held to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.bench.cases import Inputs
from megafold.ops.evo_attention import launch
from megafold.ops.tuning import tables
from megafold.ops.tuning.table import DEFAULT
from tests.numerics import DEVICE, assert_accurate, draw

ON_GPU = pytest.mark.gpu
# The interpreter cuts bf16 off where a GPU rounds.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=ON_GPU)]
# For what does not depend on the dtype: the fastest in the interpreter, which is slow.
ONE_DTYPE = [
    torch.float16,
    pytest.param(torch.float32, marks=ON_GPU),
    pytest.param(torch.bfloat16, marks=ON_GPU),
]


def attention(
    shape: str, dtype: torch.dtype = torch.float32, device: str = DEVICE, seed: int = 0
) -> tuple[Inputs, torch.Tensor]:
    """Random arguments of a call, by name, and a gradient of its output."""
    return draw(cases.case("evo_attention", shape), dtype, device, seed)


def fused(inputs: Inputs, **options) -> torch.Tensor:
    """The operator by its kernels."""
    with ops.use("triton"):
        return ops.evo_attention(**inputs, **options)


def fused_results(inputs: Inputs, grad: torch.Tensor, **options) -> accuracy.Results:
    """Output and gradients by the kernels."""
    return accuracy.results(lambda given: fused(given, **options), inputs, grad)


def three_results(inputs: Inputs, grad: torch.Tensor, **options) -> tuple[accuracy.Results, ...]:
    """Output and gradients of the kernels, of eager, and in fp64, on the same values."""
    case = replace(cases.case("evo_attention", "B1 S1 N1 H1 D1"), options=options)
    return (
        fused_results(inputs, grad, **options),
        accuracy.results(case.run_reference, inputs, grad),
        accuracy.exact_results(case, inputs, grad),
    )


def assert_kernels_accurate(inputs: Inputs, grad: torch.Tensor, **options) -> None:
    """Hold the kernels to the rule on these arguments."""
    assert_accurate(*three_results(inputs, grad, **options))


def assert_same(actual: accuracy.Results, expected: accuracy.Results) -> None:
    """Fail, naming every result of which a single bit differs."""
    assert actual.keys() == expected.keys()
    assert [name for name, t in expected.items() if not torch.equal(actual[name], t)] == []


def configs(rows: int, block_q: int, block_k: int, keys_first: int = 0) -> dict[str, ops.Config]:
    """For each kernel a configuration of these block sizes."""
    sizes = {"ROWS": rows, "BLOCK_Q": block_q, "BLOCK_K": block_k, "KEYS_FIRST": keys_first}
    names = {entry.kernel: entry.blocks for entry in tables()[DEFAULT]}
    return {
        kernel: ops.Config({name: sizes[name] for name in names[kernel]}, 4, 1)
        for kernel in launch.KERNELS
    }


@contextmanager
def blocks(rows: int, block_q: int, block_k: int, keys_first: int = 0) -> Iterator[None]:
    """Run every kernel with these block sizes."""
    with ExitStack() as stack:
        for kernel, config in configs(rows, block_q, block_k, keys_first).items():
            stack.enter_context(ops.use_config(kernel, config))
        yield
