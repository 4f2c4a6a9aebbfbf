"""The kernels with a LayerNorm in a program: autograd, torch.compile, checkpoints, graphs."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.ops.adaptive_layer_norm import library as _adaptive  # noqa: F401, registers
from megafold.ops.layer_norm_linear import library as _linear  # noqa: F401, registers
from tests.numerics import DEVICE, draw
from tests.ops.layer_norms import ON_GPU, results_of

# Both ways of each: products in the kernels, and by torch.
CASES = [
    cases.case("layer_norm_linear", "M20 C24 O16"),
    cases.case("layer_norm_linear", "M10 C130 O16"),
    cases.case("adaptive_layer_norm", "S2 N5 A24 C20"),
    cases.case("adaptive_layer_norm", "S2 N5 A24 C20 shared"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.shape}")
DTYPE = torch.float16


def drawn(case: cases.Case, dtype: torch.dtype = DTYPE, seed: int = 0):
    return draw(case, dtype, DEVICE, seed)


def fused(case: cases.Case):
    def run(inputs):
        with ops.use("triton"):
            return case.run(inputs)

    return run


def leaves_of(inputs):
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    return leaves, list(leaves.values())


def operators(case: cases.Case):
    """Forward and backward; of a condition for every row, those that keep its projections."""
    name = case.op + "_keeping" * (case.op == "adaptive_layer_norm" and "shared" not in case.shape)
    return (
        getattr(torch.ops.megafold, name).default,
        getattr(torch.ops.megafold, f"{name}_backward").default,
    )


def arguments_of(case: cases.Case, inputs):
    if case.op == "layer_norm_linear":
        return (*inputs.values(), None, 1e-5)
    return (*inputs.values(), 1e-5, DTYPE)


def assert_same(found, expected):
    assert [name for name, t in expected.items() if not torch.equal(found[name], t)] == []


@each_case
def test_second_backward_gives_the_same_gradients(case):
    inputs, grad = drawn(case)
    inputs, leaves = leaves_of(inputs)
    out = fused(case)(inputs)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_case
def test_the_choice_is_that_of_the_forward_call(case):
    inputs, grad = drawn(case)
    given, leaves = leaves_of(inputs)
    out = fused(case)(given)
    with ops.use("torch"):
        found = torch.autograd.grad(out, leaves, grad)
    expected = results_of(case, inputs, grad)
    for name, value in zip(inputs, found, strict=True):
        assert torch.equal(value, expected[f"grad {name}"]), name


@each_case
def test_second_derivative_is_refused_with_a_way_out(case):
    inputs, grad = drawn(case)
    inputs, leaves = leaves_of(inputs)
    first = torch.autograd.grad(fused(case)(inputs), leaves, grad, create_graph=True)
    with pytest.raises(NotImplementedError, match=rf'^{case.op}.*derivative.*use\("torch"\)'):
        torch.autograd.grad(sum(g.sum() for g in first), leaves)


@each_case
def test_forward_mode_is_refused_and_drops_no_tangent(case):
    inputs, _ = drawn(case)
    with torch.autograd.forward_ad.dual_level():
        dual = {
            name: torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))
            for name, t in inputs.items()
        }
        with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
            fused(case)(dual)


@each_case
def test_no_graph_is_made_without_gradients(case):
    inputs, _ = drawn(case)
    assert not fused(case)(inputs).requires_grad
    with torch.no_grad():
        assert not fused(case)(leaves_of(inputs)[0]).requires_grad


@each_case
@pytest.mark.parametrize("contiguous", [True, False])
def test_registration_passes_opcheck(case, contiguous):
    inputs, grad = drawn(case)
    if not contiguous:
        main = next(iter(inputs))
        inputs[main] = torch.stack([inputs[main], inputs[main]], dim=-1).flatten(-2)[..., ::2]
        grad = grad.flip(0)
    forward, backward = operators(case)
    arguments = arguments_of(case, inputs)
    _, *stats = forward(*arguments)
    asked = [True] * len(inputs)
    if case.op == "layer_norm_linear":
        of_backward = (grad, *inputs.values(), None, *stats, [*asked, False])
    else:
        of_backward = (grad, *inputs.values(), *stats, asked)
    # It has no derivative, and says so.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward, of_backward, test_utils=tests)
    for t in inputs.values():
        t.requires_grad_()
    torch.library.opcheck(forward, arguments_of(case, inputs))


@each_case
def test_dispatch_modes_see_the_operators(case):
    """Those that count operations, trace, or trade memory for time."""
    seen = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    inputs, grad = drawn(case)
    expected = results_of(case, inputs, grad)
    with Seeing():
        found = results_of(case, inputs, grad)
    assert set(operators(case)) <= set(seen)
    assert_same(found, expected)


@each_case
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=ON_GPU)])
def test_compiles_into_one_graph(case, backend):
    inputs, grad = drawn(case)
    torch.compiler.reset()
    compiled = torch.compile(fused(case), backend=backend, fullgraph=True)
    assert_same(accuracy.results(compiled, inputs, grad), results_of(case, inputs, grad))


def test_compiles_with_shapes_left_open():
    torch.compiler.reset()
    case = CASES[0]
    compiled = torch.compile(fused(case), backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ("M20 C24 O16", "M33 C24 O16"):
        case = cases.case("layer_norm_linear", shape)
        inputs, grad = drawn(case)
        assert_same(accuracy.results(compiled, inputs, grad), results_of(case, inputs, grad))


@each_case
def test_checkpointing_changes_no_bit(case):
    inputs, grad = drawn(case)

    def checkpointed(given):
        return checkpoint(fused(case), given, use_reentrant=False)

    assert_same(accuracy.results(checkpointed, inputs, grad), results_of(case, inputs, grad))


@each_case
def test_autocast_takes_mixed_dtypes_and_is_no_matter_to_the_backward_pass(case):
    inputs, grad = drawn(case, torch.float32)
    main, *_, last = inputs
    given, leaves = leaves_of({**inputs, last: inputs[last].half(), main: inputs[main].half()})
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = fused(case)(given)
        inside = torch.autograd.grad(out, leaves, grad.to(out.dtype), retain_graph=True)
    outside = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    assert [g.dtype for g in outside] == [leaf.dtype for leaf in leaves]
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@each_case
def test_explain_names_every_kernel_with_its_block_sizes(case):
    for dtype in (torch.float16, torch.float32):
        inputs, _ = drawn(case, dtype)
        with ops.use("triton"):
            choice = ops.explain(case.op, **inputs, **case.options)
        text = str(choice)
        assert choice.implementation == "triton"
        assert "safe default" in text
        adaptive, halves = case.op == "adaptive_layer_norm", dtype == torch.float16
        linear, wide = not adaptive, "C130" in case.shape
        for name in ("layer_norm_linear.forward", "layer_norm_linear.backward"):
            assert (name in text) == (linear and halves and not wide)
        for name in ("layer_norm.normalise", "layer_norm.gradient"):
            assert (name in text) == (adaptive or wide or not halves)
        for name in ("adaptive_layer_norm.modulate", "adaptive_layer_norm.gradient"):
            assert (name in text) == adaptive
        assert ("products by torch (float32 operands), between" in text) == (linear and not halves)
        assert ("more than 128), between" in text) == (linear and halves and wide)


@pytest.mark.gpu
@each_case
def test_forward_and_backward_are_captured_in_a_cuda_graph(case):
    inputs, grad = drawn(case)
    given, leaves = leaves_of(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile, and let the allocator settle
        for _ in range(3):
            torch.autograd.grad(fused(case)(given), leaves, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused(case)(given)
        found = torch.autograd.grad(out, leaves, grad)
    fresh, fresh_grad = drawn(case, seed=1)
    with torch.no_grad():
        for name, t in given.items():
            t.copy_(fresh[name])
        grad.copy_(fresh_grad)
    graph.replay()
    expected = results_of(case, fresh, fresh_grad)
    assert torch.equal(out, expected["output"])
    for name, value in zip(given, found, strict=True):
        assert torch.equal(value, expected[f"grad {name}"]), name


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["M147456 C128 O128", "M9999 C128 O516"])
def test_other_work_on_the_gpu_does_not_change_a_bit(shape):
    case = cases.case("layer_norm_linear", shape)
    inputs, grad = drawn(case, torch.bfloat16)
    first = results_of(case, inputs, grad)
    busy = torch.randn(4096, 4096, device=DEVICE)
    stream = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(stream):
            busy = busy @ busy.T * 1e-4
        assert_same(results_of(case, inputs, grad), first)
