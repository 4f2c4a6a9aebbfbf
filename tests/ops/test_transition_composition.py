"""The transition's kernels in a program: autograd, torch.compile, autocast, checkpoints, graphs."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.bench.memory import peak_bytes, saved_bytes
from megafold.ops.launcher import Launcher
from megafold.ops.recording import launches
from megafold.ops.transition import hopper, launch, library, passes  # noqa: F401, registers the operators
from megafold.ops.transition.hopper import has_gluon
from megafold.ops.transition.variants import variants
from tests.numerics import DEVICE
from tests.ops.test_transition import ON_GPU, drawn, fused

SHAPES = ["M37 C16 H32", "M37 C136 H32"]  # one for each plan
ARGUMENTS = ("x", "norm_weight", "norm_bias", "weight_gate", "weight_value", "weight_out")
EPS = 1e-5
BETWEEN = ("norm", "swiglu")  # kernels between products
each_plan = pytest.mark.parametrize("shape", SHAPES)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert [name for name, t in expected.items() if not torch.equal(actual[name], t)] == []


def leaves_of(inputs, names=ARGUMENTS):
    """The inputs with the named ones as leaves that require a gradient, and these leaves."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in names}
    return {**inputs, **leaves}, list(leaves.values())


# -- What is computed and kept.


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


def test_products_not_asked_for_are_not_computed(monkeypatch):
    counted = []

    def noted(total, left, right, _real=passes._plus_product):
        counted.append((left.shape[1], right.shape[1]))
        return _real(total, left, right)

    monkeypatch.setattr(passes, "_plus_product", noted)
    inputs, grad = drawn(SHAPES[1])
    inputs, leaves = leaves_of(inputs, ("x", "norm_weight"))
    torch.autograd.grad(fused(inputs), leaves, grad)
    assert counted == []
    inputs, leaves = leaves_of(inputs, ("weight_out",))
    torch.autograd.grad(fused(inputs), leaves, grad)
    channels, hidden = inputs["weight_out"].shape
    assert counted == [(channels, hidden)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("x",), ["forward", "grad_rows"]),
        (("norm_bias",), ["forward", "grad_rows", "reduce_gradients"]),
        (("weight_out",), ["forward", "grad_rows", "grad_weights", "reduce_gradients"]),
    ],
)
def test_fused_kernels_are_launched_for_what_is_asked_for(names, expected):
    inputs, grad = drawn(SHAPES[0])
    inputs, leaves = leaves_of(inputs, names)
    with launches(run=True) as found:
        torch.autograd.grad(fused(inputs), leaves, grad)
    assert [one.kernel.removeprefix("transition.") for one in found] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_two_numbers_a_row_are_kept_for_the_backward_pass(dtype):
    inputs, _ = leaves_of(drawn(SHAPES[0], dtype)[0])
    assert saved_bytes(lambda: fused(inputs), inputs.values()) == 2 * 4 * 37


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_wide_rows_keep_themselves_normalised_gate_and_value(dtype):
    inputs, _ = leaves_of(drawn(SHAPES[1], dtype)[0])
    kept = saved_bytes(lambda: fused(inputs), inputs.values())
    hidden, channels = inputs["weight_gate"].shape
    both = 2 * hidden * channels  # the weights of gate and value as one
    assert kept == 2 * 4 * 37 + dtype.itemsize * (37 * (channels + 2 * hidden) + both)
    # Of what eager keeps: gate, value, silu(gate), their product, normalised rows.
    rows = saved_bytes(lambda: ops.reference.transition(**inputs), inputs.values())
    assert kept - dtype.itemsize * both < rows


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


def test_what_is_kept_is_written_over_in_the_last_backward_pass_alone():
    inputs, grad = drawn(SHAPES[1])
    inputs, leaves = leaves_of(inputs)
    kept = []

    def noted(tensor):
        kept.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        out = fused(inputs)

    def written_over():
        return [t.shape for t, before in kept if not torch.equal(t, before)]

    torch.autograd.grad(out, leaves, grad, retain_graph=True)
    assert written_over() == []
    torch.autograd.grad(out, leaves, grad)
    assert written_over() == [(37, 2 * 32)]  # gate and value


def test_compiled_operators_write_over_nothing_that_they_kept():
    """Two calls on the same values may be one for the compiler, with what it keeps."""
    inputs, grad = drawn(SHAPES[1])

    def twice(given):
        return fused(given) + 2 * fused(given)

    torch.compiler.reset()
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    assert_same(accuracy.results(compiled, inputs, grad), accuracy.results(twice, inputs, grad))


@each_plan
def test_no_graph_is_made_without_gradients(shape):
    inputs, _ = drawn(shape)
    assert not fused(inputs).requires_grad
    with torch.no_grad():
        assert not fused(leaves_of(inputs)[0]).requires_grad


@each_plan
def test_second_derivative_is_refused_with_a_way_out(shape):
    inputs, grad = drawn(shape)
    inputs, leaves = leaves_of(inputs)
    first = torch.autograd.grad(fused(inputs), leaves, grad, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'no second derivative.*use\("torch"\)'):
        torch.autograd.grad(sum(g.sum() for g in first), leaves)


# GPUs hand out memory in larger steps, and norms have more programs there, each with its sums.
counted_on_a_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="counts what a CPU's memory takes")


@counted_on_a_cpu
@pytest.mark.parametrize(
    ("shape", "dtype"), [("M1024 C16 H128", torch.float16), ("M1024 C136 H128", torch.float32)]
)
def test_one_chunk_at_a_time_is_in_memory(shape, dtype, monkeypatch):
    inputs, grad = drawn(shape, dtype)
    inputs, leaves = leaves_of(inputs)
    # What the kernels compute is no matter here, and interpreted they allocate, too.
    monkeypatch.setattr(Launcher, "__call__", lambda self, *tensors: None)

    def peak(step):
        parts = [slice(start, start + step) for start in range(0, 1024, step)]
        monkeypatch.setattr(launch, "chunks", lambda *sizes: parts)
        return peak_bytes(lambda: torch.autograd.grad(fused(inputs), leaves, grad), DEVICE)

    hidden, channels = inputs["weight_gate"].shape
    assert peak(256) - peak(128) <= 1.2 * 128 * dtype.itemsize * (3 * hidden + 2 * channels)


@counted_on_a_cpu
def test_gate_and_value_are_in_memory_once(monkeypatch):
    """At most: output, normalised rows, gate and value or their gradients, the activation."""
    inputs, grad = drawn("M1024 C136 H272")
    inputs, leaves = leaves_of(inputs)
    monkeypatch.setattr(Launcher, "__call__", lambda self, *tensors: None)
    # Without oneDNN, which on some CPUs copies operands of 16 bits before it multiplies them.
    with torch.backends.mkldnn.flags(enabled=False):
        peak = peak_bytes(lambda: torch.autograd.grad(fused(inputs), leaves, grad), DEVICE)
    x, weight = inputs["x"].nbytes, inputs["weight_gate"].nbytes
    # The norm's sums are those of eight programs here; statistics are two numbers of 32 bits.
    assert peak <= 8 * x + 2 * 4 * 1024 + 5.1 * weight


@pytest.mark.parametrize("gradients", [False, True])
def test_without_gradients_wide_rows_go_in_chunks(gradients, monkeypatch):
    inputs, _ = drawn(SHAPES[1])
    calls = []
    real = launch.chunks
    monkeypatch.setattr(launch, "chunks", lambda *sizes: calls.append(sizes) or real(*sizes))
    with torch.set_grad_enabled(gradients):
        fused(leaves_of(inputs)[0])
    assert len(calls) == (not gradients)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [("M40000 C128 H512", torch.bfloat16), ("M40000 C128 H512", torch.float32)],
)
def test_scratch_memory_is_within_its_bound(shape, dtype, monkeypatch):
    monkeypatch.setattr(hopper, "why_not", lambda *args: "kernels that take rows in chunks")
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 2**20)
    monkeypatch.setattr(launch, "SCRATCH_OF_PRODUCTS", 2**20)
    inputs, grad = drawn(shape, dtype)
    inputs, leaves = leaves_of(inputs)
    peak = peak_bytes(lambda: torch.autograd.grad(fused(inputs), leaves, grad), DEVICE)
    x, weight = inputs["x"].nbytes, inputs["weight_gate"].nbytes
    # Output, gradient of x, scratch (1.25 times x, rounded up to whole chunks), sums in fp32.
    assert peak < (2.5 + launch.SCRATCH_OF_X) * x + 13 * weight + 2**22


# -- torch.library, torch.compile.


@pytest.mark.parametrize("norms", [True, False], ids=["norms", "no norms"])
def test_registration_of_what_keeps_passes_opcheck(norms):
    inputs, grad = drawn(SHAPES[1])
    if not norms:
        inputs |= {"norm_weight": None, "norm_bias": None}
    tensors = [inputs[name] for name in ARGUMENTS]
    _, *kept = torch.ops.megafold.transition_keeping(*tensors, EPS, False)
    torch.library.opcheck(
        torch.ops.megafold.transition_keeping_backward.default,
        (grad, *tensors, *kept, False, [True, norms, norms, True, True, True]),
        test_utils=("test_schema", "test_faketensor"),
    )
    for t in tensors:
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(torch.ops.megafold.transition_keeping.default, (*tensors, EPS, False))


@each_plan
@pytest.mark.parametrize("norms", [True, False], ids=["norms", "no norms"])
def test_registration_passes_opcheck(shape, norms):
    # In fp32 gradients of the norm are not converted: they must not share memory all the same.
    inputs, grad = drawn(shape, torch.float32 if shape == SHAPES[1] else torch.float16)
    if not norms:
        inputs |= {"norm_weight": None, "norm_bias": None}
    tensors = [inputs[name] for name in ARGUMENTS]
    _, stats = torch.ops.megafold.transition(*tensors, EPS, False)
    asked = [True, norms, norms, True, True, True]
    # It has no derivative, and says so.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.megafold.transition_backward.default,
        (grad, *tensors, stats, EPS, False, asked),
        test_utils=tests,
    )
    for t in tensors:
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(torch.ops.megafold.transition.default, (*tensors, EPS, False))


@pytest.mark.parametrize(
    ("shape", "name"), [(SHAPES[0], "transition"), (SHAPES[1], "transition_keeping")]
)
def test_dispatch_modes_see_the_operators(shape, name):
    """Those that count operations, trace, or trade memory for time."""
    seen = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    inputs, grad = drawn(shape)
    expected = accuracy.results(fused, inputs, grad)
    with Seeing():
        found = accuracy.results(fused, inputs, grad)
    assert getattr(torch.ops.megafold, name).default in seen
    assert getattr(torch.ops.megafold, f"{name}_backward").default in seen
    assert_same(found, expected)


@each_plan
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=ON_GPU)])
def test_compiles_into_one_graph(shape, backend):
    inputs, grad = drawn(shape)
    torch.compiler.reset()
    compiled = torch.compile(fused, backend=backend, fullgraph=True)
    assert_same(accuracy.results(compiled, inputs, grad), accuracy.results(fused, inputs, grad))


@each_plan
def test_compiles_with_rows_left_open(shape):
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in ("M37", "M20"):
        inputs, grad = drawn(shape.replace("M37", rows))
        assert_same(accuracy.results(compiled, inputs, grad), accuracy.results(fused, inputs, grad))


# -- Autocast, checkpoints, graphs.


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=ON_GPU)])
@each_plan
def test_autocast_casts_the_weights_and_normalises_what_it_is_given(shape, dtype):
    inputs, grad = drawn(shape, torch.float32)

    def under_autocast(given):
        with torch.autocast(DEVICE, dtype=dtype):
            return fused(given)

    def plain(given):
        with torch.autocast(DEVICE, dtype=dtype):
            return ops.reference.transition(**given)

    found = accuracy.results(under_autocast, inputs, grad)
    assert found["output"].dtype == dtype
    assert all(t.dtype == torch.float32 for name, t in found.items() if name != "output")
    exact = accuracy.exact_results(cases.case("transition", shape), inputs, grad)
    eager = accuracy.results(plain, inputs, grad)
    for name, value in exact.items():
        error, allowed = (accuracy.relative_errors(r[name], value)[0] for r in (found, eager))
        assert error <= accuracy.FACTOR * allowed, name


@each_plan
def test_a_backward_pass_under_autocast_is_the_same(shape):
    inputs, grad = drawn(shape, torch.float32)
    inputs, leaves = leaves_of(inputs)
    out = fused(inputs)
    outside = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@each_plan
def test_checkpointing_changes_no_bit(shape):
    inputs, grad = drawn(shape)

    def checkpointed(given):
        return checkpoint(fused, given, use_reentrant=False)

    assert_same(accuracy.results(checkpointed, inputs, grad), accuracy.results(fused, inputs, grad))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["M1000 C128 H512", "M768 C384 H1536"])
def test_forward_and_backward_are_captured_in_a_cuda_graph(shape):
    inputs, grad = drawn(shape, torch.bfloat16)
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
    fresh, fresh_grad = drawn(shape, torch.bfloat16, seed=1)
    with torch.no_grad():
        for name, t in inputs.items():
            t.copy_(fresh[name])
        grad.copy_(fresh_grad)
    graph.replay()
    expected = accuracy.results(fused, fresh, fresh_grad)
    assert torch.equal(out, expected["output"])
    for name, value in zip(ARGUMENTS, found, strict=True):
        assert torch.equal(value, expected[f"grad {name}"]), name


# -- Which plan, which block sizes.


def explained(shape, dtype=torch.float16):
    with ops.use("triton"):
        return ops.explain("transition", **drawn(shape, dtype)[0]).kernels


def test_explain_names_the_plan_and_why():
    lines = [line for line in explained("M9 C128 H32") if not line.startswith("transition.hopper")]
    assert [line.split(":")[0] for line in lines] == list(launch.KERNELS)
    assert all("safe default, C 128" in line or "table of" in line for line in lines)
    (line,) = explained("M9 C129 H32")
    assert "with gradients all rows at once" in line
    assert "C 129 is wider than the 128 that the fused kernels hold" in line
    (line,) = explained("M9 C128 H32", torch.float32)
    assert "kept" not in line
    assert "the fused kernels take 16-bit operands, not float32" in line


BLOCKS = {"BLOCK_M": 16, "BLOCK_H": 16}


@pytest.mark.parametrize(
    ("kernel", "blocks"),
    [
        (launch.FORWARD, BLOCKS),
        (launch.GRAD_ROWS, BLOCKS),
        (launch.GRAD_WEIGHTS, {"BLOCK_U": 16, "BLOCK_K": 16, "WAVES": 40}),
    ],
)
def test_other_block_sizes_give_the_same_within_rounding(kernel, blocks):
    inputs, grad = drawn("M50 C16 H80")
    expected = accuracy.results(fused, inputs, grad)
    with ops.use_config(kernel, ops.Config(blocks, 4, 1)):
        found = accuracy.results(fused, inputs, grad)
    for name, value in found.items():
        error, _ = accuracy.relative_errors(value, expected[name].double())
        assert error < 2 * torch.finfo(value.dtype).eps, name


def test_every_kernel_is_among_those_compiled_ahead_of_time():
    names = {variant.name.split()[0] for variant in variants()}
    both = {f"transition.{name}_{way}" for name in BETWEEN for way in ("forward", "backward")}
    sums = {f"transition.{way}_gradients" for way in ("reduce", "split")}
    hoppers = {f"transition.hopper_{name}" for name in ("forward", "grad_rows", "grad_weights")}
    own = hoppers if has_gluon() else set()
    assert names == {*launch.KERNELS, *sums, *both, "transition.gate_rows_backward", *own}
    for variant in variants():
        assert list(variant.signature) == variant.kernel.arg_names


def test_a_recorded_launch_does_not_stay():
    variants()
    inputs, grad = drawn(SHAPES[0])
    assert accuracy.results(fused, inputs, grad)["output"].isfinite().all()
