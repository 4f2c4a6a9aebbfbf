"""What a call launches, recorded or run."""

from __future__ import annotations

import pytest
import torch

from megafold import ops
from megafold.bench.cases import case
from megafold.ops import launcher
from megafold.ops.recording import launches, recorded
from tests.numerics import DEVICE

CASE = case("layer_norm_linear", "M40 C32 O16")
HALF = torch.float16


def on_meta() -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(argument.shape, dtype=argument.stored_as(HALF), device="meta")
        for name, argument in CASE.arguments.items()
    }


def test_an_operator_is_recorded_on_tensors_without_memory():
    with ops.use("triton"), launches(run=False) as found:
        out = CASE.run(on_meta())
    assert out.device.type == "meta"
    assert [launch.kernel for launch in found] == ["layer_norm_linear.forward"]
    assert found[0].compiled is None
    assert found[0].tensors[0].device.type == "meta"


def test_nothing_runs_on_such_tensors_otherwise():
    assert not launcher.recording
    with ops.use("triton"), pytest.raises(RuntimeError, match="its input is on meta"):
        CASE.run(on_meta())
    with ops.use("triton"), launches(run=True), pytest.raises(RuntimeError, match="is on meta"):
        CASE.run(on_meta())


def test_a_kernel_that_ran_is_launched_again_on_the_same_tensors():
    inputs = CASE.make_inputs(DEVICE, HALF, torch.Generator().manual_seed(0))
    with ops.use("triton"), launches(run=True) as found:
        out = CASE.run(inputs)
    right = out.clone()
    out.zero_()
    found[0].again()
    assert torch.equal(out, right)


def test_what_is_launched_twice_is_one_variant():
    with ops.use("triton"):
        once = recorded(lambda: CASE.run(on_meta()), "here")
        twice = recorded(lambda: [CASE.run(on_meta()) for _ in range(2)], "here")
    assert [v.name for v in once] == ["layer_norm_linear.forward here"]
    assert twice == once
