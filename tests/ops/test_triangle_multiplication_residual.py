"""Dropout and the residual within triangle multiplication's kernels, against the equation in fp64.

On a GPU where there is one, else in Triton's interpreter, which is why most sizes are small.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megafold import ops
from megafold.bench import accuracy
from megafold.bench.cases import Case, Inputs
from megafold.ops.triangle_multiplication import launch
from tests.numerics import DEVICE, assert_accurate
from tests.ops import equations
from tests.ops.layer_norms import assert_kernels_accurate, results_of
from tests.ops.test_triangle_multiplication import (
    OP,
    assert_same,
    blocks_of,
    drawn,
    each_dtype,
    each_half,
    each_way,
)

# Letters of z that dropout does not repeat along; "BNNC" in full, "" a number.
SHARED = ("..NC", ".N.C", "BNNC", "B.NC", "C", "N.", "BNN.", "")


def of_shape(letters: str, z: torch.Tensor) -> tuple[int, ...]:
    """The shape of dropout for z: dimensions by letter, 1 where there is a dot."""
    last = zip(letters, z.shape[4 - len(letters) :], strict=True)
    return tuple(1 if letter == "." else size for letter, size in last)


def with_dropout(inputs: Inputs, letters: str = "..NC", seed: int = 1) -> Inputs:
    """A quarter of the channels left out; the others times what is not a power of two."""
    shape = of_shape(letters, inputs["z"])
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.25
    return {**inputs, "dropout": (keep / 0.75).to(inputs["z"])}


def added_to_z(
    shape: str = "B1 N6 C16", dtype: torch.dtype = torch.float16, letters: str | None = "..NC"
) -> tuple[Case, Inputs, torch.Tensor]:
    """A case with the residual, and with dropout unless it has no letters."""
    case, inputs, grad = drawn(shape, dtype)
    case = replace(case, options={**case.options, "residual": True})
    return case, inputs if letters is None else with_dropout(inputs, letters), grad


# -- Accuracy.


@each_dtype
@pytest.mark.parametrize("size", ["B1 N17 C24", "B1 N11 C64 incoming", "B2 N5 C32"])
def test_dropout_and_residual(size, dtype):
    assert_kernels_accurate(*added_to_z(size, dtype))


@each_half
def test_one_token(dtype):
    assert_kernels_accurate(*added_to_z("B1 N1 C24", dtype))


@each_dtype
@each_way
def test_dropout_alone(way, dtype):
    case, inputs, grad = drawn(f"B1 N9 C24{way}", dtype)
    assert_kernels_accurate(case, with_dropout(inputs), grad)


@each_dtype
@each_way
def test_residual_alone(way, dtype):
    assert_kernels_accurate(*added_to_z(f"B1 N9 C64{way}", dtype, None))


@each_dtype
@pytest.mark.parametrize("letters", SHARED)
def test_dropout_may_be_shared_in_any_way(letters, dtype):
    assert_kernels_accurate(*added_to_z("B2 N5 C24", dtype, letters))


@each_half
@pytest.mark.parametrize("letters", [None, "..NC"], ids=["residual", "both"])
def test_without_a_mask(letters, dtype):
    case, inputs, grad = added_to_z("B1 N9 C24", dtype, letters)
    assert_kernels_accurate(case, {**inputs, "mask": None}, grad)


@each_half
def test_without_norms_parameters(dtype):
    case, inputs, grad = added_to_z("B1 N9 C24", dtype)
    names = [name for name in inputs if name.startswith("norm")]
    assert_kernels_accurate(case, {**inputs, **dict.fromkeys(names)}, grad)


@pytest.mark.gpu
@each_dtype
@each_way
@pytest.mark.parametrize("letters", ["..NC", ".N.C"])
@pytest.mark.parametrize("size", ["B1 N384 C128", "B1 N257 C128", "B2 N100 C64"])
def test_large_sizes(size, letters, way, dtype):
    assert_kernels_accurate(*added_to_z(size + way, dtype, letters))


@pytest.mark.parametrize("letters", SHARED)
def test_the_reference_is_the_equation(letters):
    case, inputs, grad = added_to_z("B2 N3 C8", torch.float64, letters)
    for residual in (False, True):
        of = replace(case, options={**case.options, "residual": residual})

        def equation(given, of=of):
            return equations.triangle_multiplication(**given, **of.options)

        found = accuracy.results(of.run_reference, inputs, grad)
        for name, value in accuracy.results(equation, inputs, grad).items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("kernel", [launch.OUTPUT, launch.GRAD_Z])
@pytest.mark.parametrize(("block_m", "block_o"), [(16, 16), (128, 64)])
def test_block_sizes_change_no_more_than_rounding(kernel, block_m, block_o):
    case, inputs, grad = added_to_z("B2 N5 C40", letters="B.NC")
    with ops.use_config(kernel, blocks_of(kernel, block_m, block_o)):
        assert_kernels_accurate(case, inputs, grad)


# -- What is exact.


@each_dtype
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_where_dropout_leaves_out_all_z_and_its_gradient_pass_unchanged(autocast, dtype):
    """Bit for bit; under autocast z is fp32 beside weights in the dtype."""
    case, inputs, grad = added_to_z("B1 N6 C16", torch.float32 if autocast else dtype)
    inputs["dropout"] = torch.zeros_like(inputs["dropout"])
    under = dtype if autocast and dtype != torch.float32 else None
    found = under_autocast(case, inputs, grad, under)
    assert torch.equal(found.pop("output"), inputs["z"])
    assert torch.equal(found.pop("grad z"), grad)
    assert all((value == 0).all() for value in found.values())


def test_dropout_of_one_is_none():
    case, inputs, grad = added_to_z("B1 N9 C24")
    kept = {**inputs, "dropout": torch.ones_like(inputs["dropout"])}
    expected = results_of(case, {**inputs, "dropout": None}, grad)
    assert_same(results_of(case, kept, grad), expected)


@each_dtype
def test_the_same_input_gives_the_same_bits(dtype):
    case, inputs, grad = added_to_z("B1 N9 C24", dtype)
    assert_same(results_of(case, inputs, grad), results_of(case, inputs, grad))


# -- Dtypes.


def under_autocast(case, inputs, grad, dtype, implementation="triton"):
    """Results under autocast to a dtype; None: without it."""

    enabled = dtype is not None

    def run(given):
        with torch.autocast(DEVICE, dtype=dtype, enabled=enabled), ops.use(implementation):
            return case.run(given)

    return accuracy.results(run, inputs, grad)


@each_half
@pytest.mark.parametrize("given", ["all fp32", "weights not", "weights and dropout not"])
@pytest.mark.parametrize("letters", [None, "..NC"], ids=["residual", "both"])
def test_z_in_fp32_stays_as_exact_as_it_is(letters, given, dtype):
    case, inputs, grad = added_to_z("B1 N9 C24", torch.float32, letters)
    for name, t in inputs.items():
        of_product = t.dim() == 2 and given != "all fp32"  # norms stay fp32, for PyTorch on a CPU
        if of_product or (name == "dropout" and given == "weights and dropout not"):
            inputs[name] = t.to(dtype)
    found = under_autocast(case, inputs, grad, dtype)
    eager = under_autocast(case, inputs, grad, dtype, "torch")
    assert found["output"].dtype == torch.float32
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in eager.items()}
    assert_accurate(found, eager, accuracy.exact_results(case, inputs, grad))


@each_half
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_the_result_has_the_dtype_that_pytorch_promotes_to(implementation, dtype):
    case, inputs, grad = added_to_z(dtype=torch.float32)
    without = replace(case, options={**case.options, "residual": False})
    for of, z, expected in (
        (without, inputs["z"], dtype),
        (case, inputs["z"], torch.float32),
        (case, inputs["z"].to(dtype), dtype),
    ):
        found = under_autocast(of, {**inputs, "z": z}, grad, dtype, implementation)
        assert found["output"].dtype == expected
        assert found["grad z"].dtype == z.dtype


def test_a_z_in_16_bits_of_another_kind_has_its_gradient_in_them():
    case, inputs, grad = added_to_z("B1 N9 C24", torch.float32)
    inputs["z"] = inputs["z"].bfloat16()  # beside fp16 the result is fp32
    inputs["dropout"] = torch.zeros_like(inputs["dropout"])
    found = under_autocast(case, inputs, grad, torch.float16)
    assert found["output"].dtype == torch.float32
    assert torch.equal(found["output"], inputs["z"].float())
    if DEVICE == "cuda":  # the interpreter cuts bf16 off
        assert torch.equal(found["grad z"], grad.bfloat16())
    assert found["grad z"].dtype == torch.bfloat16


def test_fp64_is_computed_by_pytorch_and_refused_by_the_kernels():
    case, inputs, _ = added_to_z(dtype=torch.float64)
    assert case.run(inputs).dtype == torch.float64
    with ops.use("triton"), pytest.raises(TypeError, match=r"not torch\.float64"):
        case.run(inputs)


@pytest.mark.parametrize("shape", ["B0 N4 C16", "B1 N0 C16"])
def test_empty_inputs_give_empty_results_and_zero_gradients(shape):
    case, inputs, grad = added_to_z(shape)
    results = results_of(case, inputs, grad)
    assert results["output"].shape == case.output_shape
    for name, value in results.items():
        assert not value.numel() or (value == 0).all(), name


# -- What is refused.

BAD = {
    "dropout": (ValueError, {"dropout": torch.ones(1, 5, 6, 16)}, r"dropout has shape \(1, 5, 6,"),
    "larger": (ValueError, {"dropout": torch.ones(2, 1, 6, 16)}, r"broadcasts to \[B, N, N, C\] ="),
    "learnt": (
        ValueError,
        {"dropout": torch.ones(16, requires_grad=True)},
        r"dropout of shape \(16,\) requires a gradient, which it does not get",
    ),
    "dtype": (
        TypeError,
        {"dropout": torch.ones(16, dtype=torch.bfloat16)},
        r"dropout is torch.bfloat16, but z is torch.float16",
    ),
    "no tensor": (TypeError, {"dropout": 0.25}, "dropout must be a tensor, got float"),
    "integers": (TypeError, {"dropout": torch.ones(16).long()}, "dropout must be floating point"),
    "elsewhere": (ValueError, {"dropout": torch.ones(16, device="meta")}, "dropout is on meta"),
    "residual": (TypeError, {"residual": torch.ones(16)}, "residual must be True or False"),
}


@pytest.mark.parametrize("which", BAD)
def test_what_does_not_fit_is_refused_with_what_would(which):
    error, wrong, message = BAD[which]
    if which in ("dropout", "larger", "learnt", "dtype"):
        wrong = {n: t.to(DEVICE) if n == "dropout" else t for n, t in wrong.items()}
        if which != "dtype":
            wrong["dropout"] = wrong["dropout"].half()
    _, inputs, _ = drawn("B1 N6 C16")
    with pytest.raises(error, match=rf"^{OP}: .*{message}"):
        ops.triangle_multiplication(**inputs, **wrong)


def test_explain_says_that_the_gradient_is_multiplied_by_a_kernel_of_its_own():
    _, inputs, _ = drawn("B1 N6 C16")
    with ops.use("triton"):
        without = ops.explain(OP, **inputs, residual=True).kernels
        *lines, of_products = ops.explain(OP, **with_dropout(inputs), residual=True).kernels
    assert (*lines[:-1], of_products) == without
    assert lines[-1].startswith("gradient times dropout: ")
