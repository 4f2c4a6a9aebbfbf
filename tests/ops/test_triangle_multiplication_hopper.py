"""Triangle multiplication by the kernels for Hopper GPUs: they run on such a GPU alone."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megafold import ops
from megafold.bench.cases import differentiable
from megafold.ops.triangle_multiplication import (
    hopper,
    hopper_launch_backward,
    hopper_launch_forward,
    hopper_launch_weights,
    launch,
)
from megafold.ops.tuning import use_config
from tests.numerics import DEVICE
from tests.ops.layer_norms import assert_kernels_accurate, results_of
from tests.ops.test_triangle_multiplication import NORMS, assert_same, drawn, fused
from tests.ops.test_triangle_multiplication_residual import SHARED, added_to_z, with_dropout

HERE = torch.device(DEVICE)
DTYPES = [torch.bfloat16, torch.float16]
LAUNCHES = {
    hopper_launch_forward: ("launch_project", "launch_output"),
    hopper_launch_weights: ("launch_weights_out", "launch_weights_in"),
    hopper_launch_backward: ("launch_grad_x", "launch_grad_z"),
}


@pytest.fixture
def ran(monkeypatch):
    """How often each kernel was launched, of however few pairs: in the order of LAUNCHES."""
    found = []
    for module, names in LAUNCHES.items():
        for name in names:
            found.append(mock.Mock(side_effect=getattr(module, name)))
            monkeypatch.setattr(module, name, found[-1])
    monkeypatch.setattr(hopper, "FEWEST_PAIRS", 1)
    return lambda: [mocked.call_count for mocked in found]


def on_hopper(test):
    skip = pytest.mark.skipif(not hopper.is_hopper(HERE), reason="no Hopper GPU on this machine")
    return pytest.mark.gpu(skip(test))


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        "B1 N260 C128",  # the last pairs are no whole tile
        "B2 N180 C128 incoming",
        "B1 N192 C128",
        "B1 N8 C128",  # one tile of pairs
        "B1 N4 C128 incoming",  # a quarter of one
    ],
)
def test_accurate(shape, dtype, ran):
    assert_kernels_accurate(*drawn(shape, dtype))
    assert ran() == [1] * 6


@on_hopper
@pytest.mark.parametrize("without", [*NORMS, "mask"])
def test_accurate_without_a_parameter(without, ran):
    case, inputs, grad = drawn("B1 N100 C128", torch.bfloat16)
    assert_kernels_accurate(case, {**inputs, without: None}, grad)
    # Without one of the parameters of a norm the other one's gradient is still asked for.
    assert ran() == [1] * 6


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("letters", [None, *SHARED], ids=str)
@pytest.mark.parametrize("shape", ["B1 N64 C128", "B2 N60 C128 incoming"])
def test_accurate_with_a_residual(shape, letters, dtype, ran):
    """And dropout shared in any way, also where a tile of pairs is of two batches."""
    assert_kernels_accurate(*added_to_z(shape, dtype, letters))
    assert ran() == [1] * 6


@on_hopper
@pytest.mark.parametrize("letters", [None, "..NC", ".N.C"], ids=str)
@pytest.mark.parametrize(
    "shape", ["B1 N128 C128", "B1 N260 C128", "B1 N100 C128 incoming", "B1 N4 C128"]
)
def test_accurate_with_a_residual_at_other_sizes(shape, letters, ran):
    """Two programs' turns and more, the last pairs no whole tile, and a quarter of one."""
    assert_kernels_accurate(*added_to_z(shape, torch.bfloat16, letters))
    assert ran() == [1] * 6


@on_hopper
@pytest.mark.parametrize("letters", ["..NC", "N."], ids=str)
def test_accurate_with_dropout_alone(letters, ran):
    case, inputs, grad = drawn("B1 N100 C128", torch.bfloat16)
    assert_kernels_accurate(case, with_dropout(inputs, letters), grad)
    assert ran() == [1] * 6


@on_hopper
@pytest.mark.parametrize("without", [*NORMS, "mask"])
def test_accurate_with_a_residual_without_a_parameter(without, ran):
    case, inputs, grad = added_to_z("B1 N100 C128", torch.bfloat16)
    assert_kernels_accurate(case, {**inputs, without: None}, grad)
    assert ran() == [1] * 6


@on_hopper
@pytest.mark.parametrize("letters", [None, "..NC"], ids=str)
def test_a_gradient_that_is_part_of_another_is_read_where_it_lies(letters, ran):
    case, inputs, grad = added_to_z("B1 N100 C128", torch.bfloat16, letters)
    wide = torch.cat([grad, grad, grad], dim=-1)[..., 128:256]
    assert_same(results_of(case, inputs, wide), results_of(case, inputs, grad))
    assert ran() == [2] * 6


@on_hopper
def test_dropout_in_fp32_beside_operands_in_16_bits(ran):
    """As under autocast: the same kernels, and no less exact."""
    case, inputs, grad = added_to_z("B1 N100 C128", torch.bfloat16)
    expected = results_of(case, inputs, grad)
    inputs["dropout"] = inputs["dropout"].float()  # of values that 16 bits hold
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert_same(results_of(case, inputs, grad), expected)
    assert ran() == [2] * 6


@on_hopper
@pytest.mark.parametrize("shape", ["B1 N260 C128", "B1 N384 C128 incoming"])
def test_where_dropout_leaves_out_all_z_and_its_gradient_pass_unchanged(shape, ran):
    case, inputs, grad = added_to_z(shape, torch.bfloat16)
    inputs["dropout"] = torch.zeros_like(inputs["dropout"])
    found = results_of(case, inputs, grad)
    assert torch.equal(found.pop("output"), inputs["z"])
    assert torch.equal(found.pop("grad z"), grad)
    assert all((value == 0).all() for value in found.values())
    assert ran() == [1] * 6


@on_hopper
def test_masked_pairs_change_nothing(ran):
    _, inputs, _ = drawn("B1 N64 C128", torch.bfloat16)
    inputs["mask"][:, 40:] = False
    inputs["mask"][:, :, 40:] = False
    other = inputs["z"].clone()
    other[:, 40:] += 3.0
    first, second = (fused({**inputs, "z": z})[:, :40, :40] for z in (inputs["z"], other))
    assert torch.equal(first, second)
    assert ran()[:2] == [2, 2]


@on_hopper
@pytest.mark.parametrize("make", [drawn, added_to_z], ids=["alone", "dropout and residual"])
@pytest.mark.parametrize("shape", ["B1 N260 C128", "B1 N384 C128 incoming"])
def test_the_same_input_gives_the_same_bits(shape, make, ran):
    case, inputs, grad = make(shape, torch.bfloat16)
    first = results_of(case, inputs, grad)
    for _ in range(10):
        assert_same(results_of(case, inputs, grad), first)
    assert ran() == [11] * 6


@on_hopper
@pytest.mark.parametrize("make", [drawn, added_to_z], ids=["alone", "dropout and residual"])
def test_captured_in_a_graph(make, ran):
    case, inputs, grad = make("B1 N192 C128", torch.bfloat16)
    expected = results_of(case, inputs, grad)
    leaves = {n: t.detach().requires_grad_() for n, t in differentiable(inputs).items()}
    given = {**inputs, **leaves}

    def call():
        with ops.use("triton"):
            return torch.autograd.grad(case.run(given), list(leaves.values()), grad)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for t in found:
        t.zero_()
    graph.replay()
    for name, value in zip(leaves, found, strict=True):
        assert torch.equal(value, expected[f"grad {name}"]), name


@on_hopper
def test_others_take_what_they_do_not(ran):
    """Pairs that fill no 16 bytes, gradients of z alone, and blocks of the caller's own."""
    assert_kernels_accurate(*drawn("B1 N49 C128", torch.bfloat16))
    assert ran() == [0] * 6
    case, inputs, grad = drawn("B1 N48 C128", torch.bfloat16)
    alone = {
        n: t.detach().requires_grad_(n == "z") if t.is_floating_point() else t
        for n, t in inputs.items()
    }
    fused(alone).backward(grad)
    assert ran() == [1, 1, 0, 0, 0, 0]
    problem = launch.Problem(1, 48, 128)
    for kernel in launch.KERNELS:
        config = launch.config_of(kernel, problem, inputs["p_in_weight"]).config
        before = ran()
        with use_config(kernel, config):
            assert_kernels_accurate(case, inputs, grad)
        assert sum(ran()) == sum(before) + 5


def why(pairs=147_456, channels=128, dtype=torch.bfloat16, of_weights=torch.bfloat16):
    problem = mock.Mock(pairs=pairs, channels=channels)
    z = torch.empty(1, 1, channels, dtype=dtype, device="meta")
    return hopper.why_not(problem, z, of_weights, launch.GRAD_Z)


def test_when_they_run(monkeypatch):
    assert why() == "not a Hopper GPU"
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "has_gluon", lambda: True)
    fewest = hopper.FEWEST_PAIRS
    assert why() == why(pairs=fewest) == ""
    assert why(pairs=fewest - 8) == f"fewer than {fewest} pairs"
    assert why(pairs=147_457) == "147457 pairs, no multiple of 8"
    assert why(channels=64) == "64 channels, not 128"
    for half in DTYPES:
        assert "one dtype of 16 bits" in why(dtype=torch.float32, of_weights=half)
    assert "one dtype of 16 bits" in why(dtype=torch.float32, of_weights=torch.float32)
    monkeypatch.setattr(hopper, "has_gluon", lambda: False)
    assert why() == "this Triton has no Gluon for it"


def test_explain_says_which_kernels_are_theirs(monkeypatch):
    for module in (launch, hopper):
        monkeypatch.setattr(module, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "has_gluon", lambda: True)
    _, inputs, _ = drawn("B1 N8 C128")
    with ops.use("triton"):
        *_, line, _ = ops.explain("triangle_multiplication", **inputs).kernels
        names = "project, output, weights_out, grad_x, weights_in, grad_z"
        fewer = f"fewer than {hopper.FEWEST_PAIRS} pairs"
        assert line == f"triangle_multiplication.hopper: {names} by the kernels above: {fewer}"
        monkeypatch.setattr(hopper, "FEWEST_PAIRS", 64)
        *_, line, _ = ops.explain("triangle_multiplication", **inputs).kernels
    assert line.startswith(f"triangle_multiplication.hopper: {names} by Hopper's own kernels")
