"""The gated linear layer by its kernels against the equation in fp64: sizes, strides, dtypes.

On a GPU where there is one, else in Triton's interpreter, which is why most sizes are small.
"""

from __future__ import annotations

import pytest
import torch

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.ops.gated_linear import launch
from megafold.ops.precision import TF32, products_in
from tests.numerics import DEVICE, assert_accurate, draw
from tests.ops.layer_norms import (
    DTYPES,
    HALF,
    assert_kernels_accurate,
    assert_shape_accurate,
    results_of,
)

OP = "gated_linear"
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_half = pytest.mark.parametrize("dtype", HALF)


def drawn(shape: str = "N6 C24 O20", dtype: torch.dtype = torch.float16, seed: int = 0):
    case = cases.case(OP, shape)
    return case, *draw(case, dtype, DEVICE, seed)


@each_dtype
@pytest.mark.parametrize("shape", ["N9 C16", "N9 C24", "N6 C32 O64", "N8 C64 O100", "N7 C100 O17"])
def test_every_width(shape, dtype):
    assert_shape_accurate(OP, shape, dtype)


@each_dtype
def test_the_widest(dtype):
    assert_shape_accurate(OP, "N9 C128", dtype)


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("shape", ["N384 C128", "N200 C64", "N131 C100 O24", "N384 C128 O32"])
def test_large_sizes(shape, dtype):
    assert_shape_accurate(OP, shape, dtype)


@each_dtype
@pytest.mark.parametrize("absent", [("dropout",), ("residual",), ("residual", "dropout")], ids=str)
def test_residual_and_dropout_may_be_left_out(absent, dtype):
    case, inputs, grad = drawn(dtype=dtype)
    assert_kernels_accurate(case, {**inputs, **dict.fromkeys(absent)}, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("kernel", "config"),
    [
        (launch.FORWARD, ops.Config({"BLOCK_M": 16, "BLOCK_O": 16, "WAVES": 3}, 4, 1)),
        (launch.FORWARD, ops.Config({"BLOCK_M": 64, "BLOCK_O": 128, "WAVES": 1024}, 4, 1)),
        (launch.BACKWARD, ops.Config({"BLOCK_M": 16, "BLOCK_C": 16, "WAVES": 5}, 4, 1)),
        (launch.BACKWARD, ops.Config({"BLOCK_M": 64, "BLOCK_C": 128, "WAVES": 1}, 4, 1)),
    ],
    ids=str,
)
def test_rows_outputs_and_channels_are_shared_out_in_any_way(kernel, config, dtype):
    case, inputs, grad = drawn("N9 C40 O36", dtype)
    with ops.use_config(kernel, config):
        assert_kernels_accurate(case, inputs, grad)


# -- Rows and strides.


def of_rows(lead: tuple[int, ...], dtype: torch.dtype, channels: int = 24, outs: int = 20):
    """A case whose rows have other dimensions than two equal ones."""
    generator = torch.Generator().manual_seed(3)

    def draw_one(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    inputs = {
        "x": draw_one(*lead, channels),
        "gate": draw_one(*lead, channels),
        "weight": draw_one(outs, channels) * channels**-0.5,
        "residual": draw_one(*lead, outs),
        "dropout": (torch.rand((*lead, outs), generator=generator) > 0.5).to(DEVICE, dtype),
    }
    return cases.case(OP, "N6 C24 O20"), inputs, draw_one(*lead, outs)


@each_half
@pytest.mark.parametrize("lead", [(), (1,), (37,), (3, 11), (2, 3, 5), (2, 1, 3, 4)], ids=str)
def test_rows_may_have_any_dimensions(lead, dtype):
    assert_kernels_accurate(*of_rows(lead, dtype))


@pytest.mark.parametrize("lead", [(0,), (3, 0), (0, 3)], ids=str)
def test_no_rows_give_no_result_and_a_zero_gradient_of_the_weight(lead):
    results = results_of(*of_rows(lead, torch.float16))
    assert results["output"].shape == (*lead, 20)
    assert (results["grad weight"] == 0).all()
    assert results["grad weight"].shape == (20, 24)


def test_no_outputs_give_zero_gradients():
    results = results_of(*drawn("N3 C16 O0"))
    assert results["output"].shape == (3, 3, 0)
    assert (results["grad x"] == 0).all()
    assert (results["grad gate"] == 0).all()


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The same values, with the first two dimensions the other way round in memory."""
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def sliced(t: torch.Tensor) -> torch.Tensor:
    """The same values, channels 8 and following of a wider tensor."""
    return torch.nn.functional.pad(t, (8, 16))[..., 8 : 8 + t.shape[-1]]


def spread(t: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a larger tensor."""
    return torch.stack([t, t], dim=-1).flatten(-2)[..., ::2]


LAID_OUT = {
    "x transposed": {"x": transposed},
    "gate sliced": {"gate": sliced},
    "as in the model": {"x": transposed, "gate": sliced},
    "residual transposed": {"residual": transposed, "x": transposed},
    "gradient transposed": {"grad": transposed},
    "all spread": dict.fromkeys(("x", "gate", "weight", "residual", "dropout", "grad"), spread),
    "all sliced": dict.fromkeys(("x", "gate", "weight", "residual", "dropout", "grad"), sliced),
}


@each_half
@pytest.mark.parametrize("how", LAID_OUT)
def test_strides_change_no_bit(how, dtype):
    case, inputs, grad = drawn(dtype=dtype)
    expected = results_of(case, inputs, grad)
    given = {name: LAID_OUT[how].get(name, lambda t: t)(t) for name, t in inputs.items()}
    found = results_of(case, given, LAID_OUT[how].get("grad", lambda t: t)(grad))
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@each_half
@pytest.mark.parametrize(
    "shape", [(1, 6, 20), (6, 1, 20), (6, 20), (20,), (6, 6, 1), (1, 1, 1), ()], ids=str
)
def test_dropout_may_be_shared_in_any_way(shape, dtype):
    case, inputs, grad = drawn(dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    dropout = (torch.rand(shape, generator=generator) + 0.5).to(DEVICE, dtype)
    assert_kernels_accurate(case, {**inputs, "dropout": dropout}, grad)


@pytest.mark.parametrize("dim", [0, 1])
def test_what_the_model_gives_is_not_copied(dim):
    _, inputs, grad = drawn()
    x, gate, dropout = transposed(inputs["x"]), sliced(inputs["gate"]), inputs["dropout"]
    given = [x, gate, inputs["residual"], dropout.transpose(0, dim).expand(6, 6, 20), grad]
    rows, found = launch.as_rows((6, 6), *given)
    assert rows == 6
    assert all(one.tensor is t for one, t in zip(found, given, strict=True))
    assert found[0][1:] == (24, 6 * 24)
    assert found[1][1:] == (6 * 48, 48)
    assert found[3][1:] == ((0, 20) if dim == 0 else (20, 0))


def test_only_what_two_strides_do_not_reach_is_copied():
    x = torch.empty(2, 3, 4, 8)
    odd = torch.empty(4, 3, 2, 8).permute(2, 1, 0, 3)
    inner, (first, second, third) = launch.as_rows((2, 3, 4), x, odd, x)
    assert inner == 24
    assert first.tensor is x
    assert third.tensor is x
    assert second.tensor.is_contiguous()
    assert second[1:] == (24 * 8, 8)


def test_a_gradient_of_one_number_is_not_written_out():
    grad = torch.ones(()).expand(6, 5, 20)
    _, (rows,) = launch.as_rows((6, 5), grad)
    assert rows.tensor.untyped_storage().nbytes() == 20 * 4
    assert rows[1:] == (0, 0)


@each_half
def test_the_gradient_of_a_sum_is_taken(dtype):
    case, inputs, grad = drawn(dtype=dtype)
    assert_kernels_accurate(case, inputs, torch.ones_like(grad))
    expected = results_of(case, inputs, torch.ones_like(grad))
    given = {name: t.detach().requires_grad_(name != "dropout") for name, t in inputs.items()}
    with ops.use("triton"):
        case.run(given).sum().backward()
    for name, t in cases.differentiable(given).items():
        assert torch.equal(t.grad, expected[f"grad {name}"]), name


def test_the_gradient_of_x_lies_in_memory_as_x_does():
    _, inputs, grad = drawn()
    given = {name: t.detach().requires_grad_(name != "dropout") for name, t in inputs.items()}
    given["x"] = transposed(inputs["x"]).requires_grad_()
    given["gate"] = sliced(inputs["gate"]).requires_grad_()
    with ops.use("triton"):
        out = ops.gated_linear(**given)
    of_x, of_gate = torch.autograd.grad(out, [given["x"], given["gate"]], grad)
    assert of_x.stride() == given["x"].stride() != of_gate.stride()
    assert of_gate.is_contiguous()


def test_x_that_no_two_strides_reach_has_its_gradient():
    case, inputs, grad = of_rows((2, 3, 4), torch.float16)
    odd = inputs["x"].permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    assert_kernels_accurate(case, {**inputs, "x": odd}, grad)


# -- Dtypes.


def under_autocast(case, inputs, grad, dtype, *, implementation="triton"):
    def run(given):
        with torch.autocast(DEVICE, dtype=dtype), ops.use(implementation):
            return case.run(given)

    return accuracy.results(run, inputs, grad)


@each_half
@pytest.mark.parametrize("given", ["all fp32", "residual fp32", "residual and dropout fp32"])
def test_a_residual_in_fp32_stays_as_exact_as_it_is(given, dtype):
    case, inputs, grad = drawn("N9 C40 O36", torch.float32)
    for name in ("x", "gate", "weight", "dropout"):
        if given == "residual fp32" or (given != "all fp32" and name != "dropout"):
            inputs[name] = inputs[name].to(dtype)
    found = under_autocast(case, inputs, grad, dtype)
    assert found["output"].dtype == torch.float32
    assert all(found[f"grad {n}"].dtype == t.dtype for n, t in cases.differentiable(inputs).items())
    assert torch.equal(found["grad residual"], grad)
    eager = under_autocast(case, inputs, grad, dtype, implementation="torch")
    assert {n: t.dtype for n, t in eager.items()} == {n: t.dtype for n, t in found.items()}
    assert_accurate(found, eager, accuracy.exact_results(case, inputs, grad))


@each_half
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_the_result_has_the_dtype_that_pytorch_promotes_to(implementation, dtype):
    case, inputs, _ = drawn(dtype=torch.float32)
    for residual, expected in (
        (None, dtype),
        (inputs["residual"], torch.float32),
        (inputs["residual"].to(dtype), dtype),
    ):
        given = {**inputs, "residual": residual}
        with torch.autocast(DEVICE, dtype=dtype), ops.use(implementation):
            assert case.run(given).dtype == expected


def test_a_residual_in_16_bits_has_its_gradient_in_16_bits():
    case, inputs, grad = drawn(dtype=torch.float32)
    inputs["residual"] = inputs["residual"].bfloat16()  # beside fp16 the result is fp32
    found = under_autocast(case, inputs, grad, torch.float16)
    assert found["output"].dtype == torch.float32
    assert torch.equal(found["grad residual"], grad.bfloat16())


def test_products_in_tf32_are_as_accurate_as_those_of_rounded_operands():
    case, inputs, grad = drawn("N9 C40 O36", torch.float32)
    with products_in(TF32):
        found = results_of(case, inputs, grad)
    exact = accuracy.exact_results(case, inputs, grad)
    for name, value in found.items():
        error, _ = accuracy.relative_errors(value, exact[name])
        assert error < 2**-10, name


def test_fp64_is_computed_by_pytorch_and_refused_by_the_kernels():
    case, inputs, _ = drawn(dtype=torch.float64)
    assert case.run(inputs).dtype == torch.float64
    with ops.use("triton"), pytest.raises(TypeError, match=r"not torch\.float64"):
        case.run(inputs)


@each_half
def test_gates_far_from_zero_stay_finite(dtype):
    case, inputs, grad = drawn(dtype=dtype)
    assert_kernels_accurate(case, {**inputs, "gate": inputs["gate"] * 20}, grad)


# -- Gradients.


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "asked", [("x",), ("gate",), ("weight",), ("residual",), ("x", "weight"), ("gate", "residual")]
)
def test_gradients_that_are_not_asked_for_change_no_other(asked, dtype):
    case, inputs, grad = drawn("N9 C40 O36", dtype)
    every = results_of(case, inputs, grad)
    given = {name: t.detach().requires_grad_(name in asked) for name, t in inputs.items()}
    with ops.use("triton"):
        out = case.run(given)
    found = torch.autograd.grad(out, [given[name] for name in asked], grad)
    for name, value in zip(asked, found, strict=True):
        assert torch.equal(value, every[f"grad {name}"]), name


def test_the_gradient_of_the_residual_launches_no_kernel(monkeypatch):
    case, inputs, grad = drawn()
    given = {**inputs, "residual": inputs["residual"].requires_grad_()}
    with ops.use("triton"):
        out = case.run(given)
    monkeypatch.setattr(launch, "launch_backward", None)
    (found,) = torch.autograd.grad(out, [given["residual"]], grad)
    assert torch.equal(found, grad)


def test_inputs_but_the_residual_are_all_that_is_kept():
    case, inputs, _ = drawn()
    kept = []
    given = {n: t.requires_grad_(n != "dropout") for n, t in inputs.items()}
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        ops.use("triton"),
    ):
        case.run(given)
    expected = {given[name].data_ptr() for name in ("x", "gate", "weight", "dropout")}
    assert {t.data_ptr() for t in kept} == expected


@each_dtype
def test_the_same_input_gives_the_same_bits(dtype):
    case, inputs, grad = drawn("N9 C40 O36", dtype)
    first, second = results_of(case, inputs, grad), results_of(case, inputs, grad)
    assert all(torch.equal(second[name], value) for name, value in first.items())
