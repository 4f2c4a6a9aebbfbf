"""EvoAttention's kernels in a program: autograd, torch.compile, autocast, checkpoints, graphs."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megafold import ops
from megafold.bench import accuracy
from megafold.bench.memory import saved_bytes
from megafold.ops.evo_attention import launch, library  # noqa: F401, registers the operators
from tests.numerics import DEVICE
from tests.ops.evo import (
    ON_GPU,
    assert_same,
    attention,
    blocks,
    fused,
    fused_results,
)

# Numpy, which interprets, warns of infinities that the kernels then leave out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

SHAPE = "B1 S2 N17 K20 H1 D8"
FLOATS = ("q", "k", "v", "pair_bias")
ARGUMENTS = ("q", "k", "v", "mask", "pair_bias")


def forward_op(inputs):
    q = inputs["q"]
    arguments = [inputs[name] for name in ARGUMENTS]
    return torch.ops.megafold.evo_attention(*arguments, q.shape[-1] ** -0.5)


def backward_arguments(inputs, grad, asked):
    out, stats = forward_op(inputs)
    scale = inputs["q"].shape[-1] ** -0.5
    return (grad, *(inputs[name] for name in ARGUMENTS), out, stats, scale, asked)


def leaves_of(inputs, names=FLOATS):
    """The inputs with the named ones as leaves that require a gradient, and these leaves."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in names}
    return {**inputs, **leaves}, list(leaves.values())


# -- Bits: one call gives what the other gave.


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ("B1 S2 N20 H1 D8", torch.float16),
        pytest.param("B2 S16 N200 H4 D32 shared", torch.bfloat16, marks=ON_GPU),
        pytest.param("B1 S1 N384 H16 D24", torch.float32, marks=ON_GPU),
        pytest.param("B1 S96 N384 H4 D32", torch.bfloat16, marks=ON_GPU),
    ],
)
def test_ten_calls_give_the_same_bits(shape, dtype):
    inputs, grad = attention(shape, dtype)
    first = fused_results(inputs, grad)
    for _ in range(9):
        assert_same(fused_results(inputs, grad), first)


@pytest.mark.gpu
def test_other_work_on_the_gpu_does_not_change_a_bit():
    inputs, grad = attention("B1 S64 N256 H4 D32", torch.bfloat16)
    first = fused_results(inputs, grad)
    busy = torch.randn(4096, 4096, device=DEVICE)
    stream = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(stream):
            busy = busy @ busy.T * 1e-4
        assert_same(fused_results(inputs, grad), first)


def test_second_backward_gives_the_same_gradients():
    inputs, grad = attention(SHAPE)
    inputs, leaves = leaves_of(inputs)
    out = fused(inputs)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_accumulate():
    inputs, grad = attention(SHAPE)
    inputs, leaves = leaves_of(inputs)
    for _ in range(2):
        fused(inputs).backward(grad)
    expected = fused_results(inputs, grad)
    for name, leaf in zip(FLOATS, leaves, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * expected[f"grad {name}"])


def test_the_backward_pass_may_run_in_another_thread_than_use():
    """Autograd has threads of its own; the choice is that of the forward call."""
    inputs, grad = attention(SHAPE)
    inputs, leaves = leaves_of(inputs)
    with ops.use("triton"):
        out = ops.evo_attention(**inputs)
    with ops.use("torch"):
        found = torch.autograd.grad(out, leaves, grad)
    expected = fused_results(inputs, grad)
    for name, value in zip(FLOATS, found, strict=True):
        assert torch.equal(value, expected[f"grad {name}"])


# -- What is computed and kept.


@pytest.fixture
def launched(monkeypatch):
    """The names of the gradients' launches, as they happen."""
    seen = []
    for name, function in list(vars(launch).items()):
        if name.startswith("launch_grad"):

            def noted(*args, _name=name, _function=function, **kwargs):
                seen.append(_name)
                return _function(*args, **kwargs)

            monkeypatch.setattr(launch, name, noted)
    return seen


# The kernel for q always runs: it leaves what the others read.
@pytest.mark.parametrize(
    ("names", "spared"),
    [
        (("q",), ("kv", "bias")),
        (("k",), ("bias",)),
        (("v",), ("bias",)),
        (("q", "k", "v"), ("bias",)),
        (("pair_bias",), ("kv",)),
        (("q", "pair_bias"), ("kv",)),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 2])
def test_gradients_not_asked_for_are_not_computed(names, spared, rows, launched):
    inputs, grad = attention(f"B1 S{rows} N17 H1 D8")
    expected = fused_results(inputs, grad)
    inputs, leaves = leaves_of(inputs, names)
    out = fused(inputs)
    launched.clear()
    found = torch.autograd.grad(out, leaves, grad)
    assert launched
    assert [name for name in launched if name.removeprefix("launch_grad_") in spared] == []
    for name, value in zip(names, found, strict=True):
        assert torch.equal(value, expected[f"grad {name}"]), name


@pytest.mark.parametrize("asked", [(1, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 1), (0, 0, 0, 0)], ids=str)
def test_backward_operator_returns_what_was_asked_for(asked):
    inputs, grad = attention(SHAPE)
    asked = [bool(one) for one in asked]
    found = torch.ops.megafold.evo_attention_backward(*backward_arguments(inputs, grad, asked))
    names = [name for name, one in zip(FLOATS, asked, strict=True) if one]
    assert len(found) == sum(asked)
    assert [t.shape for t in found] == [inputs[name].shape for name in names]


def test_nothing_of_three_lengths_is_kept_for_the_backward_pass():
    """Beside its inputs the output and two fp32 numbers for each query and head."""
    inputs, _ = leaves_of(attention("B1 S3 N33 H2 D8")[0])
    kept = saved_bytes(lambda: fused(inputs), inputs.values())
    output = inputs["q"].numel() * 4
    assert kept == output + 2 * 4 * 3 * 33 * 2


def test_no_graph_is_made_without_gradients():
    inputs, _ = attention(SHAPE)
    assert not fused(inputs).requires_grad
    with torch.no_grad():
        assert not fused(leaves_of(inputs)[0]).requires_grad


def test_second_derivative_is_refused_with_a_way_out():
    inputs, grad = attention(SHAPE)
    inputs, leaves = leaves_of(inputs)
    first = torch.autograd.grad(fused(inputs), leaves, grad, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'no second derivative.*use\("torch"\)'):
        torch.autograd.grad(sum(g.sum() for g in first), leaves)


@pytest.mark.parametrize(
    "shape", ["B0 S3 N4 H2 D8", "B1 S0 N4 H2 D8", "B2 S2 N0 K5 H2 D8", "B2 S2 N5 K0 H2 D8"]
)
@pytest.mark.parametrize("without", [(), ("mask",), ("mask", "pair_bias")], ids=str)
def test_empty_inputs_give_empty_results_zeros_and_zero_gradients(shape, without):
    inputs, grad = attention(shape)
    inputs |= dict.fromkeys(without)
    results = fused_results(inputs, grad)
    plain = accuracy.results(lambda given: ops.reference.evo_attention(**given), inputs, grad)
    for name, value in results.items():
        assert value.shape == plain[name].shape
        assert (value == 0).all(), name
    assert_same(results, plain)


# -- torch.library, torch.compile.


@pytest.mark.parametrize("given", [ARGUMENTS, ("q", "k", "v")], ids=["all", "q k v"])
@pytest.mark.parametrize("ending", [False, True], ids=["contiguous", "views"])
def test_registration_passes_opcheck(given, ending):
    inputs, grad = attention("B1 S4 N4 H1 D8")
    inputs = {name: inputs[name] if name in given else None for name in ARGUMENTS}
    if ending:
        inputs |= {name: inputs[name].transpose(1, 2) for name in ("q", "k", "v")}
        grad = grad.transpose(1, 2)
    asked = [True, True, True, "pair_bias" in given]
    arguments = backward_arguments(inputs, grad, asked)
    # It has no derivative, and says so.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.megafold.evo_attention_backward.default, arguments, test_utils=tests
    )
    for t in inputs.values():
        if t is not None and t.is_floating_point():
            t.requires_grad_()
    arguments = (*(inputs[name] for name in ARGUMENTS), 0.3)
    torch.library.opcheck(torch.ops.megafold.evo_attention.default, arguments)


def test_dispatch_modes_see_the_operators():
    """Those that count operations, trace, or trade memory for time."""
    seen = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    inputs, grad = attention("B1 S2 N5 H1 D8")
    expected = fused_results(inputs, grad)
    with Seeing():
        found = fused_results(inputs, grad)
    assert torch.ops.megafold.evo_attention.default in seen
    assert torch.ops.megafold.evo_attention_backward.default in seen
    assert_same(found, expected)


BACKENDS = ["aot_eager", pytest.param("inductor", marks=ON_GPU)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend):
    inputs, grad = attention(SHAPE)
    torch.compiler.reset()
    compiled = torch.compile(fused, backend=backend, fullgraph=True)
    expected = fused_results(inputs, grad)
    for name, value in accuracy.results(compiled, inputs, grad).items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_compiles_with_shapes_left_open():
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ("B1 S2 N17 K20 H1 D8", "B1 S3 N20 K11 H1 D8"):
        inputs, grad = attention(shape)
        assert_same(accuracy.results(compiled, inputs, grad), fused_results(inputs, grad))


def test_compiles_without_mask_bias_and_gradients():
    inputs, _ = attention(SHAPE)
    inputs |= {"mask": None, "pair_bias": None}
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(inputs), fused(inputs))


def test_compiles_within_a_larger_function():
    inputs, grad = attention("B1 S5 N5 H2 D8")

    def gated(given):
        """An ending node, projected before and gated after."""
        q, k, v = (torch.tanh(given[name]) for name in ("q", "k", "v"))
        views = {name: t.transpose(1, 2) for name, t in (("q", q), ("k", k), ("v", v))}
        return torch.sigmoid(q) * fused({**given, **views}).transpose(1, 2)

    torch.compiler.reset()
    compiled = torch.compile(gated, backend="aot_eager", fullgraph=True)
    expected = accuracy.results(gated, inputs, grad)
    for name, value in accuracy.results(compiled, inputs, grad).items():
        torch.testing.assert_close(value, expected[name], msg=name)


# -- Autocast, checkpoints, graphs.

AUTOCAST = [torch.float16, pytest.param(torch.bfloat16, marks=ON_GPU)]


@pytest.mark.parametrize("dtype", AUTOCAST)
def test_autocast_casts_q_k_and_v_as_for_a_matrix_product(dtype):
    inputs, grad = attention(SHAPE)

    def under_autocast(given):
        with torch.autocast(DEVICE, dtype=dtype):
            return fused(given)

    found = accuracy.results(under_autocast, inputs, grad)
    halves = {**inputs, **{name: inputs[name].to(dtype) for name in ("q", "k", "v")}}
    expected = fused_results(halves, grad)  # the bias stays in fp32
    assert found["output"].dtype == dtype
    for name, value in found.items():
        assert name == "output" or value.dtype == torch.float32, name
        assert torch.equal(value, expected[name].to(value.dtype)), name


def test_autocast_takes_mixed_dtypes_and_is_no_matter_to_the_backward_pass():
    inputs, grad = attention(SHAPE)
    mixed = {**inputs, "k": inputs["k"].half(), "pair_bias": inputs["pair_bias"].half()}
    mixed, leaves = leaves_of(mixed)
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = fused(mixed)
        inside = torch.autograd.grad(out, leaves, grad.half(), retain_graph=True)
    outside = torch.autograd.grad(out, leaves, grad.half())
    assert [g.dtype for g in outside] == [leaf.dtype for leaf in leaves]
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("preserve", [True, False])
def test_checkpointing_changes_no_bit(preserve):
    inputs, grad = attention(SHAPE)

    def checkpointed(given):
        return checkpoint(fused, given, use_reentrant=False, preserve_rng_state=preserve)

    assert_same(accuracy.results(checkpointed, inputs, grad), fused_results(inputs, grad))


def test_block_sizes_hold_in_a_backward_pass_that_begins_inside(monkeypatch):
    inputs, leaves = leaves_of(attention(SHAPE)[0])
    sources = {}

    def noted(kernel, *args, _config_of=launch.config_of):
        found = _config_of(kernel, *args)
        sources[kernel] = found.source
        return found

    monkeypatch.setattr(launch, "config_of", noted)
    out = fused(inputs)
    with blocks(1, 16, 32):
        torch.autograd.grad(out.sum(), leaves)
    overridden = {kernel for kernel, source in sources.items() if source == "use_config"}
    assert overridden == set(launch.KERNELS) - {launch.FORWARD}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["B1 S8 N100 H4 D32", "B1 S1 N128 H16 D24"])
def test_forward_and_backward_are_captured_in_a_cuda_graph(shape):
    inputs, grad = attention(shape, torch.bfloat16)
    inputs, leaves = leaves_of(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile, and let the allocator settle
        for _ in range(3):
            torch.autograd.grad(fused(inputs), leaves, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused(inputs)
        found = torch.autograd.grad(out, leaves, grad)
    for seed in (1, 2):
        fresh, fresh_grad = attention(shape, torch.bfloat16, seed=seed)
        with torch.no_grad():
            for name, t in inputs.items():
                t.copy_(fresh[name])
            grad.copy_(fresh_grad)
        graph.replay()
        expected = fused_results(fresh, fresh_grad)
        assert torch.equal(out, expected["output"])
        for name, value in zip(FLOATS, found, strict=True):
            assert torch.equal(value, expected[f"grad {name}"]), name


@pytest.mark.gpu
def test_calls_on_another_stream_are_in_its_order():
    inputs, grad = attention("B1 S32 N256 H4 D32", torch.bfloat16)
    expected = fused_results(inputs, grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = {name: t.clone() for name, t in inputs.items()}
        results = fused_results(late, grad)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(results, expected)
