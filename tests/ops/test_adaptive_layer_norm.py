"""Adaptive LayerNorm by its kernels against the equation in fp64: sizes, sharing, strides.

On a GPU where there is one, else in Triton's interpreter, which is why most sizes are small.
"""

from __future__ import annotations

import pytest
import torch

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.ops.adaptive_layer_norm import launch
from tests.numerics import DEVICE, draw
from tests.ops.layer_norms import (
    DTYPES,
    HALF,
    assert_kernels_accurate,
    assert_shape_accurate,
    results_of,
)

OP = "adaptive_layer_norm"
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_half = pytest.mark.parametrize("dtype", HALF)


@each_dtype
@pytest.mark.parametrize("channels", [8, 24, 128, 384, 768])
def test_every_width(channels, dtype):
    assert_shape_accurate(OP, f"S2 N20 A{channels} C96", dtype)


@each_dtype
@pytest.mark.parametrize("channels", [16, 128, 384])
def test_every_width_of_the_condition(channels, dtype):
    assert_shape_accurate(OP, f"S2 N20 A24 C{channels}", dtype)


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("shape", ["S48 N384 A768 C384", "S16 N4000 A128 C128", "S5 N77 A384 C449"])
def test_large_sizes(shape, dtype):
    assert_shape_accurate(OP, shape, dtype)


def drawn(shape: str, dtype: torch.dtype = torch.float16):
    case = cases.case(OP, shape)
    return case, *draw(case, dtype, DEVICE)


# How s is given: as many conditions as rows, or fewer.
SHARED = {
    "by samples": lambda s: s[:1],
    "by samples, without a dimension": lambda s: s[0],
    "by tokens": lambda s: s[:, :1],
}


@each_dtype
@pytest.mark.parametrize("how", SHARED)
def test_a_condition_may_be_shared(how, dtype):
    case, inputs, grad = drawn("S6 N35 A24 C20", dtype)
    assert_kernels_accurate(case, {**inputs, "s": SHARED[how](inputs["s"]).clone()}, grad)


# In fp32 one norm is too few for the mean of errors of one rounding each.
@each_half
@pytest.mark.parametrize("how", [lambda s: s[:1, :1], lambda s: s[0, 0]], ids=["[1, 1, C]", "[C]"])
def test_one_condition_may_be_shared_by_all(how, dtype):
    case, inputs, grad = drawn("S6 N35 A24 C20", dtype)
    assert_kernels_accurate(case, {**inputs, "s": how(inputs["s"]).clone()}, grad)


@each_half
@pytest.mark.parametrize(
    "lead", [(2, 1, 3, 4), (1, 5, 3, 4), (2, 5, 1, 4), (2, 1, 1, 4), (1, 5, 3, 1), (2, 1, 3, 1)]
)
def test_any_leading_dimensions_may_be_shared(lead, dtype):
    case, inputs, grad = drawn("S10 N12 A24 C20", dtype)
    generator = torch.Generator().manual_seed(1)
    deep = {
        **inputs,
        "a": inputs["a"].view(2, 5, 3, 4, 24),
        "s": torch.randn(*lead, 20, generator=generator).to(DEVICE, dtype),
    }
    assert_kernels_accurate(case, deep, grad.view(2, 5, 3, 4, 24))


def test_a_shared_condition_is_projected_as_often_as_there_are_conditions():
    a = torch.empty(6, 35, 24)
    for s, conditions in ((torch.empty(1, 35, 20), 35), (torch.empty(6, 1, 20), 6)):
        assert launch.Problem.of(a, launch.shared(a, s)).conditions == conditions
    assert launch.shared(a, s) is s


@each_dtype
def test_a_condition_goes_through_the_products_that_pytorch_has(dtype, monkeypatch):
    """How exact a product of fp32 is depends on its size: a library splits small ones."""
    case, inputs, _ = drawn("S6 N35 A24 C20", dtype)
    inputs["s"] = inputs["s"][:1].clone()
    linear, products = torch.nn.functional.linear, []

    def record(x, weight, bias=None):
        products.append((x.numel() // x.shape[-1], tuple(weight.shape), bias is not None))
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", record)
    with ops.use("triton"):
        case.run(inputs)
    ours = products.copy()
    products.clear()
    case.run_reference(inputs)
    assert ours == products == [(35, (24, 20), True), (35, (24, 20), False)]


@each_half
@pytest.mark.parametrize("waves", [1, 8])
def test_rows_that_share_are_split_in_any_way(waves, dtype):
    case, inputs, grad = drawn("S50 N3 A24 C20", dtype)
    with ops.use_config(launch.GRADIENT, ops.Config({"ROWS": 4, "WAVES": waves}, 4, 1)):
        assert_kernels_accurate(case, {**inputs, "s": inputs["s"][:1].clone()}, grad)


@each_half
@pytest.mark.parametrize(
    "absent", [("norm_weight_s",), ("bias_gate",), ("norm_weight_s", "bias_gate")], ids="+".join
)
def test_parameters_may_be_left_out(absent, dtype):
    case, inputs, grad = drawn("S2 N20 A24 C20", dtype)
    assert_kernels_accurate(case, {**inputs, **dict.fromkeys(absent)}, grad)


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a larger tensor."""
    return torch.stack([t, t], dim=-1).flatten(-2)[..., ::2]


@each_half
def test_strides_do_not_matter(dtype):
    case, inputs, grad = drawn("S2 N20 A24 C20", dtype)
    expected = results_of(case, inputs, grad)
    apart = {name: strided(t) for name, t in inputs.items()}
    for name, value in results_of(case, apart, strided(grad)).items():
        assert torch.equal(value, expected[name]), name


@each_dtype
def test_gates_far_from_zero_stay_finite(dtype):
    case, inputs, grad = drawn("S2 N20 A24 C20", dtype)
    assert_kernels_accurate(case, {**inputs, "bias_gate": inputs["bias_gate"] * 100}, grad)


@pytest.mark.parametrize("shape", ["S0 N4 A24 C20", "S3 N0 A24 C20"])
def test_empty_inputs_give_empty_results_and_zero_gradients(shape):
    case, inputs, grad = drawn(shape)
    results = results_of(case, inputs, grad)
    assert results["output"].shape == case.output_shape
    for name, value in results.items():
        assert not value.numel() or (value == 0).all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gradients_that_are_not_asked_for_change_no_other(dtype):
    case, inputs, grad = drawn("S2 N20 A24 C20", dtype)
    every = results_of(case, inputs, grad)
    for name in inputs:
        alone = {n: t.detach().requires_grad_(n == name) for n, t in inputs.items()}
        with ops.use("triton"):
            out = case.run(alone)
        (of_one,) = torch.autograd.grad(out, [alone[name]], grad)
        assert torch.equal(of_one, every[f"grad {name}"]), name


@each_dtype
def test_the_same_input_gives_the_same_bits(dtype):
    case, inputs, grad = drawn("S6 N20 A24 C20", dtype)
    first, second = results_of(case, inputs, grad), results_of(case, inputs, grad)
    assert all(torch.equal(second[name], value) for name, value in first.items())


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ("S2 N20 A24 C20 shared", torch.float16, []),
        ("S2 N20 A24 C20", torch.float32, []),
        # The normalised condition, the gate, the weights of gate and shift as one.
        ("S2 N20 A24 C20", torch.float16, [(40, 20), (40, 24), (48, 20)]),
    ],
)
def test_statistics_are_kept_for_the_backward_pass_and_gates_of_own_conditions(
    shape, dtype, expected
):
    case, inputs, _ = drawn(shape, dtype)
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    given = {n: t.requires_grad_() for n, t in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), ops.use("triton"):
        case.run(given)
    own = {t.data_ptr() for t in given.values()}
    made = [(tuple(t.shape), t.dtype) for t in saved if t.data_ptr() not in own]
    rows_s = inputs["s"].numel() // 20
    statistics = [((2, rows), torch.float32) for rows in (40, rows_s)]
    assert made == [*statistics, *((shape, dtype) for shape in expected)]


@pytest.mark.parametrize("waves", [1, 8])
@pytest.mark.parametrize("rows", [1, 4])
def test_rows_with_conditions_of_their_own_are_shared_out_in_any_way(rows, waves):
    case, inputs, grad = drawn("S3 N21 A24 C20")
    config = ops.Config({"ROWS": rows, "WAVES": waves}, 4, 1)
    with ops.use_config(launch.GRADIENT_ROWS, config):
        assert_kernels_accurate(case, inputs, grad)


def test_accuracy_is_that_of_the_reference_under_autocast():
    """a and s stay fp32; the products have operands in fp16, and the result is in fp16."""
    case, inputs, grad = drawn("S2 N80 A40 C48", torch.float32)

    def run(function):
        def call(given):
            with torch.autocast(DEVICE, dtype=torch.float16), ops.use("triton"):
                return function(given).to(torch.float16)

        return accuracy.results(call, inputs, grad.half())

    fused, eager = run(case.run), run(case.run_reference)
    exact = accuracy.exact_results(case, inputs, grad.half())
    assert {n: t.dtype for n, t in fused.items()} == {n: t.dtype for n, t in eager.items()}
    assert [c for c in accuracy.compare(fused, eager, exact) if not c.passes] == []


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_the_result_has_the_dtype_of_autocast(implementation):
    case, inputs, _ = drawn("S2 N8 A40 C48", torch.float32)
    with ops.use(implementation):
        assert case.run(inputs).dtype == torch.float32
        with torch.autocast(DEVICE, dtype=torch.float16):
            assert case.run(inputs).dtype == torch.float16
