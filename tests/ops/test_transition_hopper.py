"""Gradients of the transition's weights by the kernel for Hopper GPUs: on such a GPU alone."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.ops.transition import hopper, launch
from megafold.ops.tuning import use_config
from tests.numerics import DEVICE, assert_accurate, draw

HERE = torch.device(DEVICE)
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def ran(monkeypatch):
    """How often the kernel ran, of however few rows."""
    found = mock.Mock(side_effect=hopper.launch)
    monkeypatch.setattr(hopper, "launch", found)
    monkeypatch.setattr(hopper, "FEWEST_ROWS", 1)
    return found


def on_hopper(test):
    skip = pytest.mark.skipif(not hopper.is_hopper(HERE), reason="no Hopper GPU on this machine")
    return pytest.mark.gpu(skip(test))


def drawn(shape, dtype, op="transition"):
    case = cases.case(op, shape)
    return case, *draw(case, dtype, DEVICE)


def results_of(case, inputs, grad):
    def fused(given):
        with ops.use("triton"):
            return case.run(given)

    return accuracy.results(fused, inputs, grad)


def assert_kernels_accurate(case, inputs, grad):
    assert_accurate(
        results_of(case, inputs, grad),
        accuracy.results(case.run_reference, inputs, grad),
        accuracy.exact_results(case, inputs, grad),
    )


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        "M20000 C128 H512",
        "M5001 C128 H256",  # the last rows are no whole tile
        "M3000 C128 H768",
        "M70 C128 H512",  # most programs have no rows
    ],
)
def test_accurate(shape, dtype, ran):
    assert_kernels_accurate(*drawn(shape, dtype))
    assert ran.call_count == 1


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
def test_accurate_over_chunks(dtype, ran):
    """The second chunk and the third, shorter than the splits were made for, are added."""
    assert_kernels_accurate(*drawn("M70001 C128 H512", dtype))
    assert ran.call_count == 3


@on_hopper
def test_the_same_input_gives_the_same_bits(ran):
    case, inputs, grad = drawn("M70001 C128 H512", torch.bfloat16)
    first = results_of(case, inputs, grad)
    for _ in range(5):
        again = results_of(case, inputs, grad)
        assert all(torch.equal(again[name], value) for name, value in first.items())


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_norm_are_multiplied_where_they_are(dtype, ran):
    """The conditioned transition: what it multiplies are rows of its own."""
    assert_kernels_accurate(*drawn("S3 N1500 A128 C128 H256", dtype, "conditioned_transition"))
    assert ran.call_count >= 1


@on_hopper
def test_another_takes_what_it_does_not(ran):
    """An unaligned gradient, and blocks of the caller's own."""
    case, inputs, grad = drawn("M500 C128 H256", torch.bfloat16)
    unaligned = torch.zeros(500, 129, dtype=torch.bfloat16, device=HERE)[:, 1:]
    unaligned.copy_(grad)
    assert_kernels_accurate(case, inputs, unaligned)
    found = launch.config_of(
        launch.GRAD_WEIGHTS, launch.Problem(500, 128, 256), HERE, torch.bfloat16
    )
    with use_config(launch.GRAD_WEIGHTS, found.config):
        assert_kernels_accurate(case, inputs, grad)
    assert ran.call_count == 0


def why(m=100_000, channels=128, hidden=512, dtype=torch.bfloat16):
    problem = launch.Problem(m, channels, hidden)
    return hopper.why_not(problem, torch.device("meta"), dtype, launch.GRAD_WEIGHTS)


def test_when_it_runs(monkeypatch):
    assert why() == "not a Hopper GPU"
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "has_gluon", lambda: True)
    assert why() == why(dtype=torch.float16) == why(hidden=256) == ""
    assert why(dtype=torch.float32) == why(channels=64) == "not 128 channels of 16 bits"
    assert why(hidden=384) == "384 hidden units, no multiple of 256"
    assert why(m=100) == f"fewer than {hopper.FEWEST_ROWS} rows"
    with use_config(
        launch.GRAD_WEIGHTS, ops.Config({"BLOCK_U": 16, "BLOCK_K": 16, "WAVES": 1}, 4, 1)
    ):
        assert why() == "use_config has another kernel in force"
    monkeypatch.setattr(hopper, "has_gluon", lambda: False)
    assert why() == "this Triton has no Gluon for it"


@pytest.mark.parametrize(
    ("hidden", "longest"), [(512, 100_000), (256, 100), (4096, 10), (65536, 9)]
)
def test_splits_fill_the_gpu_and_none_is_without_rows(hidden, longest):
    splits = hopper.splits_of(hidden, longest, torch.device("meta"))
    assert splits == max(1, min(132 // (3 * hidden // 256), -(-longest // 64)))


def test_explain_says_whether_it_runs(monkeypatch):
    monkeypatch.setattr(launch, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "has_gluon", lambda: True)
    _, inputs, _ = drawn("M30 C128 H512", torch.float16)
    with ops.use("triton"):
        *_, last = ops.explain("transition", **inputs).kernels
    assert last.startswith("transition.hopper: gradients of weights by the kernels above: fewer")
