"""One configuration of one kernel, tried; the interpreter stands in for a GPU."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.errors import OutOfResources

from megafold.bench import tune
from megafold.bench.cases import case
from megafold.bench.launches import Pass, tunable, tunables
from megafold.ops import Config
from megafold.ops.evo_attention import launch
from megafold.ops.launcher import Launcher
from tests.numerics import DEVICE

HERE = torch.device(DEVICE)
DTYPE = torch.float16
SMALL = {
    "evo_attention": "B1 S2 N9 H1 D16",
    "layer_norm_linear": "M20 C16 O20",
    "gated_linear": "N4 C16",
    "gated": "S4 N4 A16 shared",
    "transition": "M20 C16 H32",
    "triangle_multiplication": "B1 N4 C16",
    "adaptive_layer_norm": "S2 N3 A16 C16",
    "conditioned_transition": "S2 N3 A16 C16 H32",
}
EVERY = [(op, kernel) for op, shape in SMALL.items() for kernel in tunables(case(op, shape), DTYPE)]
CASE = case("layer_norm_linear", SMALL["layer_norm_linear"])
FORWARD = "layer_norm_linear.forward"
BLOCKS = {"BLOCK_M": 16, "BLOCK_O": 16, "HELD": 0}


def tried(config: Config | None = None) -> tune.Trial:
    config = config or Config(BLOCKS, 4, 1)
    return tune.try_config(CASE, FORWARD, config, HERE, DTYPE, seconds=0.0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # launched again, on what it has written
@pytest.mark.parametrize(("op", "kernel"), EVERY)
def test_a_right_one_has_a_time(op, kernel):
    of = case(op, SMALL[op])
    config = tunable(of, kernel, DTYPE).in_force(HERE).config
    trial = tune.try_config(of, kernel, config, HERE, DTYPE, seconds=0.0)
    assert (trial.kernel, trial.config, trial.note) == (kernel, config, "")
    assert trial.ms > 0


def test_a_wrong_one_says_so_and_has_no_time(monkeypatch):
    """A gradient that is wrong by way of what a kernel of the forward pass left counts, too."""
    whole = Pass.launched

    def launched(self):
        results, found = whole(self)
        if tune_is_trying:
            results["grad norm_weight"].add_(1.0)
        return results, found

    tune_is_trying = False
    bench = tune.Bench(CASE, HERE, DTYPE)
    tune_is_trying = True
    monkeypatch.setattr(Pass, "launched", launched)
    trial = bench.attempt(FORWARD, Config(BLOCKS, 4, 1), 0.0)
    assert trial.ms is None
    assert trial.note.startswith("wrong: grad norm_weight differs by")


def test_a_kernel_that_leaves_out_a_part_is_wrong_though_the_memory_is_that_of_a_right_one():
    """What is written by nobody is not a number, and not what was there before."""
    bench = tune.Bench(CASE, HERE, DTYPE)
    assert bench.attempt(FORWARD, Config(BLOCKS, 4, 1), 0.0).ms
    _, launched = bench.whole.launched()
    bench._spoil(launched)
    kept = (*bench.whole.inputs.values(), bench.whole.grad, *bench.right.values())
    assert all(t.isfinite().all() for t in kept)
    theirs = {t.data_ptr() for t in kept}
    written = [t for one in launched for t in one.tensors if t is not None]
    written = [t for t in written if t.data_ptr() not in theirs]
    assert len(written) > 2
    assert not any(t.isfinite().any() for t in written)


def test_running_out_of_shared_memory_is_a_sentence_with_bytes(monkeypatch):
    launch_it = Launcher.__call__

    def call(self, *tensors):
        if self.options["num_stages"] == 5:
            raise OutOfResources(294912, 232448, "shared memory")
        return launch_it(self, *tensors)

    monkeypatch.setattr(Launcher, "__call__", call)
    trial = tried(Config(BLOCKS, 4, 5))
    assert trial.ms is None
    assert trial.note == (
        "A program asks for 294,912 bytes of shared memory, and 232,448 are available: "
        "take smaller blocks or fewer stages."
    )


def test_what_triton_does_not_take_is_a_note():
    trial = tried(Config({**BLOCKS, "BLOCK_M": 24}, 4, 1))
    assert trial.ms is None
    assert "power of 2" in trial.note


def test_a_kernel_that_the_case_does_not_launch_is_refused():
    of = case("evo_attention", "B1 S1 N20 H1 D16")
    with pytest.raises(ValueError, match=r"does not launch 'evo_attention.grad_bias'; it launches"):
        tune.try_config(of, launch.GRAD_BIAS, Config(BLOCKS, 4, 1), HERE, DTYPE)
