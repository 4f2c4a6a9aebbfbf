"""The conditioned transition added to its residual, by the kernels: in no pass more."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.bench.memory import peak_bytes, saved_tensors
from megafold.ops.conditioned_transition import residual
from megafold.ops.launcher import Launcher
from megafold.ops.recording import launches
from tests.numerics import DEVICE, DRAWS, assert_accurate, assert_alike, draw, pooled
from tests.ops import equations
from tests.ops.test_conditioned_transition import DTYPES, ON_GPU, leaves_of

OP = "conditioned_transition"
NARROW, WIDE = "S2 N33 A64 C32 H128", "S2 N9 A136 C24 H40"
# With room in gate and value for the gradients of the norm's projections, as in AlphaFold 3.
WIDER = "S2 N9 A136 C24 H144"
SHAPES = [
    NARROW,
    f"{NARROW} shared",
    WIDE,
    f"{WIDE} shared",
    WIDER,
    pytest.param("S4 N384 A768 C384 H1536", marks=ON_GPU),
    pytest.param("S4 N4000 A128 C128 H256 shared", marks=ON_GPU),
]
# One for each plan: whether gate and value are kept, and what the norm keeps.
PLANS = ["S2 N7 A16 C8 H32", "S2 N7 A16 C8 H32 shared", WIDE, WIDER, f"{WIDE} shared"]
# Of so many channels that it is not by chance how the errors of sums over rows compare.
MANY = "S3 N30 A96 C80 H96"
each_plan = pytest.mark.parametrize("shape", PLANS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.float32])


def drawn(shape, dtype=torch.float16, seed=0):
    return draw(cases.case(OP, shape), dtype, DEVICE, seed)


def fused(inputs, **options):
    """By the kernels, on the residual."""
    with ops.use("triton"):
        return ops.conditioned_transition(**inputs, residual=True, **options)


def alone(inputs):
    with ops.use("triton"):
        return ops.conditioned_transition(**inputs)


def reference(inputs, **options):
    return ops.reference.conditioned_transition(**inputs, residual=True, **options)


def under_autocast(run, dtype=torch.float16):
    def call(given):
        with torch.autocast(DEVICE, dtype=dtype):
            return run(given)

    return call


def exactly(inputs, grad, **options):
    doubles = {name: t if t is None else t.double() for name, t in inputs.items()}
    return accuracy.results(lambda given: reference(given, **options), doubles, grad)


def three_results(inputs, grad, **options):
    """Output and gradients of the kernels, of eager, and in fp64, on the same values."""
    return (
        accuracy.results(lambda given: fused(given, **options), inputs, grad),
        accuracy.results(lambda given: reference(given, **options), inputs, grad),
        exactly(inputs, grad, **options),
    )


def assert_kernels_accurate(inputs, grad, **options):
    assert_accurate(*three_results(inputs, grad, **options))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, t in expected.items() if not torch.equal(found[name], t)] == []


def without_update(inputs):
    return {**inputs, "weight_out": torch.zeros_like(inputs["weight_out"])}


# -- What is computed.


@pytest.mark.parametrize("shape", ["S2 N9 A16 C12 H24", "S3 N9 A16 C12 H24 shared"])
def test_reference_is_a_and_the_equation(shape):
    inputs, grad = drawn(shape, torch.float64)

    def equation(given):
        return given["a"] + equations.conditioned_transition(**given)

    expected = accuracy.results(equation, inputs, grad)
    for name, value in accuracy.results(reference, inputs, grad).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_every_gradient_are_as_accurate_as_eager(shape, dtype):
    draws = (three_results(*drawn(shape, dtype, seed)) for seed in range(DRAWS))
    assert_accurate(*pooled(draws))


@pytest.mark.parametrize(
    "condition",
    [lambda s: s[0], lambda s: s[:, :1], lambda s: s[:1, :1], lambda s: s[0, 0]],
    ids=["[N, C]", "[S, 1, C]", "[1, 1, C]", "[C]"],
)
@pytest.mark.parametrize("shape", ["S6 N35 A24 C20 H48", "S3 N12 A136 C20 H40"])
def test_a_condition_may_be_shared_in_any_way(shape, condition):
    inputs, grad = drawn(shape)
    assert_kernels_accurate({**inputs, "s": condition(inputs["s"]).clone()}, grad)


@pytest.mark.parametrize("without", ["norm_weight_s", "norm_bias_gate", "bias_scale"])
@pytest.mark.parametrize("shape", ["S2 N33 A64 C32 H128", "S2 N33 A136 C24 H40"])
def test_parameters_may_be_left_out(shape, without):
    inputs, grad = drawn(shape)
    assert_kernels_accurate({**inputs, without: None}, grad)


@pytest.mark.parametrize("shape", [MANY, f"{MANY} shared", *PLANS[2:]])
def test_eps_reaches_the_norms(shape):
    inputs, grad = drawn(shape)
    assert_kernels_accurate(inputs, grad, eps=0.3)


@each_dtype
@each_plan
def test_without_an_update_a_and_its_gradient_are_exact(shape, dtype):
    inputs, grad = drawn(shape, dtype)
    found = accuracy.results(fused, without_update(inputs), grad)
    assert torch.equal(found["output"], inputs["a"])
    assert torch.equal(found["grad a"], grad)


@each_dtype
@each_plan
def test_without_gradients_the_output_is_the_same_and_no_graph_is_made(shape, dtype):
    inputs, _ = drawn(shape, dtype)
    out = fused(inputs)
    assert not out.requires_grad
    given, _ = leaves_of(inputs)
    torch.testing.assert_close(fused(given).detach(), out)
    with torch.no_grad():
        assert torch.equal(fused(given), out)


@each_plan
def test_the_same_input_gives_the_same_bits(shape):
    inputs, grad = drawn(shape)
    assert_same(accuracy.results(fused, inputs, grad), accuracy.results(fused, inputs, grad))


@pytest.mark.parametrize(
    ("shape", "units"),
    [("S0 N4 A8 C6 H16", 16), ("S2 N0 A136 C6 H16", 16), ("S2 N3 A8 C6 H16", 0),
     ("S2 N3 A136 C6 H16", 0)],
)  # fmt: skip
@each_dtype
def test_empty_inputs_give_a_and_its_gradient(shape, units, dtype):
    inputs, grad = drawn(shape, dtype)
    inputs |= {name: inputs[name][:units] for name in ("weight_gate", "weight_value")}
    inputs["weight_out"] = inputs["weight_out"][:, :units]
    found = accuracy.results(fused, inputs, grad)
    assert torch.equal(found.pop("output"), inputs["a"])
    assert torch.equal(found.pop("grad a"), grad)
    assert all((value == 0).all() for value in found.values())


# -- Gradients of the output: laid out in any way, and never written.


@each_plan
def test_any_strides_of_a_and_of_the_gradient(shape):
    inputs, grad = drawn(shape)
    expected = accuracy.results(fused, inputs, grad)

    def apart(t):
        return torch.stack([t, t], dim=-1)[..., 0]

    def in_wider_rows(t):
        return torch.cat([t, t], dim=-1)[..., : t.shape[-1]]

    for spread in (apart, in_wider_rows):
        found = accuracy.results(fused, {**inputs, "a": spread(inputs["a"])}, spread(grad))
        assert_alike(found, expected)


@each_dtype
@each_plan
def test_one_gradient_for_all(shape, dtype):
    inputs, grad = drawn(shape, dtype)
    for one in (grad[:1], grad[:1, :1], grad[:1, :1, :1]):
        expanded = one.expand_as(grad)
        assert_alike(
            accuracy.results(fused, inputs, expanded),
            accuracy.results(fused, inputs, expanded.contiguous()),
        )


@each_dtype
@each_plan
def test_the_gradient_of_the_output_is_left_as_it_was(shape, dtype):
    inputs, grad = drawn(shape, dtype)
    before = grad.clone()
    found = accuracy.results(fused, inputs, grad)
    assert torch.equal(grad, before)
    assert found["grad a"].data_ptr() != grad.data_ptr()


@pytest.mark.parametrize(
    "names",
    [("a",), ("s",), ("norm_weight_gate",), ("weight_value",), ("weight_out",), ("weight_scale",),
     ("bias_scale",), ("a", "weight_out"), ("s", "norm_bias_gate")],
    ids=str,
)  # fmt: skip
@each_plan
def test_gradients_asked_for_are_those_of_all(shape, names):
    inputs, grad = drawn(shape)
    expected = accuracy.results(fused, inputs, grad)
    given, leaves = leaves_of(inputs, names)
    found = torch.autograd.grad(fused(given), leaves, grad)
    for name, value in zip(names, found, strict=True):
        assert torch.equal(value, expected[f"grad {name}"]), name


@each_plan
def test_what_is_kept_is_written_over_in_the_last_backward_pass_alone(shape):
    inputs, grad = drawn(shape)
    given, leaves = leaves_of(inputs)
    kept = []

    def noted(tensor):
        kept.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        out = fused(given)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad, create_graph=True)  # the operator
    assert all(torch.equal(t, before) for t, before in kept)
    third = torch.autograd.grad(out, leaves, grad)
    changed = [tuple(t.shape) for t, before in kept if not torch.equal(t, before)]
    # The logits of the gate, what that is multiplied with; gate and value.
    pairs = {WIDE: (18, 80), WIDER: (18, 288)}
    assert changed == ([(18, 136), (18, 136), pairs[shape]] if shape in pairs else [])
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


# -- An fp32 a under autocast.


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=ON_GPU)])
@pytest.mark.parametrize("shape", [NARROW, f"{NARROW} shared", WIDE, f"{WIDE} shared"])
def test_an_fp32_a_stays_fp32_under_autocast(shape, dtype):
    inputs, grad = drawn(shape, torch.float32)
    found = accuracy.results(under_autocast(fused, dtype), inputs, grad)
    eager = accuracy.results(under_autocast(reference, dtype), inputs, grad)
    assert {name: t.dtype for name, t in found.items()} == dict.fromkeys(found, torch.float32)
    assert eager["output"].dtype == torch.float32
    assert_accurate(found, eager, exactly(inputs, grad))


@each_plan
def test_an_fp32_a_and_its_gradient_are_not_rounded_under_autocast(shape):
    inputs, grad = drawn(shape, torch.float32)
    for upstream in (grad, grad[:1].expand_as(grad)):
        found = accuracy.results(under_autocast(fused), without_update(inputs), upstream)
        assert torch.equal(found["output"], inputs["a"])
        assert torch.equal(found["grad a"], upstream)


# -- No pass more, and no more memory.


@each_dtype
@each_plan
def test_no_kernel_is_launched_beside_those_without_it(shape, dtype):
    def kernels(run):
        with launches(run=True) as found:
            accuracy.results(run, *drawn(shape, dtype))
        return [one.kernel for one in found]

    assert kernels(fused) == kernels(alone)


@each_dtype
@each_plan
def test_as_much_is_kept_as_without_it(shape, dtype):
    given, leaves = leaves_of(drawn(shape, dtype)[0])

    def made(run):
        found = saved_tensors(lambda: run(given), leaves)
        return sorted(tuple(s.shape) for s in found if not s.existing and 0 not in s.shape)

    # What is kept of the shared scale's linear layer is the same; n is kept in another shape.
    assert sum(map(_numbers, made(fused))) == sum(map(_numbers, made(alone)))


def _numbers(shape):
    return torch.Size(shape).numel()


# GPUs hand out memory in larger steps, and norms have more programs there, each with its sums.
@pytest.mark.skipif(DEVICE != "cpu", reason="counts what a CPU's memory takes")
def test_the_norm_s_pass_needs_no_more_memory_than_the_transition_s(monkeypatch):
    """At most: what is kept, and the gradients of the activation and of the condition."""
    inputs, grad = drawn("S2 N512 A136 C24 H272")
    given, leaves = leaves_of(inputs)
    monkeypatch.setattr(Launcher, "__call__", lambda self, *tensors: None)
    # Without oneDNN, which on some CPUs copies operands of 16 bits before it multiplies them.
    with torch.backends.mkldnn.flags(enabled=False):
        peak = peak_bytes(lambda: torch.autograd.grad(fused(given), leaves, grad), DEVICE)
    a, s, weight = (inputs[name].nbytes for name in ("a", "s", "weight_gate"))
    statistics = 4 * 2 * 2 * 1024  # of a and of s
    # Output, n, gate of the norm, logits, what they gate; gate and value; the normalised condition.
    kept = (1 + 4 + 4) * a + s + statistics
    assert peak <= kept + 2 * a + s + 6.1 * weight


# -- torch.library, torch.compile, checkpoints.


def operands_of(inputs):
    """The arguments of both operators, and their names."""
    of_norm = list(inputs.values())[:6]
    weights = [inputs[name] for name in ("weight_gate", "weight_value", "weight_out")]
    scale, bias = inputs["weight_scale"], inputs["bias_scale"]
    logits = torch.nn.functional.linear(inputs["s"].to(scale.dtype), scale, bias)
    return {
        "conditioned_transition": [*of_norm, logits, *weights],
        "conditioned_transition_keeping": [
            *of_norm, inputs["s"].to(scale.dtype).clone(), *weights, scale, bias,
        ],
    }  # fmt: skip


@pytest.mark.parametrize("mixed", [False, True], ids=["alike", "a and s in fp32"])
@pytest.mark.parametrize("without", [(), ("norm_weight_s", "norm_bias_gate", "bias_scale")])
@pytest.mark.parametrize("keeping", [True, False])
@pytest.mark.parametrize("name", ["conditioned_transition", "conditioned_transition_keeping"])
def test_registration_passes_opcheck(name, keeping, without, mixed):
    inputs, grad = drawn("S2 N3 A136 C8 H16")
    inputs |= dict.fromkeys(without)
    if mixed:
        inputs["a"], inputs["s"], grad = inputs["a"].float(), inputs["s"].float(), grad.float()
    options = [1e-5, torch.float16]
    if name == "conditioned_transition":
        options.append(keeping)
    elif not keeping:
        pytest.skip("it always keeps")
    tensors = operands_of(inputs)[name]
    operator = getattr(torch.ops.megafold, name)
    _, *kept = operator(*tensors, *options)
    torch.library.opcheck(
        getattr(torch.ops.megafold, f"{name}_backward").default,
        (grad, *tensors, *kept, [t is not None for t in tensors]),
        test_utils=("test_schema", "test_faketensor"),  # it has no derivative, and says so
    )
    given = [t if t is None else t.detach().requires_grad_() for t in tensors]
    torch.library.opcheck(operator.default, (*given, *options))


@each_plan
def test_compiles_into_one_graph_and_checkpointing_changes_no_bit(shape):
    inputs, grad = drawn(shape)
    expected = accuracy.results(fused, inputs, grad)
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)

    def checkpointed(given):
        return checkpoint(fused, given, use_reentrant=False)

    for function in (compiled, checkpointed):
        assert_same(accuracy.results(function, inputs, grad), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["S4 N384 A768 C384 H1536", "S4 N1000 A128 C128 H256 shared"])
def test_compiles_with_inductor(shape):
    inputs, grad = drawn(shape, torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True)
    found = accuracy.results(compiled, inputs, grad)
    assert_accurate(found, accuracy.results(reference, inputs, grad), exactly(inputs, grad))


@each_plan
def test_second_derivative_is_refused_with_a_way_out(shape):
    inputs, grad = drawn(shape)
    given, leaves = leaves_of(inputs)
    first = torch.autograd.grad(fused(given), leaves, grad, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'no second derivative.*use\("torch"\)'):
        torch.autograd.grad(sum(g.sum() for g in first), leaves)


# -- What is refused, and what is said.


def test_other_than_yes_or_no_is_refused():
    inputs, _ = drawn(PLANS[0])
    message = rf"^{OP}: residual must be True or False \(whether a is added .*\), got Tensor"
    with pytest.raises(TypeError, match=message):
        ops.conditioned_transition(**inputs, residual=inputs["a"])


def test_pytorch_s_own_is_the_reference():
    inputs, grad = drawn(PLANS[0])

    def by_torch(given):
        with ops.use("torch"):
            return ops.conditioned_transition(**given, residual=True)

    expected = accuracy.results(reference, inputs, grad)
    assert_same(accuracy.results(by_torch, inputs, grad), expected)


@each_plan
def test_explain_says_what_adds(shape):
    inputs, _ = drawn(shape)
    with ops.use("triton"):
        *others, last = ops.explain(OP, **inputs, residual=True).kernels
        assert others == list(ops.explain(OP, **inputs).kernels)
    assert last == "residual: a added in the kernel of the gate, its gradients in the norm's"


def test_the_operators_take_the_dtypes_of_the_public_function(monkeypatch):
    """Under autocast all weights are cast but that of the condition's norm, and a and s are not."""
    inputs, _ = drawn(PLANS[0], torch.float32)
    seen = []
    real = residual.forward
    monkeypatch.setattr(residual, "_call", lambda *given: seen.append(given) or real(*given))
    under_autocast(fused)(inputs)
    tensors = [t for t in seen[0] if isinstance(t, torch.Tensor)]
    assert [t.dtype for t in tensors] == [torch.float32] * 3 + [torch.float16] * 7
