"""Gradients of LayerNorm + Linear by the kernel for Hopper GPUs: it runs on such a GPU alone."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megafold import ops
from megafold.bench import cases
from megafold.ops.layer_norm_linear import hopper, launch
from megafold.ops.tuning import use_config
from tests.numerics import DEVICE, draw
from tests.ops.layer_norms import assert_kernels_accurate, results_of

HERE = torch.device(DEVICE)
DTYPES = [torch.bfloat16, torch.float16]


def drawn(shape: str, dtype: torch.dtype):
    """A case with a bias."""
    case = cases.case("layer_norm_linear", shape)
    inputs, grad = draw(case, dtype, DEVICE)
    bias = torch.randn(grad.shape[-1], generator=torch.Generator().manual_seed(1))
    return case, {**inputs, "bias": bias.to(DEVICE, dtype)}, grad


@pytest.fixture
def ran(monkeypatch):
    """How often the gradients of a call were found by this kernel, of however few rows."""
    found = mock.Mock(side_effect=hopper.launch)
    monkeypatch.setattr(hopper, "launch", found)
    monkeypatch.setattr(hopper, "FEWEST_ROWS", 1)
    return found


def on_hopper(test):
    skip = pytest.mark.skipif(not hopper.is_hopper(HERE), reason="no Hopper GPU on this machine")
    return pytest.mark.gpu(skip(test))


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        "M20000 C128 O512",
        "M9999 C128 O528",  # the last outputs are few, the last rows no whole tile
        "M8500 C128 O136",
        "M4300 C128 O576",  # as many outputs as there is room for
        "M8448 C128 O384",  # every program has two tiles, or one
        "M70 C128 O200",  # most programs have no rows
    ],
)
def test_accurate(shape, dtype, ran):
    assert_kernels_accurate(*drawn(shape, dtype))
    assert ran.call_count == 1


@on_hopper
@pytest.mark.parametrize("without", ["norm_weight", "norm_bias", "bias"])
def test_accurate_without_a_parameter(without, ran):
    case, inputs, grad = drawn("M5000 C128 O256", torch.bfloat16)
    assert_kernels_accurate(case, {**inputs, without: None}, grad)
    assert ran.call_count == 1


@on_hopper
def test_accurate_where_rows_lie_apart(ran):
    case, inputs, grad = drawn("M5000 C128 O256", torch.bfloat16)
    expected = results_of(case, inputs, grad)
    apart = torch.zeros(5000, 272, dtype=torch.bfloat16, device=HERE)
    apart[:, :256] = grad
    wide = {**inputs, "x": torch.cat([inputs["x"]] * 2, dim=1)[:, :128]}
    found = results_of(case, wide, apart[:, :256])
    assert ran.call_count == 2
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@on_hopper
def test_the_same_input_gives_the_same_bits(ran):
    case, inputs, grad = drawn("M40000 C128 O528", torch.bfloat16)
    first = results_of(case, inputs, grad)
    for _ in range(20):
        again = results_of(case, inputs, grad)
        assert all(torch.equal(again[name], value) for name, value in first.items())
    assert ran.call_count == 21


@on_hopper
def test_captured_in_a_graph(ran):
    case, inputs, grad = drawn("M20000 C128 O512", torch.bfloat16)
    expected = results_of(case, inputs, grad)
    given = {n: t.detach().requires_grad_() for n, t in inputs.items()}

    def call():
        with ops.use("triton"):
            return torch.autograd.grad(case.run(given), list(given.values()), grad)

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
    for name, value in zip(given, found, strict=True):
        assert torch.equal(value, expected[f"grad {name}"]), name


@on_hopper
def test_others_take_what_it_does_not(ran):
    """Unaligned gradients, gradients of x alone, and blocks of the caller's own."""
    case, inputs, grad = drawn("M500 C128 O256", torch.bfloat16)
    unaligned = torch.zeros(500, 257, dtype=torch.bfloat16, device=HERE)[:, 1:]
    unaligned.copy_(grad)
    assert_kernels_accurate(case, inputs, unaligned)
    alone = {n: t.detach().requires_grad_(n == "x") for n, t in inputs.items()}
    with ops.use("triton"):
        case.run(alone).backward(grad)
    found = launch.config_of(launch.GRAD_X, launch.Problem(500, 128, 256), inputs["weight"])
    with use_config(launch.GRAD_X, found.config):
        assert_kernels_accurate(case, inputs, grad)
    assert ran.call_count == 0


def why(m=100_000, channels=128, outs=512, dtype=torch.bfloat16, of_weight=torch.bfloat16):
    return hopper.why_not(
        torch.empty(m, channels, dtype=dtype, device="meta"), outs, channels, of_weight, ()
    )


def test_when_it_runs(monkeypatch):
    assert why() == "not a Hopper GPU"
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "has_gluon", lambda: True)
    assert why() == ""
    assert why(outs=136) == why(outs=576) == ""
    assert why(m=32_767) == "fewer than 32768 rows"
    assert why(channels=64) == "rows of 64 channels, not 128"
    assert why(outs=516).startswith("516 outputs: no multiple of 8")
    assert why(outs=128).startswith("128 outputs")
    assert why(outs=584).startswith("584 outputs")
    for half in (torch.float16, torch.bfloat16):
        assert "one dtype of 16 bits" in why(dtype=torch.float32, of_weight=half)
    assert "one dtype of 16 bits" in why(dtype=torch.float32, of_weight=torch.float32)
    monkeypatch.setattr(hopper, "has_gluon", lambda: False)
    assert why() == "this Triton has no Gluon for it"


@pytest.mark.parametrize("outs", [136, 256, 384, 512, 528, 576])
@pytest.mark.parametrize("multiprocessors", [132, 78, 16])
def test_programs_of_both_kinds_fill_the_gpu(outs, multiprocessors, monkeypatch):
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: multiprocessors)
    plan = hopper.plan_of.__wrapped__(outs, torch.device("meta"))
    assert plan.programs(outs) == multiprocessors
    assert min(plan) >= 1


def test_explain_says_whether_it_runs(monkeypatch):
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "has_gluon", lambda: True)
    _, inputs, _ = drawn("M300 C128 O512", torch.float16)
    with ops.use("triton"):
        *_, last = ops.explain("layer_norm_linear", **inputs).kernels
        assert last == (
            "layer_norm_linear.hopper: gradients by the kernels above: fewer than 32768 rows"
        )
        monkeypatch.setattr(hopper, "FEWEST_ROWS", 300)
        *_, last = ops.explain("layer_norm_linear", **inputs).kernels
    assert last.startswith("layer_norm_linear.hopper: gradients by Hopper's own kernels, where TMA")
