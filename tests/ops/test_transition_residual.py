"""The transition added to its residual, by the kernels: ``x + transition(x)`` in no pass more."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.bench.memory import saved_bytes
from megafold.ops.recording import launches
from megafold.ops.transition import launch, library
from megafold.ops.transition.variants import variants
from tests.numerics import DEVICE, assert_accurate, assert_alike
from tests.ops import equations
from tests.ops.test_transition import DTYPES, ON_GPU, ONE_HALF, drawn, reference, three_results
from tests.ops.test_transition import fused as alone
from tests.ops.test_transition_composition import ARGUMENTS, EPS, assert_same, leaves_of

SHAPES = [
    "M67 C32 H128",
    "M65 C24 H40",  # no power of two, no multiple of a block
    "M40 C128 H96",
    "M33 C200 H72",  # wider than the fused kernels hold
    pytest.param("M4099 C128 H512", marks=ON_GPU),
    pytest.param("M12321 C64 H256", marks=ON_GPU),
    pytest.param("M999 C768 H1536", marks=ON_GPU),
]
EACH = ["M37 C16 H32", "M37 C136 H32"]  # one for each plan
each_plan = pytest.mark.parametrize("shape", EACH)


def fused(inputs, **options):
    return alone(inputs, residual=True, **options)


def under_autocast(run, dtype=torch.float16, **options):
    def call(given):
        with torch.autocast(DEVICE, dtype=dtype):
            return run(given, residual=True, **options)

    return call


# -- What is computed.


def test_reference_is_x_and_the_equation():
    inputs, grad = drawn("M37 C16 H48", torch.float64)

    def equation(given):
        return given["x"] + equations.transition(**given)

    expected = accuracy.results(equation, inputs, grad)
    found = accuracy.results(lambda given: reference(given, residual=True), inputs, grad)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_every_gradient_are_as_accurate_as_eager(shape, dtype):
    assert_accurate(*three_results(*drawn(shape, dtype), residual=True))


@pytest.mark.parametrize("dtype", [torch.float32, *ONE_HALF])
@pytest.mark.parametrize("shape", ["M300 C32 H48", "M300 C136 H48"])
def test_rows_in_many_chunks_are_as_accurate_as_eager(shape, dtype, monkeypatch):
    parts = [slice(0, 128), slice(128, 256), slice(256, 300)]
    monkeypatch.setattr(launch, "chunks", lambda *sizes: parts)
    inputs, grad = drawn(shape, dtype)
    assert_accurate(*three_results(inputs, grad, residual=True))
    # Wide rows are all taken at once where there are gradients, and in chunks where there are none.
    found, eager = accuracy.results(fused, inputs), accuracy.results(reference_on_x, inputs)
    doubles = {name: t.double() for name, t in inputs.items()}
    assert_accurate(found, eager, accuracy.results(reference_on_x, doubles))


def reference_on_x(inputs):
    return reference(inputs, residual=True)


@pytest.mark.parametrize("without", [("norm_weight",), ("norm_bias",), ARGUMENTS[1:3]], ids=str)
@each_plan
def test_norm_parameters_may_be_left_out(shape, without):
    inputs, grad = drawn(shape)
    assert_accurate(*three_results(inputs | dict.fromkeys(without), grad, residual=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", ["M37 C16 H32", "M37 C136 H320"])
def test_without_a_norm_x_is_added_all_the_same(shape, dtype):
    """Not reached by the public function: what the operators allow."""
    inputs, grad = drawn(shape, dtype)
    inputs = {name: t for name, t in inputs.items() if "norm" not in name}

    def by_kernels(given):
        x, *weights = given.values()
        return library.apply(x, None, None, *weights, None, True)

    def plainly(given):
        x, gate, value, out = given.values()
        return x + (torch.nn.functional.silu(x @ gate.T) * (x @ value.T)) @ out.T

    doubles = {name: t.double() for name, t in inputs.items()}
    runs = (by_kernels, inputs), (plainly, inputs), (plainly, doubles)
    assert_accurate(*(accuracy.results(run, given, grad) for run, given in runs))
    assert_accurate(*(accuracy.results(run, given) for run, given in runs))


@pytest.mark.parametrize("dtype", DTYPES)
@each_plan
def test_without_an_update_x_and_its_gradient_are_exact(shape, dtype):
    inputs, grad = drawn(shape, dtype)
    inputs["weight_out"] = torch.zeros_like(inputs["weight_out"])
    found = accuracy.results(fused, inputs, grad)
    assert torch.equal(found["output"], inputs["x"])
    assert torch.equal(found["grad x"], grad)


@pytest.mark.parametrize("shape", ["M300 C32 H48", *EACH])
def test_the_same_input_gives_the_same_bits(shape):
    inputs, grad = drawn(shape)
    assert_same(accuracy.results(fused, inputs, grad), accuracy.results(fused, inputs, grad))


@pytest.mark.parametrize("channels", [8, 136])
@pytest.mark.parametrize(("rows", "units"), [(0, 16), (3, 0), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_empty_inputs_give_x_and_its_gradient(rows, units, channels, dtype):
    inputs, grad = drawn(f"M{rows} C{channels} H16", dtype)
    inputs |= {name: inputs[name][:units] for name in ("weight_gate", "weight_value")}
    inputs["weight_out"] = inputs["weight_out"][:, :units]
    for found in (accuracy.results(fused, inputs, grad), accuracy.results(fused, inputs)):
        assert torch.equal(found.pop("output"), inputs["x"])
        assert torch.equal(found.pop("grad x", grad), grad)
        assert all((value == 0).all() for value in found.values())


# -- Gradients of the output: laid out in any way, and never written.


@each_plan
def test_any_strides_of_x_and_of_the_gradient(shape):
    inputs, grad = drawn(shape)
    expected = accuracy.results(fused, inputs, grad)

    def apart(t):
        return torch.stack([t, t], dim=-1)[..., 0]

    def in_wider_rows(t):
        return torch.cat([t, t], dim=-1)[..., : t.shape[-1]]

    for spread in (apart, in_wider_rows):
        assert_same(
            accuracy.results(fused, {**inputs, "x": spread(inputs["x"])}, spread(grad)), expected
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@each_plan
def test_one_gradient_for_all(shape, dtype):
    inputs, grad = drawn(shape, dtype)
    for one in (grad[:1], grad[:1, :1]):
        expanded = one.expand_as(grad)
        assert_alike(
            accuracy.results(fused, inputs, expanded),
            accuracy.results(fused, inputs, expanded.contiguous()),
        )
    inputs, leaves = leaves_of(inputs)
    fused(inputs).sum().backward()
    expected = accuracy.results(fused, inputs, torch.ones_like(grad))
    del expected["output"]
    assert_alike(
        {f"grad {n}": leaf.grad for n, leaf in zip(ARGUMENTS, leaves, strict=True)}, expected
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@each_plan
def test_the_gradient_of_the_output_is_left_as_it_was(shape, dtype):
    inputs, grad = drawn(shape, dtype)
    before = grad.clone()
    found = accuracy.results(fused, inputs, grad)
    assert torch.equal(grad, before)
    assert found["grad x"].data_ptr() != grad.data_ptr()


@each_plan
@pytest.mark.parametrize(
    "names",
    [("x",), ("norm_weight",), ("norm_bias",), ("weight_gate",), ("weight_out",),
     ("x", "weight_value"), ("norm_bias", "weight_value")],
    ids=str,
)  # fmt: skip
def test_gradients_asked_for_are_those_of_all(shape, names):
    inputs, grad = drawn(shape)
    expected = accuracy.results(fused, inputs, grad)
    inputs, leaves = leaves_of(inputs, names)
    found = torch.autograd.grad(fused(inputs), leaves, grad)
    for name, value in zip(names, found, strict=True):
        assert torch.equal(value, expected[f"grad {name}"]), name


@each_plan
def test_second_backward_gives_the_same_gradients(shape):
    inputs, grad = drawn(shape)
    inputs, leaves = leaves_of(inputs)
    out = fused(inputs)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad, create_graph=True)  # the operator
    third = torch.autograd.grad(out, leaves, grad)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


# -- fp32 rows under autocast.


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=ON_GPU)])
@each_plan
def test_an_fp32_x_stays_fp32_under_autocast(shape, dtype):
    inputs, grad = drawn(shape, torch.float32)
    found = accuracy.results(under_autocast(alone, dtype), inputs, grad)
    eager = accuracy.results(under_autocast(reference, dtype), inputs, grad)
    assert {name: t.dtype for name, t in found.items()} == dict.fromkeys(found, torch.float32)
    assert eager["output"].dtype == torch.float32
    doubles = {name: t.double() for name, t in inputs.items()}
    assert_accurate(found, eager, accuracy.results(reference_on_x, doubles, grad))


@each_plan
def test_an_fp32_x_and_its_gradient_are_not_rounded_under_autocast(shape):
    inputs, grad = drawn(shape, torch.float32)
    inputs["weight_out"] = torch.zeros_like(inputs["weight_out"])
    for upstream in (grad, grad[:1].expand_as(grad)):
        found = accuracy.results(under_autocast(alone), inputs, upstream)
        assert torch.equal(found["output"], inputs["x"])
        assert torch.equal(found["grad x"], upstream)


@each_plan
def test_an_fp32_x_in_many_chunks_under_autocast(shape, monkeypatch):
    inputs, grad = drawn(shape.replace("M37", "M300"), torch.float32)
    expected = accuracy.results(under_autocast(alone), inputs, grad)
    parts = [slice(0, 128), slice(128, 256), slice(256, 300)]
    monkeypatch.setattr(launch, "chunks", lambda *sizes: parts)
    found = accuracy.results(under_autocast(alone), inputs, grad)
    assert torch.equal(found["output"], expected["output"])
    assert torch.equal(found["grad x"], expected["grad x"])
    with torch.no_grad():
        assert torch.equal(under_autocast(alone)(inputs), expected["output"])


def test_two_dtypes_of_16_bits_promote_to_fp32():
    inputs, _ = drawn(EACH[0], torch.bfloat16)
    assert under_autocast(alone)(inputs).dtype == torch.float32
    assert under_autocast(reference)(inputs).dtype == torch.float32


# -- No pass more, and nothing kept.


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@each_plan
def test_no_kernel_is_launched_beside_those_without_it(shape, dtype):
    def kernels(run):
        with launches(run=True) as found:
            accuracy.results(run, *drawn(shape, dtype))
        return [one.kernel for one in found]

    assert kernels(fused) == kernels(alone)


@pytest.mark.parametrize("gradients", [False, True])
def test_the_library_adds_x_to_its_product(gradients, monkeypatch):
    inputs, _ = leaves_of(drawn(EACH[1])[0])
    added = mock.Mock(side_effect=torch.addmm)
    monkeypatch.setattr(torch, "addmm", added)
    with torch.set_grad_enabled(gradients):
        fused(inputs)
    (x, *_), _ = added.call_args
    assert added.call_count == 1
    assert x.data_ptr() == inputs["x"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@each_plan
def test_as_much_is_kept_as_without_it(shape, dtype):
    inputs, _ = leaves_of(drawn(shape, dtype)[0])
    kept = [saved_bytes(lambda run=run: run(inputs), inputs.values()) for run in (fused, alone)]
    assert kept[0] == kept[1]


# -- torch.library, torch.compile, checkpoints.


@pytest.mark.parametrize("norms", [True, False], ids=["norms", "no norms"])
@pytest.mark.parametrize("autocast", [False, True], ids=["alike", "x in fp32"])
@pytest.mark.parametrize(
    ("shape", "name"), [(EACH[0], "transition"), (EACH[1], "transition_keeping")]
)
def test_registration_passes_opcheck(shape, name, autocast, norms):
    inputs, grad = drawn(shape)
    if not norms:
        inputs |= {"norm_weight": None, "norm_bias": None}
    if autocast:
        inputs["x"], grad = inputs["x"].float(), grad.float()
    tensors = [inputs[name] for name in ARGUMENTS]
    operator = getattr(torch.ops.megafold, name)
    _, *kept = operator(*tensors, EPS, True)
    options = [EPS, True] if name == "transition" else [True]
    torch.library.opcheck(
        getattr(torch.ops.megafold, f"{name}_backward").default,
        (grad, *tensors, *kept, *options, [True, norms, norms, True, True, True]),
        test_utils=("test_schema", "test_faketensor"),  # it has no derivative, and says so
    )
    for t in tensors:
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(operator.default, (*tensors, EPS, True))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=ON_GPU)])
@each_plan
def test_compiles_into_one_graph(shape, backend):
    torch.compiler.reset()
    compiled = torch.compile(fused, backend=backend, fullgraph=True, dynamic=True)
    for rows in ("M37", "M20"):
        inputs, grad = drawn(shape.replace("M37", rows))
        assert_same(accuracy.results(compiled, inputs, grad), accuracy.results(fused, inputs, grad))


@each_plan
def test_checkpointing_changes_no_bit(shape):
    inputs, grad = drawn(shape)

    def checkpointed(given):
        return checkpoint(fused, given, use_reentrant=False)

    assert_same(accuracy.results(checkpointed, inputs, grad), accuracy.results(fused, inputs, grad))


# -- What is refused, and what is said.


def test_other_than_yes_or_no_is_refused():
    inputs, _ = drawn(EACH[0])
    message = r"^transition: residual must be True or False \(whether x is added .*\), got Tensor"
    with pytest.raises(TypeError, match=message):
        ops.transition(**inputs, residual=inputs["x"])
    with pytest.raises(TypeError, match=r"got NoneType"):
        ops.explain("transition", **inputs, residual=None)


def test_pytorch_s_own_is_the_reference():
    inputs, grad = drawn(EACH[0])

    def by_torch(given):
        with ops.use("torch"):
            return ops.transition(**given, residual=True)

    assert_same(
        accuracy.results(by_torch, inputs, grad), accuracy.results(reference_on_x, inputs, grad)
    )


def test_explain_says_what_adds():
    def said(shape, dtype=torch.float16, autocast=False):
        inputs, _ = drawn(shape, dtype)
        with ops.use("triton"), torch.autocast(DEVICE, dtype=torch.float16, enabled=autocast):
            before = ops.explain("transition", **inputs).kernels
            *others, last = ops.explain("transition", **inputs, residual=True).kernels
        assert others == list(before)
        return last

    assert said(EACH[0]) == "residual: added in the kernels of the output and of the gradient of x"
    assert "x added by torch.addmm, its gradients in the kernel of the norm" in said(EACH[1])
    assert "x added in a pass of its own" in said(EACH[1], torch.float32, True)


def test_kernels_that_add_are_compiled_ahead_of_time():
    """Those of the tables, of the products and Hopper's, also of fp32 rows under autocast."""
    adding = {
        v.name.split()[0]
        for v in variants()
        if v.constants.get("RESIDUAL") or v.signature.get("p_added", "constexpr") != "constexpr"
    }
    own = {"transition.norm_backward"}
    hoppers = {v.name.split()[0] for v in variants() if ".hopper_" in v.name}
    hoppers -= {"transition.hopper_grad_weights"}
    assert adding == {launch.FORWARD, launch.GRAD_ROWS, *own, *hoppers}
    names = [v.name for v in variants()]
    assert len(set(names)) == len(names)
    case = cases.case("transition", "M147456 C128 H512")
    assert any("residual float32" in name and f"C{case.output_shape[-1]}" in name for name in names)
