"""The conditioned transition by its kernels: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.bench.memory import saved_tensors
from megafold.ops.conditioned_transition import library
from megafold.ops.transition import passes
from tests.numerics import DEVICE, assert_case_accurate, draw

ON_GPU = pytest.mark.gpu
# The interpreter cuts bf16 off where a GPU rounds.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=ON_GPU)]
SHAPES = [
    "S2 N33 A64 C32 H128",
    "S2 N33 A64 C32 H128 shared",
    "S2 N9 A136 C24 H40",  # wider than the fused kernels hold
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
    """No sum takes more terms than it must; in small parts the results are the same."""
    assert [part.stop for part in passes._parts(256)] == [256]
    assert [part.stop for part in passes._parts(833)] == [256, 512, 768, 1024]
    assert [part.stop for part in passes._parts(10000)] == [2500, 5000, 7500, 10000]
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


def test_compiles_into_one_graph_and_checkpointing_changes_no_bit():
    inputs, grad = gated()
    expected = accuracy.results(by_kernels, inputs, grad)
    torch.compiler.reset()
    compiled = torch.compile(by_kernels, backend="aot_eager", fullgraph=True)

    def checkpointed(given):
        return checkpoint(by_kernels, given, use_reentrant=False)

    for function in (compiled, checkpointed):
        for name, value in accuracy.results(function, inputs, grad).items():
            assert torch.equal(value, expected[name]), name


def test_autocast_gives_the_autocast_dtype():
    case = cases.case("conditioned_transition", "S2 N5 A16 C8 H32 shared")
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
