"""One configuration of one kernel, tried; the interpreter stands in for a GPU."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.errors import OutOfResources

from megafold.bench import tune
from megafold.bench.cases import case
from megafold.ops import Config
from megafold.ops.evo_attention import launch
from megafold.ops.evo_attention.variants import block_names
from tests.numerics import DEVICE

CASE = case("evo_attention", "B1 S2 N20 H1 D16")


def tried(kernel: str = launch.FORWARD, of=CASE, size: int = 16) -> tune.Trial:
    blocks = {name: 1 if name in ("ROWS", "KEYS_FIRST") else size for name in block_names(kernel)}
    config, device = Config(blocks, 4, 1), torch.device(DEVICE)
    return tune.try_config(of, kernel, config, device, torch.float32, seconds=0.0)


@pytest.mark.parametrize("kernel", launch.KERNELS)
def test_a_right_one_has_a_time(kernel):
    trial = tried(kernel)
    assert (trial.kernel, trial.note) == (kernel, "")
    assert trial.config.num_warps == 4
    assert trial.ms > 0


def test_a_wrong_one_says_so_and_has_no_time(monkeypatch):
    def runs(of, device, dtype):
        out = torch.zeros(3)
        return [tune.KernelRun(launch.FORWARD, lambda: out.add_(1.0), (out,))]

    monkeypatch.setattr(tune, "runs", runs)
    trial = tried()
    assert trial.ms is None
    assert trial.note.startswith("wrong: differs by")


def test_running_out_of_shared_memory_is_a_sentence_with_bytes(monkeypatch):
    launches = iter([None, OutOfResources(294912, 232448, "shared memory")])

    def call():
        if error := next(launches):
            raise error

    run = tune.KernelRun(launch.FORWARD, call, (torch.zeros(3),))
    monkeypatch.setattr(tune, "runs", lambda *_: [run])
    trial = tried()
    assert trial.ms is None
    assert trial.note == (
        "A program asks for 294,912 bytes of shared memory, and 232,448 are available: "
        "take smaller blocks or fewer stages."
    )


def test_a_kernel_that_the_case_does_not_launch_is_refused():
    with pytest.raises(ValueError, match=r"does not launch 'evo_attention.grad_bias'; it launches"):
        tried(launch.GRAD_BIAS, case("evo_attention", "B1 S1 N20 H1 D16"))
