"""The gated linear layer by the kernel for Hopper GPUs: it runs on such a GPU alone."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megafold import ops
from megafold.ops.gated_linear import hopper, launch
from megafold.ops.hopper import recording
from megafold.ops.recording import recorded
from megafold.ops.tuning import use_config
from tests.numerics import DEVICE
from tests.ops.layer_norms import assert_kernels_accurate, results_of
from tests.ops.test_gated_linear import LAID_OUT, drawn, of_rows, transposed

HERE = torch.device(DEVICE)
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def ran(monkeypatch):
    """How often the gradients of a call were found by their kernel, of however few rows."""
    found = mock.Mock(side_effect=hopper.launch)
    monkeypatch.setattr(hopper, "launch", found)
    monkeypatch.setattr(hopper, "FEWEST_ROWS", 1)
    return found


def on_hopper(test):
    skip = pytest.mark.skipif(not hopper.is_hopper(HERE), reason="no Hopper GPU on this machine")
    return pytest.mark.gpu(skip(test))


def dropout(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """What dropout multiplies by, 0 or one over 0.75."""
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(5)) > 0.25
    return (keep / 0.75).to(HERE, dtype)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        "N384 C128",  # programs have seventeen tiles or eighteen
        "N131 C128",  # tiles at both edges are cut off
        "N96 C128",  # programs have two tiles, or one
        "N9 C128",  # four tiles
        "N2 C128",
    ],
)
def test_accurate(shape, dtype, ran):
    assert_kernels_accurate(*drawn(shape, dtype))
    assert ran.call_count == 1


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 101, 128), (67, 1, 128), (67, 101, 128), (128,), (1, 1, 1)])
def test_accurate_with_dropout_along_either_dimension(shape, dtype, ran):
    case, inputs, grad = of_rows((67, 101), dtype, 128, 128)
    assert_kernels_accurate(case, {**inputs, "dropout": dropout(*shape, dtype=dtype)}, grad)
    assert ran.call_count == 1


@on_hopper
@pytest.mark.parametrize("absent", [("dropout",), ("residual",), ("residual", "dropout")], ids=str)
def test_accurate_without_residual_or_dropout(absent, ran):
    case, inputs, grad = drawn("N131 C128", torch.bfloat16)
    assert_kernels_accurate(case, {**inputs, **dict.fromkeys(absent)}, grad)
    assert ran.call_count == 1


@on_hopper
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize(
    "lead", [(), (1,), (7000,), (65,), (3, 11), (1, 200), (200, 1), (2, 70, 70), (2, 1, 3, 4)],
    ids=str,
)  # fmt: skip
def test_rows_may_have_any_dimensions(lead, dropped, ran):
    case, inputs, grad = of_rows(lead, torch.bfloat16, 128, 128)
    inputs["dropout"] = inputs["dropout"] if dropped else None
    assert_kernels_accurate(case, inputs, grad)
    assert ran.call_count == 1


@on_hopper
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("given", [n for n in LAID_OUT if "spread" not in n])
def test_accurate_in_any_layout_and_the_same_bits(given, dim, ran):
    case, inputs, grad = of_rows((70, 129), torch.bfloat16, 128, 128)
    shape = [70, 129, 128]
    shape[dim] = 1
    inputs["dropout"] = dropout(*shape)
    expected = results_of(case, inputs, grad)
    laid_out = LAID_OUT[given]
    apart = {
        n: laid_out[n](t) if n in laid_out and n != "dropout" else t for n, t in inputs.items()
    }
    grad = laid_out["grad"](grad) if "grad" in laid_out else grad
    assert_kernels_accurate(case, apart, grad)
    for name, value in results_of(case, apart, grad).items():
        assert torch.equal(value, expected[name]), name
    assert ran.call_count == 3


@on_hopper
@pytest.mark.parametrize("i", [131, 64])
@pytest.mark.parametrize("j", [131, 64])
def test_all_of_the_gradients_is_written_and_no_more(i, j, ran):
    """As triangle attention has it: beside the gradient of the gate lie others."""
    _, inputs, grad = of_rows((i, j), torch.bfloat16, 128, 128)
    x = transposed(inputs["x"])
    room = torch.full((i + 8, j + 8, 528), float("nan"), dtype=torch.bfloat16, device=HERE)
    into = room[:i, :j, 384:512]
    operands = (x, inputs["gate"], inputs["weight"], dropout(1, j, 128))
    of_x, of_weight = (
        launch.backward(grad, *operands, (True,) * 3, into_gate=into)[k] for k in (0, 2)
    )
    assert ran.call_count == 2
    assert of_x.stride() == x.stride()
    for t in (of_x, of_weight, into):
        assert t.isfinite().all()
    into.fill_(float("nan"))
    assert room.isnan().all()


@on_hopper
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("sides", [(8, 8), (1, 64), (64, 1), (16, 4)])
def test_accurate_with_other_constants(sides, stages, ran, monkeypatch):
    monkeypatch.setattr(hopper, "SIDES", (sides,))
    monkeypatch.setattr(hopper, "STAGES", stages)
    monkeypatch.setattr(hopper, "plan_of", hopper.plan_of.__wrapped__)
    assert_kernels_accurate(*drawn("N131 C128", torch.bfloat16))
    assert ran.call_count == 1


@on_hopper
def test_the_same_input_gives_the_same_bits(ran):
    case, inputs, grad = drawn("N200 C128", torch.bfloat16)
    first = results_of(case, inputs, grad)
    for _ in range(20):
        again = results_of(case, inputs, grad)
        assert all(torch.equal(again[name], value) for name, value in first.items())
    assert ran.call_count == 21


@on_hopper
def test_gates_far_from_zero_stay_finite(ran):
    case, inputs, grad = drawn("N64 C128", torch.float16)
    assert_kernels_accurate(case, {**inputs, "gate": inputs["gate"] * 20}, grad)
    assert ran.call_count == 1


@on_hopper
def test_captured_in_a_graph(ran):
    case, inputs, grad = drawn("N131 C128", torch.bfloat16)
    expected = results_of(case, inputs, grad)
    given = {n: t.detach().requires_grad_(n != "dropout") for n, t in inputs.items()}
    leaves = {n: t for n, t in given.items() if t.requires_grad}

    def call():
        with ops.use("triton"):
            out = case.run(given)
            return out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for t in found[:-1]:  # the last is the gradient of the residual: that of the output itself
        t.zero_()
    graph.replay()
    for name, value in zip(("output", *(f"grad {n}" for n in leaves)), found, strict=True):
        assert torch.equal(value, expected[name]), name


@on_hopper
def test_others_take_what_it_does_not(ran):
    """Repeated or unaligned gradients, some of them only, fp32, and blocks of the caller's own."""
    case, inputs, grad = drawn("N20 C128", torch.bfloat16)
    assert_kernels_accurate(case, inputs, grad[:, :1, :1].expand(grad.shape))
    unaligned = torch.zeros(20, 20, 129, dtype=torch.bfloat16, device=HERE)[..., 1:]
    unaligned.copy_(grad)
    assert_kernels_accurate(case, inputs, unaligned)
    some = {n: t.detach().requires_grad_(n in ("x", "weight")) for n, t in inputs.items()}
    with ops.use("triton"):
        case.run(some).backward(grad)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        results_of(case, {**inputs, "residual": inputs["residual"].float()}, grad.float())
    assert_kernels_accurate(*drawn("N20 C64 O128", torch.bfloat16))
    found = launch.config_of(launch.BACKWARD, launch.Problem(400, 128, 128), inputs["weight"])
    with use_config(launch.BACKWARD, found.config):
        assert_kernels_accurate(case, inputs, grad)
    assert ran.call_count == 0


# -- What needs no GPU.


def why(m=100_000, channels=128, outs=128, of=torch.bfloat16, grad=None, dropped=torch.bfloat16):
    weight = torch.empty(outs, channels, dtype=of, device="meta")
    by = None if dropped is None else torch.empty(1, dtype=dropped, device="meta")
    return hopper.why_not(launch.Problem(m, channels, outs), weight, grad or of, by, "kernel")


def test_when_it_runs(monkeypatch):
    assert why() == "not a Hopper GPU"
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "has_gluon", lambda: True)
    assert why() == why(dropped=None) == why(of=torch.float16) == ""
    assert why(m=12_287) == "fewer than 12288 rows"
    assert why(channels=64) == "64 channels and 128 outputs, not 128 of both"
    assert why(outs=32) == "128 channels and 32 outputs, not 128 of both"
    assert why(of=torch.float32) == "operands that are not of 16 bits"
    assert why(grad=torch.float32) == "an output that is not of the operands' dtype"
    assert why(dropped=torch.float32) == "dropout that is not of 16 bits"
    monkeypatch.setattr(hopper, "is_overridden", lambda *kernels: kernels == ("kernel",))
    assert why() == "use_config has another kernel in force"
    monkeypatch.setattr(hopper, "is_overridden", lambda *kernels: False)
    monkeypatch.setattr(hopper, "has_gluon", lambda: False)
    assert why() == "this Triton has no Gluon for it"


@pytest.mark.skipif(not hopper.has_gluon(), reason="this Triton has no Gluon for it")
def test_which_kernel_the_backward_pass_launches():
    half = torch.bfloat16

    def empty(*shape, of=half):
        return torch.empty(shape, dtype=of, device="meta")

    def launched(tokens=120, step=528, of_out=half, of_dropout=half, asked=(True,) * 3, grad=None):
        x, gate = empty(tokens, tokens, 128).transpose(0, 1), empty(tokens, tokens, step)[..., :128]
        grad = empty(tokens, tokens, 128, of=of_out) if grad is None else grad
        by = empty(1, tokens, 128, of=of_dropout)
        with recording():
            found = recorded(
                lambda: launch.backward(grad, x, gate, empty(128, 128), by, asked), "once"
            )
        return found[0].name.removeprefix("gated_linear.").removesuffix(" once")

    assert launched() == launched(step=128) == "hopper_backward"
    assert launched(grad=empty(120, 120, 128).transpose(0, 1)) == "hopper_backward"
    assert launched(tokens=100) == launched(step=529) == "backward"
    assert launched(of_out=torch.float32) == launched(of_dropout=torch.float32) == "backward"
    assert launched(asked=(True, True, False)) == "backward"
    assert launched(grad=empty(1).expand(120, 120, 128)) == "backward"
    problem = launch.Problem(120 * 120, 128, 128)
    found = launch.config_of(launch.BACKWARD, problem, empty(128, 128))
    with use_config(launch.BACKWARD, found.config):
        assert launched() == "backward"


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        (384, 384, (8, 8, 2304, 48, 132)),
        (131, 131, (8, 8, 289, 17, 132)),
        (1, 7000, (1, 64, 110, 110, 110)),  # rows of one dimension
        (3, 640, (1, 64, 30, 10, 30)),
        (640, 3, (8, 8, 80, 1, 80)),
        (1, 1, (8, 8, 1, 1, 1)),
    ],
)
def test_rows_are_cut_into_the_fewest_tiles(outer, inner, expected):
    assert tuple(hopper.plan_of(outer, inner, torch.device("meta"))) == expected


def test_explain_says_whether_it_runs(monkeypatch):
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "has_gluon", lambda: True)
    monkeypatch.setattr(launch.hopper, "FEWEST_ROWS", 17)
    _, inputs, _ = drawn("N4 C128", torch.float16)
    start = "gated_linear.hopper: gradients by"
    with ops.use("triton"):
        *_, line = ops.explain("gated_linear", **inputs).kernels
        assert line == f"{start} the kernels above: fewer than 17 rows"
        monkeypatch.setattr(hopper, "FEWEST_ROWS", 16)
        *_, line = ops.explain("gated_linear", **inputs).kernels
        assert line.startswith(f"{start} Hopper's own kernels, where TMA")
        found = launch.config_of(launch.BACKWARD, launch.Problem(16, 128, 128), inputs["weight"])
        with use_config(launch.BACKWARD, found.config):
            *_, line = ops.explain("gated_linear", **inputs).kernels
    assert line == f"{start} the kernels above: use_config has another kernel in force"
