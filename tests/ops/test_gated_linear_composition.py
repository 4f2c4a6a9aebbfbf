"""The gated linear layer in a program: autograd, torch.compile, graphs; what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.ops.gated_linear import launch, variants
from megafold.ops.gated_linear import library as _library  # noqa: F401, registers
from tests.numerics import DEVICE, draw
from tests.ops.layer_norms import ON_GPU, results_of

CASE = cases.case("gated_linear", "N6 C24 O20")
OPERATORS = (
    torch.ops.megafold.gated_linear.default,
    torch.ops.megafold.gated_linear_backward.default,
)
ABSENT = ((), ("residual",), ("dropout",), ("residual", "dropout"))
each_call = pytest.mark.parametrize("absent", ABSENT, ids=lambda names: "no " + "+".join(names))


def drawn(absent: tuple[str, ...] = (), dtype: torch.dtype = torch.float16, seed: int = 0):
    inputs, grad = draw(CASE, dtype, DEVICE, seed)
    # As the model has them: x is a transpose, gate a slice, dropout repeats along a dimension.
    inputs["x"] = inputs["x"].transpose(0, 1)
    inputs["gate"] = torch.cat([inputs["gate"], inputs["gate"]], dim=-1)[..., 24:]
    return {**inputs, **dict.fromkeys(absent)}, grad


def fused(inputs):
    with ops.use("triton"):
        return CASE.run(inputs)


def leaves_of(inputs):
    leaves = {name: t.detach().requires_grad_() for name, t in cases.differentiable(inputs).items()}
    return {**inputs, **leaves}, list(leaves.values())


def assert_same(found, expected):
    assert [name for name, t in expected.items() if not torch.equal(found[name], t)] == []


def test_second_backward_gives_the_same_gradients():
    inputs, grad = drawn()
    inputs, leaves = leaves_of(inputs)
    out = fused(inputs)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_choice_is_that_of_the_forward_call():
    inputs, grad = drawn()
    given, leaves = leaves_of(inputs)
    out = fused(given)
    with ops.use("torch"):
        found = torch.autograd.grad(out, leaves, grad)
    expected = results_of(CASE, inputs, grad)
    for name, value in zip(cases.differentiable(inputs), found, strict=True):
        assert torch.equal(value, expected[f"grad {name}"]), name


def test_second_derivative_is_refused_with_a_way_out():
    inputs, grad = drawn()
    inputs, leaves = leaves_of(inputs)
    first = torch.autograd.grad(fused(inputs), leaves, grad, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'^gated_linear.*derivative.*use\("torch"\)'):
        torch.autograd.grad(sum(g.sum() for g in first), leaves)


def test_forward_mode_is_refused_and_drops_no_tangent():
    inputs, _ = drawn()
    with torch.autograd.forward_ad.dual_level():
        dual = {
            name: torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))
            for name, t in inputs.items()
        }
        with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
            fused(dual)


def test_no_graph_is_made_without_gradients():
    inputs, _ = drawn()
    assert not fused(inputs).requires_grad
    with torch.no_grad():
        assert not fused(leaves_of(inputs)[0]).requires_grad


@each_call
def test_registration_passes_opcheck(absent):
    inputs, grad = drawn(absent)
    forward, backward = OPERATORS
    kept = [inputs[name] for name in ("x", "gate", "weight", "dropout")]
    # It has no derivative, and says so.
    tests = ("test_schema", "test_faketensor")
    for asked in ([True] * 3, [True, False, False], [False, True, True]):
        torch.library.opcheck(backward, (grad, *kept, asked), test_utils=tests)
    given, _ = leaves_of(inputs)
    torch.library.opcheck(forward, tuple(given.values()))


def test_gradients_that_are_foretold_lie_in_memory_as_those_that_come():
    inputs, grad = drawn()
    kept = [inputs[name] for name in ("x", "gate", "weight", "dropout")]
    real = OPERATORS[1](grad, *kept, [True] * 3)
    meta = OPERATORS[1](grad.to("meta"), *(t.to("meta") for t in kept), [True] * 3)
    assert [t.stride() for t in meta] == [t.stride() for t in real]
    assert not real[0].is_contiguous()


def test_dispatch_modes_see_the_operators():
    seen = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    inputs, grad = drawn()
    expected = results_of(CASE, inputs, grad)
    with Seeing():
        found = results_of(CASE, inputs, grad)
    assert set(OPERATORS) <= set(seen)
    assert_same(found, expected)


@each_call
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=ON_GPU)])
def test_compiles_into_one_graph(backend, absent):
    inputs, grad = drawn(absent)
    torch.compiler.reset()
    compiled = torch.compile(fused, backend=backend, fullgraph=True)
    assert_same(accuracy.results(compiled, inputs, grad), results_of(CASE, inputs, grad))


def test_compiles_with_shapes_left_open():
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ("N6 C24 O20", "N9 C24 O20"):
        case = cases.case("gated_linear", shape)
        inputs, grad = draw(case, torch.float16, DEVICE)
        assert_same(accuracy.results(compiled, inputs, grad), results_of(case, inputs, grad))


def test_checkpointing_changes_no_bit():
    inputs, grad = drawn()

    def checkpointed(given):
        return checkpoint(fused, given, use_reentrant=False)

    found = accuracy.results(checkpointed, inputs, grad)
    assert_same(found, results_of(CASE, inputs, grad))


def test_autocast_is_no_matter_to_the_backward_pass():
    inputs, grad = drawn(dtype=torch.float32)
    given, leaves = leaves_of({**inputs, "gate": inputs["gate"].half()})
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = fused(given)
        inside = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    outside = torch.autograd.grad(out, leaves, grad)
    assert [g.dtype for g in outside] == [leaf.dtype for leaf in leaves]
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.gpu
def test_forward_and_backward_are_captured_in_a_cuda_graph():
    inputs, grad = drawn()
    given, leaves = leaves_of(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile, and let the allocator settle
        for _ in range(3):
            torch.autograd.grad(fused(given), leaves, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused(given)
        found = torch.autograd.grad(out, leaves, grad)
    fresh, fresh_grad = drawn(seed=1)
    with torch.no_grad():
        for name, t in given.items():
            t.copy_(fresh[name])
        grad.copy_(fresh_grad)
    graph.replay()
    expected = results_of(CASE, fresh, fresh_grad)
    assert torch.equal(out, expected["output"])
    for name, value in zip(cases.differentiable(given), found, strict=True):
        assert torch.equal(value, expected[f"grad {name}"]), name


# -- What is refused, and what is said.


@pytest.mark.parametrize(
    ("shape", "why"),
    [("N3 C136 O8", "up to 128 channels, and x has 136"), ("N3 C8 O136", "up to 128 outputs, and")],
)
def test_wider_rows_are_pytorch_s_and_refused_by_the_kernels(shape, why):
    case = cases.case("gated_linear", shape)
    inputs, _ = draw(case, torch.float16, DEVICE)
    choice = ops.explain("gated_linear", **inputs)
    assert choice.implementation == "torch"
    assert why in choice.reason
    with ops.use("torch"):
        assert torch.equal(case.run(inputs), case.run_reference(inputs))
    with ops.use("triton"), pytest.raises(NotImplementedError, match=why):
        case.run(inputs)


def test_explain_names_both_kernels_with_their_block_sizes():
    inputs, _ = drawn()
    with ops.use("triton"):
        lines = ops.explain("gated_linear", **inputs).kernels
    lines = [line for line in lines if not line.startswith("gated_linear.hopper")]
    assert [line.split(":")[0] for line in lines] == list(launch.KERNELS)
    assert all("BLOCK_M" in line for line in lines)


BAD = {
    "x of no dimension": ("x", lambda t: t[0, 0, 0], r"x has shape \(\), expected \[\.\.\., C\]"),
    "gate": ("gate", lambda t: t[:5], r"gate has shape \(5, 6, 24\), expected \[\.\.\., C\] = \(6"),
    "weight": ("weight", lambda t: t.T, r"weight has shape \(24, 20\), expected \[O, C\] = \(O, 2"),
    "residual": ("residual", lambda t: t[:1], r"residual has shape \(1, 6, 20\), .* = \(6, 6"),
    "dropout": ("dropout", lambda t: t[:, :5], r"dropout has shape \(1, 5, 20\), .* broadcasts to"),
    "larger dropout": ("dropout", lambda t: t[None].expand(2, 1, 6, 20), r"has shape \(2, 1, 6, 2"),
    "learnt dropout": ("dropout", lambda t: t.requires_grad_(), "requires a gradient, which it do"),
}


@pytest.mark.parametrize("which", BAD)
def test_what_does_not_fit_is_refused_with_what_would(which):
    name, change, message = BAD[which]
    inputs, _ = drawn()
    with pytest.raises(ValueError, match=rf"^gated_linear: .*{message}"):
        CASE.run({**inputs, name: change(inputs[name].clone())})


def test_dtypes_must_agree_without_autocast_and_fp64_with_it():
    inputs, _ = drawn()
    with pytest.raises(TypeError, match=r"residual is torch.float32, but x is torch.float16"):
        CASE.run({**inputs, "residual": inputs["residual"].float()})
    with (
        torch.autocast(DEVICE, dtype=torch.float16),
        pytest.raises(TypeError, match=r"dropout is torch.float64, but x is torch.float16"),
    ):
        CASE.run({**inputs, "dropout": inputs["dropout"].double()})


# -- What is compiled ahead of time.


def test_every_kernel_ships_and_every_argument_has_a_type():
    shipped = variants.variants()
    assert len({variant.name for variant in shipped}) == len(shipped)
    own = {variant.name.split()[0] for variant in shipped}
    assert own - {"gated_linear.hopper_backward"} == set(launch.KERNELS)
    for variant in shipped:
        assert list(variant.signature) == variant.kernel.arg_names
        constants = {name for name, kind in variant.signature.items() if kind == "constexpr"}
        assert set(variant.constants) == constants
    channels = {v.constants["C"] for v in shipped if v.signature.get("p_weight") == "*bf16"}
    assert {32, 128} <= channels
