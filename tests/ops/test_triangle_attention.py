"""Triangle attention by the kernels of its parts, against the equation in fp64 and those parts.

On a GPU where there is one, else in Triton's interpreter, which is why most sizes are small.
"""

from __future__ import annotations

import pytest
import torch

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.ops.triangle_attention import library as _library  # noqa: F401, registers
from megafold.ops.triangle_attention import passes
from megafold.ops.triangle_attention.function import apart
from megafold.ops.triangle_attention.joint import joint_weight
from tests.numerics import DEVICE, assert_accurate, draw
from tests.ops.layer_norms import DTYPES, HALF, ON_GPU, assert_kernels_accurate, results_of

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_half = pytest.mark.parametrize("dtype", HALF)
each_node = pytest.mark.parametrize("node", ["", " ending"], ids=["starting", "ending"])


def drawn(shape: str = "B2 N9 C32 H2", dtype: torch.dtype = torch.float16, **options):
    """A case, its inputs and a gradient; ``options`` replace those of the case, or inputs."""
    case = cases.case("triangle_attention", shape)
    inputs, grad = draw(case, dtype, DEVICE)
    case.options.update({k: v for k, v in options.items() if k in case.options})
    inputs.update({k: v for k, v in options.items() if k not in case.options})
    return case, inputs, grad


@each_dtype
@each_node
@pytest.mark.parametrize("shape", ["B1 N11 C32 H2", "B2 N5 C56 H7 D8", "B1 N7 C64 H4"])
def test_sizes(shape, node, dtype):
    assert_kernels_accurate(*drawn(shape + node, dtype))


@each_half  # in fp32 one pair is too few for a mean of errors
@each_node
def test_one_pair(node, dtype):
    assert_kernels_accurate(*drawn("B40 N1 C16 H1" + node, dtype))


@ON_GPU
@each_dtype
@each_node
@pytest.mark.parametrize("shape", ["B1 N256 C128 H4", "B1 N200 C128 H4", "B2 N131 C64 H2"])
def test_large_sizes(shape, node, dtype):
    """Of which Hopper's own kernels take the first two in 16 bits."""
    assert_kernels_accurate(*drawn(shape + node, dtype))


@each_half
@each_node
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("absent", [("mask",), ("dropout",), ("norm_weight", "norm_bias")], ids=str)
def test_what_may_be_left_out(absent, residual, node, dtype):
    none = dict.fromkeys(absent)
    assert_kernels_accurate(*drawn("B1 N6 C64 H4" + node, dtype, residual=residual, **none))


@pytest.mark.parametrize(
    "shape", [(9, 1, 32), (1, 9, 32), (2, 9, 9, 32), (32,), (2, 1, 9, 1)], ids=str
)
def test_dropout_repeats_along_any_dimensions(shape):
    case, inputs, grad = drawn()
    generator = torch.Generator().manual_seed(1)
    inputs["dropout"] = (torch.rand(shape, generator=generator) > 0.5).to(DEVICE, torch.float16)
    assert_kernels_accurate(case, inputs, grad)


@each_node
def test_a_pair_that_none_attends_to_and_a_row_without_keys(node):
    case, inputs, grad = drawn("B1 N9 C32 H2" + node)
    inputs["mask"][:, :, 3] = False
    inputs["mask"][:, 4] = False
    assert_kernels_accurate(case, inputs, grad)


@each_node
def test_results_are_those_of_its_parts_to_the_bit(node):
    """Without a residual, whose gradient the parts add in a pass of its own."""
    case, inputs, grad = drawn("B2 N7 C32 H2" + node, residual=False)

    def in_parts(inputs):
        i, starting = dict(inputs), case.options["starting"]
        weights = [i[f"{x}_weight"] for x in "qkvbg"]
        joint = ops.layer_norm_linear(
            i["z"], i["norm_weight"], i["norm_bias"], joint_weight(*weights)
        )
        q, k, v, g, b = joint.split([32, 32, 32, 32, 16], dim=-1)
        q, k, v = (t.unflatten(-1, (2, 16)) for t in (q, k, v))
        b, mask = b[..., :2].permute(0, 3, 1, 2), i["mask"]
        if not starting:
            q, k, v, mask = (t.transpose(1, 2) for t in (q, k, v, mask))
            b = b.transpose(2, 3)
        out = ops.evo_attention(q, k, v, mask, b)
        out = out if starting else out.transpose(1, 2)
        return ops.gated_linear(out.flatten(-2), g, i["out_weight"], None, i["dropout"])

    found = results_of(case, inputs, grad)
    with ops.use("triton"):
        expected = accuracy.results(in_parts, inputs, grad)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@each_node
@pytest.mark.parametrize(
    "asked",
    [("z",), ("out_weight",), ("norm_bias", "b_weight"), ("k_weight", "out_weight")],
    ids=str,
)
def test_gradients_asked_for_are_those_of_all(asked, node):
    case, inputs, grad = drawn("B1 N9 C32 H2" + node)
    every = results_of(case, inputs, grad)
    given = {n: None if t is None else t.detach() for n, t in inputs.items()}
    for name in asked:
        given[name] = given[name].requires_grad_()
    with ops.use("triton"):
        found = torch.autograd.grad(case.run(given), [given[name] for name in asked], grad)
    for name, value in zip(asked, found, strict=True):
        if len(asked) == len(set(asked) & {"z", "norm_bias", "norm_weight", "out_weight"}):
            assert torch.equal(value, every[f"grad {name}"]), name
        else:
            torch.testing.assert_close(value, every[f"grad {name}"], rtol=2e-3, atol=2e-3)


def test_nothing_is_computed_for_the_weight_behind_attention_alone(monkeypatch):
    monkeypatch.setattr(passes.evo_attention, "backward", None)
    monkeypatch.setattr(passes.layer_norm_linear, "backward", None)
    case, inputs, grad = drawn("B1 N9 C32 H2")
    inputs["out_weight"].requires_grad_()
    with ops.use("triton"):
        case.run(inputs).backward(grad)
    assert inputs["out_weight"].grad.abs().max() > 0


@each_node
def test_expanded_and_transposed_gradients(node):
    case, inputs, _ = drawn("B2 N5 C32 H2" + node)
    one = torch.ones((), dtype=torch.float16, device=DEVICE)
    for grad in (one.expand(case.output_shape), torch.randn(2, 5, 32, 5).to(one).transpose(2, 3)):
        exact = accuracy.exact_results(case, inputs, grad)
        eager = accuracy.results(case.run_reference, inputs, grad)
        assert_accurate(results_of(case, inputs, grad), eager, exact)


@each_node
def test_second_backward_gives_the_same_bits(node):
    case, inputs, grad = drawn("B1 N9 C32 H2" + node)
    leaves = [t.requires_grad_() for t in cases.differentiable(inputs).values()]
    with ops.use("triton"):
        out = case.run(inputs)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_node
@pytest.mark.parametrize("pairs", [0, 1])
def test_few_pairs(pairs, node):
    results = results_of(*drawn(f"B2 N{pairs} C32 H2" + node))
    assert results["output"].shape == (2, pairs, pairs, 32)
    assert all(value.isfinite().all() for value in results.values())
    assert pairs or (results["grad k_weight"] == 0).all()


def test_an_fp32_residual_stays_as_exact_under_autocast():
    case, inputs, grad = drawn("B1 N9 C32 H2", torch.float32)
    inputs["out_weight"].zero_()
    with torch.autocast(torch.device(DEVICE).type, torch.float16), ops.use("triton"):
        z = inputs["z"].requires_grad_()
        out = case.run(inputs)
    assert out.dtype == torch.float32
    assert torch.equal(out, z)
    out.backward(grad)
    assert torch.equal(z.grad, grad)


@each_node
def test_registration_passes_opcheck(node):
    case, inputs, grad = drawn("B1 N3 C16 H2" + node)
    of = {name: t for name, t in inputs.items() if not name.endswith("_weight") or "out" in name}
    weight = joint_weight(*(inputs[f"{x}_weight"] for x in "qkvbg"))
    starting = case.options["starting"]
    operands = (of["z"], of["mask"], inputs["norm_weight"], of["norm_bias"], weight)
    operands = (*operands, of["out_weight"], of["dropout"])
    forward = torch.ops.megafold.triangle_attention.default
    backward = torch.ops.megafold.triangle_attention_backward.default
    _, *kept = forward(*operands, 2, starting, True, 1e-5)
    tests = ("test_schema", "test_faketensor")  # it has no derivative, and says so
    for asked in ([True] * 5, [True, False, False, False, False], [False, True, True, True, False]):
        arguments = (grad, *operands, *kept, 2, starting, True, asked)
        torch.library.opcheck(backward, arguments, test_utils=tests)
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in operands[:-1]]
    torch.library.opcheck(forward, (*leaves, operands[-1], 2, starting, True, 1e-5))


def test_compiles_into_one_graph():
    case, inputs, grad = drawn("B1 N9 C32 H2")
    expected = results_of(case, inputs, grad)
    torch.compiler.reset()
    compiled = torch.compile(case.run, backend="aot_eager", fullgraph=True)
    with ops.use("triton"):
        found = accuracy.results(compiled, inputs, grad)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_double_backward_is_refused():
    case, inputs, grad = drawn("B1 N5 C16 H2")
    z = inputs["z"].requires_grad_()
    with ops.use("triton"):
        (first,) = torch.autograd.grad(case.run(inputs), [z], grad, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'^triangle_attention.*use\("torch"\)'):
        first.sum().backward()


# -- Which kernels.


def wide(channels: int, heads: int = 2):
    return drawn(f"B1 N3 C{channels} H{heads}")


@pytest.mark.parametrize("channels", [128, 136])
def test_more_channels_than_the_last_part_takes_are_parts_of_their_own(channels):
    """Attention and projections by kernels all the same, and no error."""
    case, inputs, grad = wide(channels)
    assert_kernels_accurate(case, inputs, grad)
    weight = joint_weight(*(inputs[f"{x}_weight"] for x in "qkvbg"))
    with ops.use("triton"):
        why = apart(inputs["z"], inputs["norm_weight"], weight, inputs["out_weight"])
        lines = ops.explain("triangle_attention", **inputs, **case.options).kernels
    if channels == 128:
        assert why is None
        assert lines[0] == "gradients side by side"
    else:
        assert why.endswith("takes up to 128 channels, and x has 136") or "128 channels" in why
        assert lines[0] == f"parts are operators of their own: {why}"
    assert any(line.startswith("evo_attention.forward") for line in lines)


def test_pytorch_s_is_the_reference():
    case, inputs, grad = drawn()
    with ops.use("torch"):
        found = accuracy.results(case.run, inputs, grad)
    expected = accuracy.results(case.run_reference, inputs, grad)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


# -- Bad input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": torch.zeros(9, 9, 32)}, r"z has shape \(9, 9, 32\), expected \[B, N, N, C\]"),
        ({"z": torch.zeros(1, 9, 8, 32)}, r"z has shape .*, expected \[B, N, N, C\]"),
        ({"mask": torch.ones(1, 9, 8, dtype=torch.bool)}, r"mask has shape .*\[B, N, N\] = "),
        ({"norm_bias": torch.zeros(31)}, r"norm_bias has shape \(31,\), expected \[C\] = \(32,\)"),
        ({"q_weight": torch.zeros(32, 31)}, r"q_weight has shape .*expected \[H D, C\]"),
        ({"q_weight": torch.zeros(33, 32)}, r"q_weight has shape \(33, 32\), .* D from 1 to 128"),
        ({"b_weight": torch.zeros(0, 32)}, r"b_weight has shape .*expected \[H, C\]"),
        ({"k_weight": torch.zeros(16, 32)}, r"k_weight has shape .*\[H D, C\] = \(32, 32\)"),
        ({"out_weight": torch.zeros(16, 32)}, r"out_weight has shape .*\[C, H D\] = \(32, 32\)"),
        ({"dropout": torch.zeros(9, 31)}, r"dropout has shape \(9, 31\), expected one that"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_shapes_are_named(changes, message):
    case, inputs, _ = drawn("B1 N9 C32 H2", torch.float32)
    inputs.update({name: t.to(DEVICE) for name, t in changes.items()})
    with pytest.raises(ValueError, match=f"^triangle_attention: {message}"):
        case.run(inputs)


def test_wrong_dtypes_are_named():
    case, inputs, _ = drawn("B1 N9 C32 H2", torch.float32)
    with pytest.raises(TypeError, match=r"^triangle_attention: mask must be torch.bool"):
        case.run({**inputs, "mask": inputs["mask"].float()})
    with pytest.raises(TypeError, match=r"^triangle_attention: g_weight is torch.float16, but z"):
        case.run({**inputs, "g_weight": inputs["g_weight"].half()})
    with pytest.raises(ValueError, match=r"^triangle_attention: dropout .* requires a gradient"):
        case.run({**inputs, "dropout": inputs["dropout"].requires_grad_()})
