"""Triangle multiplication's kernels in a program: autograd, compilers, autocast, checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megafold import ops
from megafold.bench import accuracy
from megafold.ops.triangle_multiplication import hopper, launch, library  # noqa: F401, registers
from megafold.ops.triangle_multiplication.variants import variants
from tests.numerics import DEVICE, assert_accurate
from tests.ops.layer_norms import ON_GPU
from tests.ops.test_triangle_multiplication import (
    NORMS,
    OP,
    assert_same,
    drawn,
    fused,
)
from tests.ops.test_triangle_multiplication_residual import with_dropout

SHAPE = "B1 N6 C16"
EPS = 1e-5


def leaves_of(inputs):
    """The inputs with all that is floating as leaves that require a gradient, and these."""
    given = {
        name: t.detach().clone().requires_grad_() if t.is_floating_point() else t
        for name, t in inputs.items()
    }
    return given, [t for t in given.values() if t.requires_grad]


def test_a_second_backward_gives_the_same_gradients():
    _, inputs, grad = drawn(SHAPE)
    given, leaves = leaves_of(inputs)
    out = fused(given)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_graph_is_made_without_gradients():
    _, inputs, _ = drawn(SHAPE)
    assert not fused(inputs).requires_grad
    with torch.no_grad():
        assert not fused(leaves_of(inputs)[0]).requires_grad


def test_a_second_derivative_is_refused_with_a_way_out():
    _, inputs, grad = drawn(SHAPE)
    given, leaves = leaves_of(inputs)
    first = torch.autograd.grad(fused(given), leaves, grad, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'no second derivative.*use\("torch"\)'):
        torch.autograd.grad(sum(g.sum() for g in first), leaves)


@pytest.mark.parametrize(
    ("way", "norms", "residual"),
    [("", True, False), ("incoming", False, False), ("", True, True), ("incoming", False, True)],
    ids=["outgoing", "incoming, no norms", "residual", "incoming, no norms, residual"],
)
def test_registration_passes_opcheck(way, norms, residual):
    # In fp32 no gradient is converted: they must not share memory all the same.
    _, inputs, grad = drawn("B1 N3 C16", torch.float32)
    if not norms:
        inputs |= dict.fromkeys(NORMS)
    dropout = with_dropout(inputs)["dropout"] if residual else None
    tensors = [*inputs.values(), dropout]
    forward = torch.ops.megafold.triangle_multiplication.default
    _, *kept = forward(*tensors, not way, EPS, residual)
    asked = [True, norms, norms, True, True, norms, norms, True, True]
    torch.library.opcheck(
        torch.ops.megafold.triangle_multiplication_backward.default,
        (grad, *tensors, *kept, not way, residual, asked),
        test_utils=("test_schema", "test_faketensor"),  # it has no derivative, and says so
    )
    for t in inputs.values():
        if t is not None and t.is_floating_point():
            t.requires_grad_()
    torch.library.opcheck(forward, (*tensors, not way, EPS, residual))


def test_the_dtype_that_is_foretold_is_that_which_comes():
    """That of an fp32 z beside weights in 16 bits, with the residual."""
    _, inputs, _ = drawn(SHAPE)
    inputs["z"] = inputs["z"].float()
    forward = torch.ops.megafold.triangle_multiplication.default
    for residual, dtype in ((False, torch.float16), (True, torch.float32)):
        for device in (DEVICE, "meta"):
            tensors = (t.to(device) for t in inputs.values())
            assert forward(*tensors, None, True, EPS, residual)[0].dtype == dtype


def with_residual(inputs):
    return fused(inputs, residual=True)


each_call = pytest.mark.parametrize(
    ("call", "more"),
    [(fused, dict), (with_residual, with_dropout)],
    ids=["alone", "dropout and residual"],
)


@each_call
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=ON_GPU)])
def test_compiles_into_one_graph(backend, call, more):
    _, inputs, grad = drawn(SHAPE)
    inputs = more(inputs)
    torch.compiler.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    assert_same(accuracy.results(compiled, inputs, grad), accuracy.results(call, inputs, grad))


@each_call
def test_compiles_with_tokens_left_open(call, more):
    torch.compiler.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in (SHAPE, "B1 N5 C16"):
        _, inputs, grad = drawn(shape)
        inputs = more(inputs)
        assert_same(accuracy.results(compiled, inputs, grad), accuracy.results(call, inputs, grad))


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=ON_GPU)])
def test_accuracy_is_that_of_the_reference_under_autocast(dtype):
    """z and the norms stay fp32, products have operands in the autocast dtype."""
    case, inputs, grad = drawn("B1 N9 C24", torch.float32)

    def run(function):
        def call(given):
            with torch.autocast(DEVICE, dtype=dtype), ops.use("triton"):
                return function(given)

        return accuracy.results(call, inputs, grad)

    found, eager = run(case.run), run(case.run_reference)
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in eager.items()}
    assert_accurate(found, eager, accuracy.exact_results(case, inputs, grad))


@each_call
def test_a_backward_pass_under_autocast_is_the_same(call, more):
    _, inputs, grad = drawn(SHAPE)
    given, leaves = leaves_of(inputs)
    out = call(more(given))
    outside = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@each_call
def test_checkpointing_changes_no_bit(call, more):
    _, inputs, grad = drawn(SHAPE)
    inputs = more(inputs)

    def checkpointed(given):
        return checkpoint(call, given, use_reentrant=False)

    assert_same(accuracy.results(checkpointed, inputs, grad), accuracy.results(call, inputs, grad))


@pytest.mark.gpu
@pytest.mark.parametrize("allowed", [False, True], ids=["ieee", "tf32"])
def test_fp32_products_follow_torchs_setting(allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
    case, inputs, grad = drawn("B1 N64 C128", torch.float32)
    eager = accuracy.results(case.run_reference, inputs, grad)
    found = accuracy.results(fused, inputs, grad)
    assert_accurate(found, eager, accuracy.exact_results(case, inputs, grad))


@pytest.mark.gpu
@each_call
def test_forward_and_backward_are_captured_in_a_cuda_graph(call, more):
    _, inputs, grad = drawn("B1 N64 C128", torch.bfloat16)
    given, leaves = leaves_of(inputs)
    given = more(given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile, and let the allocator settle
        for _ in range(3):
            torch.autograd.grad(call(given), leaves, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(given)
        found = torch.autograd.grad(out, leaves, grad)
    _, fresh, fresh_grad = drawn("B1 N64 C128", torch.bfloat16, seed=1)
    fresh = more(fresh)
    with torch.no_grad():
        for name, t in given.items():
            t.copy_(fresh[name])
        grad.copy_(fresh_grad)
    graph.replay()
    expected = accuracy.results(call, fresh, fresh_grad)
    assert torch.equal(out, expected.pop("output"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected.values(), strict=True))


# -- What is chosen, and what is compiled ahead of time.


def test_explain_names_every_kernel_with_its_block_sizes():
    _, inputs, _ = drawn("B1 N4 C100")
    with ops.use("triton"):
        lines = ops.explain(OP, **inputs).kernels
    lines = [line for line in lines if not line.startswith(f"{OP}.hopper: ")]  # on such a GPU
    *of_kernels, of_products = lines
    assert [line.split(":")[0] for line in of_kernels] == list(launch.KERNELS)
    assert all("safe default, C 128" in line or "table of" in line for line in of_kernels)
    assert "torch.bmm" in of_products


def test_more_channels_than_a_kernel_holds_are_left_to_torch_or_refused():
    _, inputs, _ = drawn("B1 N2 C257")
    choice = ops.explain(OP, **inputs)
    assert choice.implementation == "torch"
    with ops.use("triton"), pytest.raises(NotImplementedError, match=r"up to 256 .* z has 257"):
        ops.triangle_multiplication(**inputs)
    if DEVICE == "cuda":
        assert "up to 256 channels" in choice.reason


def test_every_kernel_is_among_those_compiled_ahead_of_time():
    own = {kernel.replace(".", ".hopper_") for kernel in launch.KERNELS if hopper.has_gluon()}
    names = {variant.name.split()[0] for variant in variants()}
    assert names == {*launch.KERNELS, *own, "triangle_multiplication.dropout", "ops.add_sums"}
    for variant in variants():
        assert list(variant.signature) == variant.kernel.arg_names


def test_kernels_with_dropout_and_residual_are_among_them():
    """As they are launched with, and without: an argument that is None is a constant."""
    found = {}
    for variant in variants():
        for name in {"p_dropout", "p_residual", "RESIDUAL"} & set(variant.signature):
            given = variant.constants[name] if name == "RESIDUAL" else name not in variant.constants
            found.setdefault((variant.name.split()[0].partition(".")[2], name), set()).add(given)
    hoppers = {("hopper_output", "p_dropout"), ("hopper_output", "RESIDUAL")}
    hoppers |= {("hopper_grad_z", "p_residual")}
    assert found.pop(("dropout", "p_dropout")) == {True}
    portable = {("output", "p_dropout"), ("output", "p_residual"), ("grad_z", "p_residual")}
    assert set(found) == (portable | hoppers if hopper.has_gluon() else portable)
    assert all(given == {False, True} for given in found.values())


def test_a_recorded_launch_does_not_stay():
    variants()
    _, inputs, _ = drawn(SHAPE)
    assert fused(inputs).isfinite().all()
