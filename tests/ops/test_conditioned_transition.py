"""The conditioned transition by its kernels: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.bench.memory import peak_bytes, saved_tensors
from megafold.ops.conditioned_transition import library
from megafold.ops.launcher import Launcher
from megafold.ops.precision import TF32, products_in
from megafold.ops.transition import passes
from tests.numerics import DEVICE, assert_case_accurate, draw

ON_GPU = pytest.mark.gpu
# The interpreter cuts bf16 off where a GPU rounds.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=ON_GPU)]
SHAPES = [
    "S2 N33 A64 C32 H128",
    "S2 N33 A64 C32 H128 shared",
    "S2 N9 A136 C24 H40",  # wider than the fused kernels hold
    "S2 N9 A136 C24 H40 shared",
    pytest.param("S4 N384 A768 C384 H1536", marks=ON_GPU),
    pytest.param("S4 N1000 A128 C128 H256 shared", marks=ON_GPU),
]
ARGUMENTS = ("a", "scale", "weight_gate", "weight_value", "weight_out")


def gated(shape="S3 N7 A16 C8 H32", dtype=torch.float16, shared=False):
    """Operands of what follows the norm, and a gradient of its output."""
    inputs, grad = draw(cases.case("conditioned_transition", shape), dtype)
    scale = torch.randn(inputs["a"].shape, generator=torch.Generator().manual_seed(9))
    scale = scale.to(DEVICE, dtype)
    weights = [inputs[name] for name in ("weight_gate", "weight_value", "weight_out")]
    tensors = [inputs["a"], scale[:1] if shared else scale, *weights]
    return dict(zip(ARGUMENTS, tensors, strict=True)), grad


def by_kernels(inputs):
    return library.gated_transition(**inputs)


def plainly(inputs):
    a, scale, gate, value, out = (inputs[name] for name in ARGUMENTS)
    hidden = torch.nn.functional.silu(a @ gate.T) * (a @ value.T)
    return torch.sigmoid(scale) * (hidden @ out.T)


def assert_case_accurate_by_kernels(shape, dtype):
    with ops.use("triton"):
        assert_case_accurate(cases.case("conditioned_transition", shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_every_gradient_are_as_accurate_as_eager(shape, dtype):
    assert_case_accurate_by_kernels(shape, dtype)


def test_products_in_fp32_are_added_up_in_parts(monkeypatch):
    """No sum takes more terms than it must, in TF32 all; in parts the results are the same."""

    def stops(terms: int) -> list[int]:
        return [part.stop for part in passes._parts(terms, torch.device(DEVICE))]

    assert stops(64) == [64]
    assert stops(100) == [64, 128]
    assert stops(833) == [209, 418, 627, 836]
    assert stops(10000) == [2500, 5000, 7500, 10000]
    with products_in(TF32):
        assert stops(10000) == [10000]
    monkeypatch.setattr(passes, "TERMS", 5)
    assert_case_accurate_by_kernels("S2 N9 A136 C24 H40", torch.float32)


@pytest.mark.parametrize(
    "scale_shape", [(3, 7, 16), (1, 7, 16), (7, 16), (16,), (3, 1, 16)], ids=str
)
def test_the_gate_broadcasts_and_its_gradient_is_summed(scale_shape):
    inputs, grad = gated(dtype=torch.float32)
    scale = torch.randn(scale_shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    inputs["scale"] = scale
    found = accuracy.results(by_kernels, inputs, grad)
    for name, value in accuracy.results(plainly, inputs, grad).items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("without", ["norm_weight_s", "norm_bias_gate", "bias_scale"])
def test_parameters_may_be_left_out(without):
    case = cases.case("conditioned_transition", "S2 N5 A16 C8 H32")
    inputs, _ = draw(case, torch.float32)
    inputs[without] = None
    with ops.use("triton"):
        found = case.run(inputs)
    torch.testing.assert_close(found, case.run_reference(inputs))


@pytest.mark.parametrize("names", [("a",), ("scale",), ("weight_out",), ("scale", "weight_gate")])
def test_gradients_asked_for_are_those_of_all(names):
    inputs, grad = gated()
    expected = accuracy.results(by_kernels, inputs, grad)
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    found = torch.autograd.grad(by_kernels(inputs | leaves), list(leaves.values()), grad)
    for name, value in zip(names, found, strict=True):
        assert torch.equal(value, expected[f"grad {name}"]), name


def test_nothing_hidden_is_kept_for_the_backward_pass():
    inputs, _ = gated("S2 N9 A16 C8 H64")
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    saved = saved_tensors(lambda: by_kernels(leaves), leaves.values())
    assert [s.shape for s in saved if not s.existing] == [(2, 9, 16)]


# -- Wide rows in 16 bits, each with a scale of its own: gate and value are kept.

WIDE = "S2 N9 A136 C24 H40"


def scaled(shape=WIDE, dtype=torch.float16):
    """Operands of what follows the norm with the scale's linear layer, and a gradient."""
    inputs, grad = draw(cases.case("conditioned_transition", shape), dtype)
    names = ("a", "s", *ARGUMENTS[2:], "weight_scale", "bias_scale")
    return {name: inputs[name] for name in names}, grad


def with_scale(inputs):
    return library.apply(*inputs.values())


def leaves_of(inputs, names=None):
    asked = {
        n: t.detach().clone().requires_grad_() for n, t in inputs.items() if n in (names or inputs)
    }
    return inputs | asked, list(asked.values())


def test_wide_rows_keep_gate_and_value_where_each_has_a_scale_of_its_own():
    inputs, _ = scaled()
    given, leaves = leaves_of(inputs)
    made = [s.shape for s in saved_tensors(lambda: with_scale(given), leaves) if not s.existing]
    # Logits of the gate, what it is multiplied with, gate and value; their weights as one.
    assert made == [(18, 136), (18, 136), (18, 80), (80, 136)]
    shared = given | {"s": given["s"][:1]}
    made = [s.shape for s in saved_tensors(lambda: with_scale(shared), leaves) if not s.existing]
    assert made == [(9, 136), (2, 9, 136)]


@pytest.mark.parametrize(
    "names",
    [("a",), ("s",), ("weight_value",), ("weight_out",), ("weight_scale",), ("bias_scale",),
     ("s", "weight_gate")],
    ids=str,
)  # fmt: skip
def test_gradients_asked_for_are_those_of_all_where_gate_and_value_are_kept(names):
    inputs, grad = scaled()
    expected = accuracy.results(with_scale, inputs, grad)
    given, leaves = leaves_of(inputs, names)
    found = torch.autograd.grad(with_scale(given), leaves, grad)
    for name, value in zip(names, found, strict=True):
        assert torch.equal(value, expected[f"grad {name}"]), name


def test_what_is_kept_is_written_over_in_the_last_backward_pass_alone():
    given, leaves = leaves_of(scaled()[0])
    grad, kept = scaled()[1], []

    def noted(tensor):
        kept.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        out = with_scale(given)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad, create_graph=True)  # the operator
    assert all(torch.equal(t, before) for t, before in kept)
    third = torch.autograd.grad(out, leaves, grad)
    changed = [t.shape for t, before in kept if not torch.equal(t, before)]
    assert changed == [(18, 136), (18, 80)]  # what the gate is multiplied with; gate and value
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_gate_and_value_are_in_memory_once(monkeypatch):
    """At most: output, logits, what they gate, gate and value or their gradients, activation."""
    inputs, grad = scaled("S2 N512 A136 C24 H272")
    given, leaves = leaves_of(inputs)
    monkeypatch.setattr(Launcher, "__call__", lambda self, *tensors: None)

    def both_passes():
        torch.autograd.grad(with_scale(given), leaves, grad)

    # Without oneDNN, which on some CPUs copies operands of 16 bits before it multiplies them.
    with torch.backends.mkldnn.flags(enabled=False):
        both_passes()  # on a GPU, the library's own memory: it takes that once
        peak = peak_bytes(both_passes, DEVICE)
    a, s, weight = (inputs[name].nbytes for name in ("a", "s", "weight_gate"))
    assert peak <= (3 + 4 + 2) * a + s + 5.1 * weight


@pytest.mark.parametrize("without", [(), ("bias_scale",)])
def test_registration_of_what_keeps_passes_opcheck(without):
    inputs, grad = scaled()
    tensors = [None if name in without else t for name, t in inputs.items()]
    _, *kept = torch.ops.megafold.gated_transition_keeping(*tensors)
    torch.library.opcheck(
        torch.ops.megafold.gated_transition_keeping_backward.default,
        (grad, *tensors, *kept, [t is not None for t in tensors]),
        test_utils=("test_schema", "test_faketensor"),  # it has no derivative, and says so
    )
    for t in tensors:
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(torch.ops.megafold.gated_transition_keeping.default, tensors)


def test_no_graph_is_made_without_gradients():
    inputs, _ = scaled()
    assert not with_scale(inputs).requires_grad
    with torch.no_grad():
        assert not with_scale(leaves_of(inputs)[0]).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_one_gradient_for_all_rows_and_any_strides(dtype):
    inputs, grad = scaled(dtype=dtype)
    expected = accuracy.results(with_scale, inputs, grad[:1, :1].expand_as(grad).contiguous())
    apart = {name: torch.stack([t, t], -1)[..., 0] for name, t in inputs.items()}
    found = accuracy.results(with_scale, apart, grad[:1, :1].expand_as(grad))
    # Rows that are one in memory are read by other threads on a GPU, and added in another order.
    total = "grad bias_scale"
    torch.testing.assert_close(found.pop(total), expected.pop(total), rtol=2e-6, atol=2e-6)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("shape", ["S0 N4 A8 C6 H16", "S2 N0 A136 C6 H16"])
def test_empty_inputs_give_empty_results_and_zero_gradients(shape):
    inputs, grad = gated(shape, torch.float32)
    for name, value in accuracy.results(by_kernels, inputs, grad).items():
        assert (value == 0).all(), name


def test_second_derivative_is_refused_with_a_way_out():
    inputs, grad = gated()
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    first = torch.autograd.grad(by_kernels(leaves), list(leaves.values()), grad, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'no second derivative.*use\("torch"\)'):
        torch.autograd.grad(sum(g.sum() for g in first), list(leaves.values()))


@pytest.mark.parametrize("shared", [False, True])
def test_registration_passes_opcheck(shared):
    inputs, grad = gated("S2 N3 A16 C8 H16", torch.float32, shared)
    scale = inputs["scale"][0].contiguous() if shared else inputs["scale"]
    tensors = [inputs["a"], scale, *(inputs[n] for n in ARGUMENTS[2:])]
    _, ungated = torch.ops.megafold.gated_transition(*tensors)
    torch.library.opcheck(
        torch.ops.megafold.gated_transition_backward.default,
        (grad, *tensors, ungated, [True] * 5),
        test_utils=("test_schema", "test_faketensor"),  # it has no derivative, and says so
    )
    torch.library.opcheck(
        torch.ops.megafold.gated_transition.default, [t.requires_grad_() for t in tensors]
    )


@pytest.mark.parametrize(
    ("run", "draws"), [(by_kernels, gated), (with_scale, scaled)], ids=["gated", "kept"]
)
def test_compiles_into_one_graph_and_checkpointing_changes_no_bit(run, draws):
    inputs, grad = draws()
    expected = accuracy.results(run, inputs, grad)
    torch.compiler.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)

    def checkpointed(given):
        return checkpoint(run, given, use_reentrant=False)

    for function in (compiled, checkpointed):
        for name, value in accuracy.results(function, inputs, grad).items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("shape", ["S2 N5 A16 C8 H32 shared", WIDE])
def test_autocast_gives_the_autocast_dtype(shape):
    case = cases.case("conditioned_transition", shape)
    inputs, grad = draw(case, torch.float32)

    def under_autocast(run):
        def call(given):
            with torch.autocast(DEVICE, dtype=torch.float16), ops.use("triton"):
                return run(given)

        return accuracy.results(call, inputs, grad)

    found, eager = under_autocast(case.run), under_autocast(case.run_reference)
    exact = accuracy.exact_results(case, inputs, grad)
    assert found["output"].dtype == eager["output"].dtype == torch.float16
    for name, value in exact.items():
        error, allowed = (accuracy.relative_errors(r[name], value)[0] for r in (found, eager))
        assert error <= accuracy.FACTOR * allowed, name


def test_explain_names_the_norm_and_the_plan():
    inputs, _ = draw(cases.case("conditioned_transition", "S2 N5 A16 C8 H32"), torch.float16)
    with ops.use("triton"):
        lines = ops.explain("conditioned_transition", **inputs).kernels
    assert lines[0].startswith("adaptive_layer_norm: triton")
    assert any(line.startswith("transition.forward: BLOCK_M") for line in lines)
    for shape, kept in ((WIDE, True), (f"{WIDE} shared", False)):
        inputs, _ = draw(cases.case("conditioned_transition", shape), torch.float16)
        with ops.use("triton"):
            lines = ops.explain("conditioned_transition", **inputs).kernels
        assert any("n, gate and value are kept" in line for line in lines) == kept
        gates = [line.split(":")[0] for line in lines if line.startswith("gated.")]
        assert gates == ["gated.forward"] + (not kept) * ["gated.backward"]
