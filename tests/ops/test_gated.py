"""The gate by its kernels against the equation in fp64, and in a program.

On a GPU where there is one, else in Triton's interpreter, which is why most sizes are small.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.ops.gated import launch, variants
from megafold.ops.gated import library as _library  # noqa: F401, registers
from megafold.ops.recording import launches
from tests.numerics import DEVICE, assert_accurate, draw
from tests.ops.layer_norms import (
    DTYPES,
    HALF,
    ON_GPU,
    assert_kernels_accurate,
    assert_shape_accurate,
    results_of,
)

OP = "gated"
OWN, SHARED = "S3 N7 A24", "S5 N7 A24 shared"
OPERATORS = (torch.ops.megafold.gated.default, torch.ops.megafold.gated_backward.default)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_half = pytest.mark.parametrize("dtype", HALF)
each_shape = pytest.mark.parametrize("shape", [OWN, SHARED])
each_call = pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])


def drawn(shape: str = SHARED, dtype: torch.dtype = torch.float16, residual: bool = True):
    case = cases.case(OP, shape)
    inputs, grad = draw(case, dtype, DEVICE)
    return case, inputs if residual else {**inputs, "residual": None}, grad


def fused(inputs):
    with ops.use("triton"):
        return ops.gated(**inputs)


def leaves_of(inputs, names=("x", "gate", "residual")):
    leaves = {n: inputs[n].detach().requires_grad_() for n in names if inputs[n] is not None}
    return {**inputs, **leaves}, list(leaves.values())


def assert_same(found, expected):
    assert [name for name, t in expected.items() if not torch.equal(found[name], t)] == []


@each_dtype
@pytest.mark.parametrize(
    "shape",
    [
        OWN,
        SHARED,
        "S1 N1 A1",
        "S1 N7 A24 shared",
        "S3 N5 A17 shared",
        "S37 N3 A200 shared",
        "S40 N1 A128 shared",  # so few gates that groups of rows have programs of their own
        "S2 N3 A1030",
        pytest.param("S48 N384 A768", marks=ON_GPU),
        pytest.param("S48 N384 A768 shared", marks=ON_GPU),
        pytest.param("S48 N3088 A128 shared", marks=ON_GPU),
    ],
)
def test_output_and_gradients_are_as_accurate_as_eager(shape, dtype):
    assert_shape_accurate(OP, shape, dtype)


@each_dtype
@each_shape
def test_the_residual_may_be_left_out(shape, dtype):
    assert_kernels_accurate(*drawn(shape, dtype, residual=False))


@pytest.mark.parametrize(
    "given",
    [lambda g: g[0], lambda g: g[:1], lambda g: g[:, :1], lambda g: g[:1, :1], lambda g: g[0, 0]],
    ids=["[N, C]", "[1, N, C]", "[S, 1, C]", "[1, 1, C]", "[C]"],
)
def test_a_gate_may_be_shared_in_any_way(given):
    case, inputs, grad = drawn(OWN)
    assert_kernels_accurate(case, {**inputs, "gate": given(inputs["gate"]).clone()}, grad)


@each_half
def test_gates_far_from_zero_stay_finite(dtype):
    case, inputs, grad = drawn(dtype=dtype)
    assert_kernels_accurate(case, {**inputs, "gate": inputs["gate"] * 20}, grad)


@pytest.mark.parametrize("rows", [1, 4, 128])
@each_shape
def test_rows_and_channels_are_shared_out_in_any_way(shape, rows):
    case, inputs, grad = drawn(shape, torch.float32)
    config = ops.Config({"ROWS": rows, "BLOCK_C": 16}, 4, 1)
    with ops.use_config(launch.FORWARD, config), ops.use_config(launch.BACKWARD, config):
        assert_kernels_accurate(case, inputs, grad)


@pytest.mark.parametrize("lead", [(), (1,), (5,), (1, 5), (2, 1, 5), (2, 3, 5)], ids=str)
def test_rows_may_have_any_dimensions(lead):
    case, inputs, grad = drawn("S2 N15 A24")

    def some(t: torch.Tensor) -> torch.Tensor:
        return t.flatten(0, 1)[: math.prod(lead)].view(*lead, 24)

    assert_kernels_accurate(case, {name: some(t) for name, t in inputs.items()}, some(grad))


LAID_OUT = {
    "cut out of wider rows": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
    "channels apart": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "rows cut off": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    "rows in another order": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("how", LAID_OUT)
@each_shape
def test_strides_change_no_bit(shape, how):
    case, inputs, grad = drawn(shape)
    given = {name: LAID_OUT[how](t) for name, t in inputs.items()}
    assert_same(results_of(case, given, LAID_OUT[how](grad)), results_of(case, inputs, grad))


@each_shape
def test_what_the_model_gives_is_not_copied(shape):
    """x of windows, cut off behind the last atom; a gate within a wider projection."""
    _, inputs, grad = drawn(shape)
    inputs["x"] = LAID_OUT["rows cut off"](inputs["x"])
    inputs["gate"] = torch.cat([inputs["gate"]] * 4, dim=-1)[..., 72:]
    given, leaves = leaves_of(inputs)
    with launches(run=True) as found:
        torch.autograd.grad(fused(given), leaves, grad)
    assert [one.kernel for one in found] == list(launch.KERNELS)
    for one in found:
        assert {given["x"].data_ptr(), given["gate"].data_ptr()} <= {
            t.data_ptr() for t in one.tensors
        }


@each_shape
def test_one_gradient_for_all(shape):
    case, inputs, grad = drawn(shape)
    for one in (grad[:1], grad[:1, :1, :1]):
        expanded = one.expand_as(grad)
        expected = results_of(case, inputs, expanded.contiguous())
        assert_same(results_of(case, inputs, expanded), expected)


@pytest.mark.parametrize("names", [("x",), ("gate",), ("residual",), ("gate", "residual")], ids=str)
@each_shape
def test_gradients_asked_for_are_those_of_all(shape, names):
    case, inputs, grad = drawn(shape)
    expected = results_of(case, inputs, grad)
    given, leaves = leaves_of(inputs, names)
    with launches(run=True) as found:
        gradients = torch.autograd.grad(fused(given), leaves, grad)
    # The residual's gradient is that of the output.
    assert len(found) == (1 if names == ("residual",) else 2)
    for name, value in zip(names, gradients, strict=True):
        assert torch.equal(value, expected[f"grad {name}"]), name


@pytest.mark.parametrize("lead", [(0,), (0, 3), (3, 0)], ids=str)
def test_no_rows_give_no_result_and_zero_gradients(lead):
    x = torch.empty(*lead, 8, device=DEVICE, requires_grad=True)
    gate = torch.ones(1, *lead[1:], 8, device=DEVICE, requires_grad=True)
    out = fused({"x": x, "gate": gate, "residual": x})
    assert out.shape == x.shape
    of_x, of_gate = torch.autograd.grad(out.sum(), [x, gate])
    assert of_x.shape == x.shape
    assert (of_gate == 0).all()


@each_shape
@each_dtype
def test_the_same_input_gives_the_same_bits(shape, dtype):
    call = drawn(shape, dtype)
    assert_same(results_of(*call), results_of(*call))


def test_second_backward_gives_the_same_gradients_and_inputs_are_all_that_is_kept():
    _, inputs, grad = drawn()
    given, leaves = leaves_of(inputs)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = fused(given)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    with ops.use("torch"):  # the choice is that of the forward call
        second = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert {t.data_ptr() for t in kept} == {given[name].data_ptr() for name in ("x", "gate")}


def test_second_derivative_is_refused_with_a_way_out():
    _, inputs, grad = drawn()
    given, leaves = leaves_of(inputs)
    first = torch.autograd.grad(fused(given), leaves, grad, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'^gated.*derivative.*use\("torch"\)'):
        torch.autograd.grad(sum(g.sum() for g in first), leaves)


# -- Dtypes.


@each_half
@each_shape
@pytest.mark.parametrize("of_residual", ["fp32", "16 bits", None])
def test_under_autocast_an_fp32_residual_stays_as_exact_as_it_is(shape, of_residual, dtype):
    case, inputs, grad = drawn(shape, torch.float32, residual=of_residual is not None)
    if of_residual == "16 bits":
        inputs["residual"] = inputs["residual"].to(dtype)

    def under_autocast(implementation):
        def run(given):
            with torch.autocast(DEVICE, dtype=dtype), ops.use(implementation):
                return case.run(given)

        return accuracy.results(run, inputs, grad)

    found, eager = under_autocast("triton"), under_autocast("torch")
    assert found["output"].dtype == (torch.float32 if of_residual == "fp32" else dtype)
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in eager.items()}
    assert_accurate(found, eager, accuracy.exact_results(case, inputs, grad))


def test_fp64_is_computed_by_pytorch_and_refused_by_the_kernels():
    case, inputs, _ = drawn(dtype=torch.float64)
    assert case.run(inputs).dtype == torch.float64
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        fused(inputs)


def test_more_rows_than_32_bits_count_are_refused_by_the_kernels():
    x = torch.empty(1, device="meta").expand(2**31, 1)
    with (
        ops.use("triton"),
        pytest.raises(NotImplementedError, match=r"up to \d+ rows, and x has 2"),
    ):
        ops.gated(x, x)


# -- torch.library, torch.compile, checkpoints; what is refused, and what is said.


@each_call
@each_shape
def test_registration_passes_opcheck(shape, residual):
    _, inputs, grad = drawn(shape, residual=residual)
    inputs["gate"] = inputs["gate"][0] if "shared" in shape else inputs["gate"]
    forward, backward = OPERATORS
    # It has no derivative, and says so.
    tests = ("test_schema", "test_faketensor")
    for asked in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(
            backward, (grad, inputs["x"], inputs["gate"], asked), test_utils=tests
        )
    torch.library.opcheck(forward, tuple(leaves_of(inputs)[0].values()))


@each_call
@each_shape
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=ON_GPU)])
def test_compiles_into_one_graph(backend, shape, residual):
    case, inputs, grad = drawn(shape, residual=residual)
    torch.compiler.reset()
    compiled = torch.compile(fused, backend=backend, fullgraph=True)
    assert_same(accuracy.results(compiled, inputs, grad), results_of(case, inputs, grad))


def test_checkpointing_changes_no_bit():
    case, inputs, grad = drawn()

    def checkpointed(given):
        return checkpoint(fused, given, use_reentrant=False)

    assert_same(accuracy.results(checkpointed, inputs, grad), results_of(case, inputs, grad))


@each_shape
def test_explain_names_both_kernels_and_how_many_share_a_gate(shape):
    _, inputs, _ = drawn(shape)
    with ops.use("triton"):
        forward, backward, *shared = ops.explain(OP, **inputs).kernels
    assert [line.split(":")[0] for line in (forward, backward)] == list(launch.KERNELS)
    expected = "5 rows share a gate, whose gradient is added up in registers"
    assert shared == [expected] * ("shared" in shape)


BAD = {
    "x of no dimension": ("x", lambda t: t[0, 0, 0], r"x has shape \(\), expected \[\.\.\., C\]"),
    "fewer gates": ("gate", lambda t: t[:, :5], r"gate has shape \(1, 5, 24\), .* C = 24 and .* x"),
    "one channel": ("gate", lambda t: t[..., :1], r"gate has shape \(1, 7, 1\), .* C = 24"),
    "more dimensions": ("gate", lambda t: t[None], r"gate has shape \(1, 1, 7, 24\), .* x of"),
    "residual": ("residual", lambda t: t[:1], r"residual has shape \(1, 7, 24\), .* = \(5, 7,"),
}  # fmt: skip


@pytest.mark.parametrize("which", BAD)
def test_what_does_not_fit_is_refused_with_what_would(which):
    name, change, message = BAD[which]
    _, inputs, _ = drawn()
    with pytest.raises(ValueError, match=rf"^gated: {message}"):
        ops.gated(**{**inputs, name: change(inputs[name])})


def test_every_kernel_ships():
    shipped = variants.variants()
    assert len({variant.name for variant in shipped}) == len(shipped)
    assert {variant.name.split()[0] for variant in shipped} == set(launch.KERNELS)
    assert {variant.constants["SHARED"] for variant in shipped} == {True, False}
