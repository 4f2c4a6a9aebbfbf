"""EvoAttention's kernels on a GPU alone: beyond 2**31 elements, and the settings of fp32 products.

At most 40 GB of a GPU's memory.
"""

from __future__ import annotations

import pytest
import torch

from tests.numerics import DEVICE, assert_accurate
from tests.ops.evo import attention, fused_results, three_results

pytestmark = pytest.mark.gpu

BEYOND = 2**31  # elements; more than 32 bits with a sign can count
LAST = slice(-4, None)


def drawn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def test_more_than_2_to_the_31_elements_of_q_k_and_v():
    """The views of an ending node, so that one token's stride is 2**25 elements, too."""
    rows, tokens, heads, width = 2**19 * 66 // 64, 64, 2 * 2, 16
    torch.manual_seed(0)
    q, k, v, grad = (drawn(1, tokens, rows, heads, width).transpose(1, 2) for _ in range(4))
    assert q.numel() > BEYOND
    assert (tokens - 1) * q.stride(2) > BEYOND
    mask = torch.rand(1, rows, tokens, device=DEVICE) > 0.1
    bias = drawn(1, heads, tokens, tokens, dtype=torch.float32)
    whole = fused_results({"q": q, "k": k, "v": v, "mask": mask, "pair_bias": bias}, grad)

    def part(chosen):
        views = {"q": q, "k": k, "v": v, "mask": mask}
        inputs = {name: t[:, chosen] for name, t in views.items()}
        return {**inputs, "pair_bias": bias}, grad[:, chosen]

    of_rows = ("output", "grad q", "grad k", "grad v")
    for chosen in (LAST, slice(rows // 2, rows // 2 + 4)):
        _, eager, exact = three_results(*part(chosen))
        found = {name: whole[name][:, chosen] for name in of_rows}
        assert_accurate(found, eager, {name: exact[name] for name in of_rows})
    bias_gradient = whole["grad pair_bias"]
    del whole, found
    halves = (slice(0, rows // 2), slice(rows // 2, None))
    summed = sum(fused_results(*part(half))["grad pair_bias"].double() for half in halves)
    error = (bias_gradient.double() - summed).norm() / summed.norm()
    assert error < 1e-4  # half a million rows, summed in fp32 in another order


def test_more_than_2_to_the_31_elements_of_the_bias_and_its_gradient():
    """Windows of atoms, each with a bias of its own."""
    windows, tokens, heads, width = 2**31 // (4 * 64 * 64) + 8, 64, 4, 16
    torch.manual_seed(0)
    q, k, v, grad = (drawn(windows, 1, tokens, heads, width) for _ in range(4))
    bias = drawn(windows, heads, tokens, tokens)
    assert bias.numel() > BEYOND
    inputs = {"q": q, "k": k, "v": v, "mask": None, "pair_bias": bias}
    whole = fused_results(inputs, grad)
    for chosen in (LAST, slice(windows // 2, windows // 2 + 4)):
        part = {name: None if t is None else t[chosen] for name, t in inputs.items()}
        _, eager, exact = three_results(part, grad[chosen])
        assert_accurate({name: t[chosen] for name, t in whole.items()}, eager, exact)


def test_more_programs_than_2_to_the_16():
    """In the other dimensions of a grid that would be too many."""
    inputs, grad = attention("B1 S70000 N1 K5 H1 D8", torch.bfloat16)
    whole = fused_results(inputs, grad)
    part = {n: t if n == "pair_bias" else t[:, LAST] for n, t in inputs.items()}
    _, eager, exact = three_results(part, grad[:, LAST])
    of_rows = ("output", "grad q", "grad k", "grad v")
    assert_accurate(
        {name: whole[name][:, LAST] for name in of_rows},
        eager,
        {name: exact[name] for name in of_rows},
    )


@pytest.mark.parametrize("shape", ["B1 S8 N100 H4 D32", "B1 S1 N111 H2 D64", "B2 S3 N64 H2 D128"])
@pytest.mark.parametrize("allowed", [False, True])
def test_fp32_products_are_as_torch_is_set_to(allowed, shape, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
    fused, eager, exact = three_results(*attention(shape))
    error, eager_error = (
        float((results["output"].double() - exact["output"]).norm() / exact["output"].norm())
        for results in (fused, eager)
    )
    tf32 = allowed and torch.version.hip is None
    assert (error > 2e-5) == tf32  # products of 10 bits, or of 23
    if tf32 and eager_error < 2e-5:  # allowed to round, cuBLAS does not for every shape
        assert error < torch.finfo(torch.bfloat16).eps / 8  # that of 10 bits
    else:
        assert_accurate(fused, eager, exact)
