"""LayerNorm + Linear by the kernels for Hopper GPUs: they run on such a GPU alone."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megafold import ops
from megafold.bench import cases
from megafold.ops.hopper import recording
from megafold.ops.layer_norm_linear import hopper, launch
from megafold.ops.recording import recorded
from megafold.ops.tuning import use_config
from tests.numerics import DEVICE, assert_accurate, draw
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
    """How often the gradients of a call were found by their kernel, of however few rows."""
    found = mock.Mock(side_effect=hopper.launch)
    monkeypatch.setattr(hopper, "launch", found)
    monkeypatch.setattr(hopper, "FEWEST_ROWS", 1)
    return found


@pytest.fixture
def ran_forward(monkeypatch):
    """How often the output of a call was."""
    found = mock.Mock(side_effect=hopper.launch_forward)
    monkeypatch.setattr(hopper, "launch_forward", found)
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
def test_accurate(shape, dtype, ran, ran_forward):
    assert_kernels_accurate(*drawn(shape, dtype))
    assert ran.call_count == ran_forward.call_count == 1


@on_hopper
@pytest.mark.parametrize("without", ["norm_weight", "norm_bias", "bias"])
def test_accurate_without_a_parameter(without, ran, ran_forward):
    case, inputs, grad = drawn("M5000 C128 O256", torch.bfloat16)
    assert_kernels_accurate(case, {**inputs, without: None}, grad)
    assert ran.call_count == ran_forward.call_count == 1


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [32_768, 40_001])
@pytest.mark.parametrize("outs", [136, 192, 512, 528, 576])
def test_output_and_statistics_accurate(outs, rows, dtype, ran_forward):
    case, inputs, _ = drawn(f"M{rows} C128 O{outs}", dtype)
    operands = [inputs[name] for name in ("x", "norm_weight", "norm_bias", "weight", "bias")]
    out, stats = launch.forward(*operands, 1e-5)
    assert ran_forward.call_count == 1
    exact = case.run_reference({name: t.double() for name, t in inputs.items()})
    assert_accurate({"output": out}, {"output": case.run_reference(inputs)}, {"output": exact})
    x = inputs["x"].double()
    torch.testing.assert_close(stats[0].double(), x.mean(1), atol=1e-6, rtol=0)
    rstd = (x.var(1, unbiased=False) + 1e-5).rsqrt()
    torch.testing.assert_close(stats[1].double(), rstd, atol=0, rtol=1e-6)


@on_hopper
@pytest.mark.parametrize("rows", [70, 20_000, 20_033])
@pytest.mark.parametrize("outs", [136, 512, 528])
def test_all_of_the_output_is_written_and_no_more(outs, rows):
    _, inputs, _ = drawn(f"M{rows} C128 O{outs}", torch.bfloat16)
    operands = [inputs[name] for name in ("x", "norm_weight", "norm_bias", "weight", "bias")]
    room = torch.full((rows + 64, outs), float("nan"), dtype=torch.bfloat16, device=HERE)
    stats = torch.full((2, rows + 64), float("nan"), device=HERE).flatten()
    hopper.launch_forward(*operands, room[:rows], stats[: 2 * rows].view(2, rows), 1e-5)
    assert room[:rows].isfinite().all()
    assert stats[: 2 * rows].isfinite().all()
    assert room[rows:].isnan().all()
    assert stats[2 * rows :].isnan().all()


@on_hopper
@pytest.mark.parametrize("plan", [(3, 1, 2, 2), (2, 2, 1, 2), (2, 4, 1, 1), (3, 1, 2, 1)])
def test_output_accurate_with_other_constants(plan, ran_forward, monkeypatch):
    monkeypatch.setattr(hopper, "FORWARD", hopper.Forward(*plan))
    for outs in (256, 384, 528):
        assert_kernels_accurate(*drawn(f"M33000 C128 O{outs}", torch.bfloat16))
    assert ran_forward.call_count == 3


@on_hopper
def test_accurate_where_rows_lie_apart(ran, ran_forward):
    case, inputs, grad = drawn("M5000 C128 O256", torch.bfloat16)
    expected = results_of(case, inputs, grad)
    apart = torch.zeros(5000, 272, dtype=torch.bfloat16, device=HERE)
    apart[:, :256] = grad
    wide = {**inputs, "x": torch.cat([inputs["x"]] * 2, dim=1)[:, :128]}
    found = results_of(case, wide, apart[:, :256])
    assert ran.call_count == ran_forward.call_count == 2
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@on_hopper
def test_the_same_input_gives_the_same_bits(ran, ran_forward):
    case, inputs, grad = drawn("M40000 C128 O528", torch.bfloat16)
    first = results_of(case, inputs, grad)
    for _ in range(20):
        again = results_of(case, inputs, grad)
        assert all(torch.equal(again[name], value) for name, value in first.items())
    assert ran.call_count == ran_forward.call_count == 21


@on_hopper
def test_captured_in_a_graph(ran):
    case, inputs, grad = drawn("M20000 C128 O512", torch.bfloat16)
    expected = results_of(case, inputs, grad)
    given = {n: t.detach().requires_grad_() for n, t in inputs.items()}

    def call():
        with ops.use("triton"):
            out = case.run(given)
            return out.detach(), *torch.autograd.grad(out, list(given.values()), grad)

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
    for name, value in zip(("output", *(f"grad {n}" for n in given)), found, strict=True):
        assert torch.equal(value, expected[name]), name


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


@on_hopper
def test_others_take_an_output_that_it_does_not(ran, ran_forward):
    """Unaligned rows, and blocks of the caller's own."""
    case, inputs, grad = drawn("M500 C128 O256", torch.bfloat16)
    unaligned = torch.zeros(500, 129, dtype=torch.bfloat16, device=HERE)[:, 1:]
    unaligned.copy_(inputs["x"])
    assert_kernels_accurate(case, {**inputs, "x": unaligned}, grad)
    found = launch.config_of(launch.FORWARD, launch.Problem(500, 128, 256), inputs["weight"])
    with use_config(launch.FORWARD, found.config):
        assert_kernels_accurate(case, inputs, grad)
    assert ran_forward.call_count == 0
    assert ran.call_count == 1  # of aligned rows


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


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("staging", [1, 2, 3])
def test_the_forward_kernel_takes_the_room_that_a_weight_leaves(groups, block, staging):
    wanted = hopper.Forward(groups, block, staging, 2)
    for outs in range(136, hopper.MOST_OUTS + 1, 8):
        plan, weight = hopper.forward_of(wanted, outs), -(-outs // hopper.TILE)
        assert plan.groups == groups
        assert min(plan) >= 1
        assert all(have <= most for have, most in zip(plan, wanted, strict=True))
        assert plan.block <= weight
        assert weight % plan.block <= 1
        taken = weight + groups * (plan.depth + plan.staging * plan.block / 2)
        assert taken <= hopper.TILES


@pytest.mark.skipif(not hopper.has_gluon(), reason="this Triton has no Gluon for it")
def test_which_kernel_the_forward_pass_launches():
    def launched(rows=40_000, outs=512, step=128, bias=None):
        def empty(*shape):
            return torch.empty(shape, dtype=torch.bfloat16, device="meta")

        operands = empty(rows, step)[:, :128], empty(128), None, empty(outs, 128)
        bias = None if bias is None else empty(outs)
        with recording():
            (found,) = recorded(lambda: launch.forward(*operands, bias, 1e-5))
        return found.name.removeprefix("layer_norm_linear.")

    assert launched() == launched(step=256) == launched(bias=True) == "hopper_forward"
    assert launched(step=129) == launched(rows=10_000) == launched(outs=128) == "forward"
    assert launched(rows=300_000) == "forward"
    assert launched(rows=300_000, outs=256) == "hopper_forward"
    weight = torch.empty(512, 128, dtype=torch.bfloat16, device="meta")
    found = launch.config_of(launch.FORWARD, launch.Problem(40_000, 128, 512), weight)
    with use_config(launch.FORWARD, found.config):
        assert launched() == "forward"


def test_explain_says_whether_it_runs(monkeypatch):
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "has_gluon", lambda: True)
    _, inputs, _ = drawn("M300 C128 O512", torch.float16)
    with ops.use("triton"):
        *_, output, gradients = ops.explain("layer_norm_linear", **inputs).kernels
        fewer = "by the kernels above: fewer than 32768 rows"
        assert output == f"layer_norm_linear.hopper: output {fewer}"
        assert gradients == f"layer_norm_linear.hopper: gradients {fewer}"
        monkeypatch.setattr(hopper, "FEWEST_ROWS", 300)
        *_, output, gradients = ops.explain("layer_norm_linear", **inputs).kernels
        own = "by Hopper's own kernels, where TMA"
        assert output.startswith(f"layer_norm_linear.hopper: output {own}")
        assert gradients.startswith(f"layer_norm_linear.hopper: gradients {own}")
        problem = launch.Problem(300, 128, 512)
        found = launch.config_of(launch.FORWARD, problem, inputs["weight"])
        with use_config(launch.FORWARD, found.config):
            *_, output, gradients = ops.explain("layer_norm_linear", **inputs).kernels
    others = "by the kernels above: use_config has other kernels in force"
    assert output == f"layer_norm_linear.hopper: output {others}"
    assert gradients.startswith(f"layer_norm_linear.hopper: gradients {own}")
