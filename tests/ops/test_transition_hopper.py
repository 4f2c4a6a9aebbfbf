"""The transition by the kernels for Hopper GPUs: they run on such a GPU alone."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megafold import ops
from megafold.bench import accuracy
from megafold.ops.transition import hopper, launch, passes
from megafold.ops.tuning import use_config
from tests.numerics import DEVICE, assert_accurate
from tests.ops.test_transition import drawn, fused, three_results

HERE = torch.device(DEVICE)
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def ran(monkeypatch):
    """How often both kernels were launched, of however few rows."""
    found = {"forward": mock.Mock(side_effect=hopper.launch_forward)}
    found["backward"] = mock.Mock(side_effect=hopper.launch_grad_rows)
    monkeypatch.setattr(hopper, "launch_forward", found["forward"])
    monkeypatch.setattr(hopper, "launch_grad_rows", found["backward"])
    monkeypatch.setattr(hopper, "FEWEST_ROWS", 1)
    return lambda: tuple(mocked.call_count for mocked in found.values())


def on_hopper(test):
    skip = pytest.mark.skipif(not hopper.is_hopper(HERE), reason="no Hopper GPU on this machine")
    return pytest.mark.gpu(skip(test))


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        "M60000 C128 H512",  # programs have several turns
        "M25345 C128 H256",  # the last rows are one
        "M9999 C128 H448",
        "M64 C128 H64",  # one block of hidden units, one group with rows
        "M70 C128 H128",
        "M1 C128 H192",
    ],
)
def test_accurate(shape, dtype, ran):
    assert_accurate(*three_results(*drawn(shape, dtype)))
    assert ran() == (1, 1)


@on_hopper
@pytest.mark.parametrize("without", ["norm_weight", "norm_bias"])
def test_accurate_without_a_parameter(without, ran):
    inputs, grad = drawn("M5000 C128 H512", torch.bfloat16)
    assert_accurate(*three_results({**inputs, without: None}, grad))
    assert ran() == (1, 1)


@on_hopper
def test_accurate_without_a_norm(ran):
    """As the conditioned transition has it."""
    inputs, grad = drawn("M5000 C128 H256", torch.bfloat16)
    x, _, _, *weights = inputs.values()
    asked = (True, False, False, True, True, True)

    def both() -> list[torch.Tensor]:
        y, stats = passes.forward(x, None, None, *weights, None)
        return [y, *passes.backward(grad, x, None, None, *weights, stats, None, False, asked)]

    found = both()
    assert ran() == (1, 1)
    with mock.patch.object(hopper, "why_not", return_value="not now"):
        for one, other in zip(found, both(), strict=True):
            torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)
    assert ran() == (1, 1)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    ["M60000 C128 H512", "M25345 C128 H256", "M12288 C128 H512", "M70 C128 H64", "M1 C128 H192"],
)
def test_accurate_on_the_residual(shape, dtype, ran):
    assert_accurate(*three_results(*drawn(shape, dtype), residual=True))
    assert ran() == (1, 1)


@on_hopper
@pytest.mark.parametrize("without", ["norm_weight", "norm_bias"])
def test_accurate_on_the_residual_without_a_parameter(without, ran):
    inputs, grad = drawn("M12345 C128 H512", torch.bfloat16)
    assert_accurate(*three_results({**inputs, without: None}, grad, residual=True))
    assert ran() == (1, 1)


@on_hopper
@pytest.mark.parametrize("shape", ["M60000 C128 H512", "M25345 C128 H64", "M1 C128 H64"])
def test_without_an_update_x_and_its_gradient_are_exact(shape, ran):
    """Every row is added to its own, whatever it was fetched beside."""
    inputs, grad = drawn(shape, torch.bfloat16)
    inputs["weight_out"] = torch.zeros_like(inputs["weight_out"])
    found = accuracy.results(lambda given: fused(given, residual=True), inputs, grad)
    assert ran() == (1, 1)
    assert torch.equal(found["output"], inputs["x"])
    assert torch.equal(found["grad x"], grad)


@on_hopper
def test_the_residual_without_a_norm(ran):
    """Not reached by the public function: what the passes allow."""
    inputs, grad = drawn("M15000 C128 H256", torch.bfloat16)
    x, _, _, *weights = inputs.values()
    asked = (True, False, False, True, True, True)

    def both() -> list[torch.Tensor]:
        y, stats = passes.forward(x, None, None, *weights, None, True)
        return [y, *passes.backward(grad, x, None, None, *weights, stats, None, True, asked)]

    found = both()
    assert ran() == (1, 1)
    with mock.patch.object(hopper, "why_not", return_value="not now"):
        for one, other in zip(found, both(), strict=True):
            torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)
    assert ran() == (1, 1)


@on_hopper
def test_the_residual_where_rows_lie_apart_and_where_one_gradient_is_for_all(ran):
    inputs, grad = drawn("M15000 C128 H256", torch.bfloat16)

    def on_x(given):
        return fused(given, residual=True)

    expected = accuracy.results(on_x, inputs, grad)
    wide = {**inputs, "x": torch.cat([inputs["x"]] * 2, dim=1)[:, :128]}
    apart = torch.cat([grad] * 2, dim=1)[:, :128]
    found = accuracy.results(on_x, wide, apart)
    assert ran() == (2, 2)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    doubles = {name: t.double() for name, t in inputs.items()}
    one = grad[:1, :1].expand_as(grad)  # copied, so that TMA reads it; one row for all it does not
    for upstream, times in ((one, (3, 3)), (grad[:1].expand_as(grad), (4, 3))):
        found, eager, exact = (
            accuracy.results(run, given, upstream)
            for run, given in (
                (on_x, inputs),
                (lambda given: ops.reference.transition(**given, residual=True), inputs),
                (lambda given: ops.reference.transition(**given, residual=True), doubles),
            )
        )
        assert_accurate(found, eager, exact)
        assert ran() == times


@on_hopper
def test_the_residual_gives_the_same_bits_and_leaves_its_gradient(ran):
    inputs, grad = drawn("M60000 C128 H512", torch.bfloat16)
    before = grad.clone()

    def on_x(given):
        return fused(given, residual=True)

    first = accuracy.results(on_x, inputs, grad)
    for _ in range(10):
        again = accuracy.results(on_x, inputs, grad)
        assert all(torch.equal(again[name], value) for name, value in first.items())
    assert torch.equal(grad, before)
    assert ran() == (11, 11)


@on_hopper
def test_accurate_where_rows_lie_apart(ran):
    inputs, grad = drawn("M5000 C128 H256", torch.bfloat16)
    expected = accuracy.results(fused, inputs, grad)
    wide = {**inputs, "x": torch.cat([inputs["x"]] * 2, dim=1)[:, :128]}
    apart = torch.cat([grad] * 2, dim=1)[:, :128]
    found = accuracy.results(fused, wide, apart)
    assert ran() == (2, 2)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@on_hopper
def test_the_same_input_gives_the_same_bits(ran):
    inputs, grad = drawn("M60000 C128 H512", torch.bfloat16)
    first = accuracy.results(fused, inputs, grad)
    for _ in range(10):
        again = accuracy.results(fused, inputs, grad)
        assert all(torch.equal(again[name], value) for name, value in first.items())
    assert ran() == (11, 11)


@on_hopper
@pytest.mark.parametrize("residual", [False, True])
def test_captured_in_a_graph(residual, ran):
    inputs, grad = drawn("M20000 C128 H512", torch.bfloat16)
    expected = accuracy.results(lambda given: fused(given, residual=residual), inputs, grad)
    given = {n: t.detach().requires_grad_() for n, t in inputs.items()}

    def call():
        out = fused(given, residual=residual)
        return torch.autograd.grad(out, list(given.values()), grad)

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
def test_others_take_what_they_do_not(ran):
    """Unaligned rows, gradients of x alone, and blocks of the caller's own."""
    inputs, grad = drawn("M500 C128 H256", torch.bfloat16)
    unaligned = torch.zeros(500, 129, dtype=torch.bfloat16, device=HERE)[:, 1:]
    unaligned.copy_(inputs["x"])
    assert_accurate(*three_results({**inputs, "x": unaligned}, grad))
    assert ran() == (0, 0)
    alone = {n: t.detach().requires_grad_(n == "x") for n, t in inputs.items()}
    fused(alone).backward(grad)
    assert ran() == (1, 0)
    problem = launch.Problem.of(inputs["x"], inputs["weight_gate"])
    for kernel in (launch.FORWARD, launch.GRAD_ROWS, launch.GRAD_WEIGHTS):
        config = launch.config_of(kernel, problem, HERE, torch.bfloat16).config
        before = ran()
        with use_config(kernel, config):
            assert_accurate(*three_results(inputs, grad))
        of_forward = kernel == launch.FORWARD
        assert ran() == (before[0] + (not of_forward), before[1] + of_forward)


def why(m=100_000, channels=128, hidden=512, dtype=torch.bfloat16, of_weights=torch.bfloat16):
    x = torch.empty(m, channels, dtype=dtype, device="meta")
    problem = launch.Problem(m, channels, hidden)
    return hopper.why_not(problem, x, of_weights, launch.FORWARD)


def test_when_they_run(monkeypatch):
    assert why() == "not a Hopper GPU"
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "has_gluon", lambda: True)
    assert why() == why(hidden=64) == ""
    fewest = hopper.FEWEST_ROWS
    assert why(m=fewest) == ""
    assert why(m=fewest - 1) == f"fewer than {fewest} rows"
    assert why(channels=64) == "rows of 64 channels, not 128"
    assert why(hidden=96) == "96 hidden units, no multiple of 64"
    for half in DTYPES:
        assert "one dtype of 16 bits" in why(dtype=torch.float32, of_weights=half)
    assert "one dtype of 16 bits" in why(dtype=torch.float32, of_weights=torch.float32)
    monkeypatch.setattr(hopper, "has_gluon", lambda: False)
    assert why() == "this Triton has no Gluon for it"


def test_explain_says_which_pass_is_theirs(monkeypatch):
    monkeypatch.setattr(launch, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "has_gluon", lambda: True)
    inputs, _ = drawn("M300 C128 H512")
    with ops.use("triton"):
        *_, forward, backward = ops.explain("transition", **inputs).kernels
        fewer = f"by the kernels above: fewer than {hopper.FEWEST_ROWS} rows"
        assert forward == f"transition.hopper: forward {fewer}"
        assert backward == f"transition.hopper: backward {fewer}"
        monkeypatch.setattr(hopper, "FEWEST_ROWS", 300)
        *_, forward, backward = ops.explain("transition", **inputs).kernels
    assert forward.startswith("transition.hopper: forward by Hopper's own kernels, where TMA")
    assert backward.startswith("transition.hopper: backward by Hopper's own kernels")
