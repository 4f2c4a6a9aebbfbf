"""The kernel tuner, driven without a browser."""

from __future__ import annotations

from dataclasses import replace

import plotly.graph_objects as go
import pytest
import torch

from megafold.bench import records, tune, tuning_records
from megafold.bench.cases import case, registered
from megafold.bench.compile import TARGETS, Compiled
from megafold.bench.launches import OPERATORS, tunables
from megafold.bench.tuning_records import TuningRecord
from megafold.ops.evo_attention.launch import FORWARD, KERNELS
from megafold.ops.tuning import Config
from megafold.ops.tuning.candidates import block_names
from megafold.viz import tuner as module
from megafold.viz.tuner import KernelTuner

CASE = case("evo_attention", "B1 S384 N384 H4 D32")
SPILLS_AT = 128  # the pretended compiler spills registers from this BLOCK_Q on
H200 = "NVIDIA H200"


def config(block_q: int = 64, kernel: str = FORWARD, **options: int) -> Config:
    blocks = {name: 64 if name.startswith("BLOCK") else 1 for name in block_names(kernel)}
    return Config({**blocks, "BLOCK_Q": block_q}, **{"num_warps": 4, "num_stages": 2, **options})


def record(of: Config, ms: float | None = 0.25, kernel: str = FORWARD) -> TuningRecord:
    return TuningRecord(
        CASE.op, kernel, CASE.shape, "bfloat16", tuning_records.blocks_text(of.blocks),
        of.num_warps, of.num_stages, None, ms, "" if ms else "spilt", H200, "abc",
        "2026-11-25T08:00:00+00:00",
    )  # fmt: skip


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Config, str]]:
    """A compiler that is quick; what it was asked for."""
    asked = []

    def compile_config(of, kernel, config, dtype, target):
        asked.append((kernel, config, target))
        if config.num_stages == 5:
            raise RuntimeError("compiling ahead of time failed:\nTraceback\nno such thing")
        spill = 40 if config.blocks.get("BLOCK_Q", 0) >= SPILLS_AT else 0
        shared = config.num_stages * 30_000
        gpu = TARGETS[target][3]
        return Compiled(kernel, target, gpu, 255 if spill else 160, spill, shared, 128)

    monkeypatch.setattr(module, "compile_config", compile_config)
    return asked


@pytest.fixture
def no_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_records, "stored", lambda case, dtype: [])


@pytest.fixture
def tuner(compiler: list, no_records: None) -> KernelTuner:
    """Without a GPU, and without records."""
    return KernelTuner(CASE, device="cpu")


def traces(figure: go.Figure) -> dict[str, go.Scatter]:
    return {trace.name: trace for trace in figure.data}


def test_it_begins_with_the_configuration_in_force(tuner: KernelTuner) -> None:
    assert tuner.kernel.value == FORWARD
    assert tuple(tuner.blocks) == block_names(FORWARD)
    assert tuner.config == tuner._in_force().config
    assert tuner.trials == []


def test_block_sizes_are_powers_of_two(tuner: KernelTuner) -> None:
    for slider in (*tuner.blocks.values(), tuner.warps):
        assert all(size & (size - 1) == 0 for size in slider.options)
        assert slider.continuous_update is False


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_the_sliders_of_its_blocks(tuner: KernelTuner, kernel: str) -> None:
    tuner.kernel.value = kernel
    assert tuple(tuner.blocks) == block_names(kernel)
    assert [s.description for s in tuner._block_box.children] == list(block_names(kernel))
    tuner.button.click()
    assert tuner.trials[-1].kernel == kernel


def test_the_button_tries_what_the_sliders_say(
    tuner: KernelTuner, compiler: list[tuple[str, Config, str]]
) -> None:
    tuner.blocks["BLOCK_Q"].value = 32
    tuner.warps.value, tuner.stages.value, tuner.registers.value = 8, 3, 128
    tuner.target.value = "gfx942"
    tuner.button.click()
    (trial,) = tuner.trials
    assert compiler == [(FORWARD, trial.config, "gfx942")]
    assert trial.config.blocks["BLOCK_Q"] == 32
    options = (trial.config.num_warps, trial.config.num_stages, trial.config.max_registers)
    assert options == (8, 3, 128)
    assert tuner.button.disabled is False
    assert tuner.status.value == ""


def test_run_sets_the_sliders_and_returns_the_trial(tuner: KernelTuner) -> None:
    wanted = config(32, num_warps=2, num_stages=1)
    trial = tuner.run(wanted)
    assert trial.config == tuner.config == wanted
    assert tuner.trials == [trial]
    assert not trial.failed
    assert (trial.compiled.registers, trial.occupancy.programs) == (160, 3)


def test_registers_spills_shared_memory_and_occupancy_are_shown(tuner: KernelTuner) -> None:
    tuner.run(config())
    for shown in ("160", "60,000", "3, bound by registers; 19% of threads", "sm_90"):
        assert shown in tuner.text()
    assert tuner.area.outputs


def test_a_configuration_that_spills_is_hollow_and_red(tuner: KernelTuner) -> None:
    tuner.run(config())
    assert tuner.run(config(SPILLS_AT)).note == "40 bytes of registers spilt on sm_90"
    drawn = traces(tuner.figure())
    assert list(drawn["compiled"].y) == [160]
    assert list(drawn["failed"].y) == [255]
    assert drawn["failed"].marker.symbol == "circle-open"
    assert drawn["failed"].marker.color == module.trials_figure.__globals__["FAILED"]
    assert drawn["compiled"].marker.symbol == "circle"
    assert "40 bytes of registers spilt" in tuner.text()


def test_too_much_shared_memory_is_a_sentence_with_bytes(tuner: KernelTuner) -> None:
    tuner.target.value = "gfx90a"
    trial = tuner.run(config(num_stages=3))
    assert trial.note.startswith("A program asks for 90,000 bytes of shared memory, and 65,536 are")
    assert trial.occupancy.programs == 0
    assert "failed" in traces(tuner.figure())


def test_what_does_not_compile_says_why_and_is_kept(tuner: KernelTuner) -> None:
    trial = tuner.run(config(num_stages=5))
    assert trial.note == "does not compile for sm_90: no such thing"
    assert (trial.compiled, trial.occupancy, tuner.figure()) == (None, None, None)
    assert "no such thing" in tuner.text()


def test_without_a_gpu_and_records_it_says_so(tuner: KernelTuner) -> None:
    assert "No GPU here, and no recorded measurements of evo_attention.forward" in tuner.text()
    assert tuner.figure() is None
    assert tuner.fastest() is None
    assert tuner.run(config()).ms is None
    assert "not recorded" not in tuner.text()


def test_recorded_measurements_are_replayed(
    compiler: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [record(config()), record(config(32), 0.5), record(config(SPILLS_AT), None)]
    monkeypatch.setattr(tuning_records, "stored", lambda case, dtype: kept)
    tuner = KernelTuner(CASE, device="cpu")
    assert tuner.records == kept
    assert "recorded measurements of NVIDIA H200 (2026-11-25)" in tuner.text()
    assert list(traces(tuner.figure())[f"recorded on {H200}"].y) == [0.25, 0.5]
    tuner.run(config())
    assert "0.25 on NVIDIA H200" in tuner.text()
    drawn = traces(tuner.figure())
    assert list(drawn["recorded, and tried here"].y) == [0.25]
    tuner.run(config(num_warps=8))
    assert "not recorded" in tuner.text()
    assert tuner.fastest() == config()
    (note,) = (a.text for a in tuner.figure().layout.annotations if "roofline" in a.text)
    assert note.startswith(f"roofline of {H200}: 0.032")


def test_trials_and_records_of_other_kernels_are_not_shown(
    compiler: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_records, "stored", lambda case, dtype: [record(config())])
    tuner = KernelTuner(CASE, device="cpu")
    tuner.run(config())
    tuner.kernel.value = KERNELS[1]
    assert "no recorded measurements" in tuner.text()
    assert tuner.figure() is None
    assert len(tuner.trials) == 1


def test_other_blocks_and_sizes_that_no_slider_has_are_refused(tuner: KernelTuner) -> None:
    before = tuner.config
    with pytest.raises(ValueError, match=r"evo_attention.forward has the blocks .* not"):
        tuner.run(Config({"BLOCK": 64}, 4, 2))
    with pytest.raises(ValueError, match=r"BLOCK_Q must be one of \(16, .*\), not 48"):
        tuner.run(config(48))
    with pytest.raises(ValueError, match=r"num_warps must be one of .* not 3"):
        tuner.run(config(num_warps=3))
    assert tuner.config == before
    assert tuner.trials == []


def test_a_case_without_a_kernel_to_tune_and_an_unknown_chip_are_refused() -> None:
    with pytest.raises(ValueError, match=r"transition launches no kernel with tables"):
        KernelTuner(case("transition", "M16 C384 H768"))
    with pytest.raises(ValueError, match=r"unknown target 'sm_70'; choose one of"):
        KernelTuner(CASE, target="sm_70")


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.usefixtures("no_records")
def test_every_operator_has_its_kernels(op: str, compiler: list) -> None:
    of = registered(op, "small")[0]
    tuner = KernelTuner(of, device="cpu")
    names = tuner.kernel.options
    assert names == tuple(tunables(of, torch.bfloat16))
    for kernel in names:
        tuner.kernel.value = kernel
        assert tuple(tuner.blocks) == block_names(kernel)
        assert all(len(slider.options) > 1 for slider in tuner.blocks.values())
        trial = tuner.run()
        assert compiler[-1] == (kernel, tuner.config, "sm_90")
        assert trial.config == tuner._in_force().config
        assert f"no recorded measurements of {kernel} on {of.shape}" in tuner.text()


@pytest.mark.usefixtures("compiler")
def test_sliders_offer_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [record(config(512))]
    monkeypatch.setattr(tuning_records, "stored", lambda case, dtype: kept)
    tuner = KernelTuner(CASE, device="cpu")
    assert 512 in tuner.blocks["BLOCK_Q"].options
    assert tuner.run(tuner.fastest()).config == config(512)


def test_an_error_that_is_no_compilers_is_not_swallowed(
    tuner: KernelTuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Compiled:
        raise KeyError("not what a compiler says")

    monkeypatch.setattr(module, "compile_config", broken)
    with pytest.raises(KeyError, match="not what a compiler says"):
        tuner.run()
    assert tuner.trials == []
    assert tuner.button.disabled is False


class TestOnAGpu:
    """What it does with what ``tune.try_config`` says; the GPU is pretended."""

    @pytest.fixture
    def tuner(self, tuner: KernelTuner, monkeypatch: pytest.MonkeyPatch) -> KernelTuner:
        def try_config(of, kernel, config, device, dtype):
            wrong = config.num_stages == 1
            note = "wrong: differs by 1.0e+00" if wrong else ""
            return tune.Trial(kernel, config, None if wrong else 0.125, note)

        here = replace(records.environment("cpu"), device=H200)
        monkeypatch.setattr(tune, "try_config", try_config)
        monkeypatch.setattr(tuning_records, "environment", lambda device: here)
        monkeypatch.setattr(records, "device_description", lambda device: H200)
        tuner.device = torch.device("cuda")
        return tuner

    def test_a_right_one_is_timed_and_recorded(self, tuner: KernelTuner) -> None:
        trial = tuner.run(config())
        assert (trial.ms, trial.failed) == (0.125, False)
        (kept,) = tuner.records
        assert (kept.config, kept.ms, kept.device) == (trial.config, 0.125, H200)
        assert list(traces(tuner.figure())[f"measured on {H200}"].y) == [0.125]
        assert f"Times are of {H200}" in tuner.text()

    def test_a_wrong_one_is_hollow_red_and_has_no_time(self, tuner: KernelTuner) -> None:
        trial = tuner.run(config(num_stages=1))
        assert (trial.ms, trial.note) == (None, "wrong: differs by 1.0e+00")
        assert traces(tuner.figure())["failed"].marker.symbol == "circle-open"
        assert tuner.records[0].note == trial.note


def test_the_compiler_itself_is_asked(no_records: None) -> None:
    trial = KernelTuner(CASE, device="cpu").run()
    assert not trial.failed
    assert 32 < trial.compiled.registers <= 255
    assert trial.occupancy.programs >= 1


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPERATORS)
def test_on_a_gpu_a_trial_is_right_and_has_a_time(op: str) -> None:
    tuner = KernelTuner(registered(op, "small")[0])
    kernels = tuner.kernel.options
    for kernel in kernels:
        tuner.kernel.value = kernel
        trial = tuner.run()
        assert trial.ms, trial.note
    assert [r.kernel for r in tuner.records[-len(kernels) :]] == list(kernels)


@pytest.mark.gpu
def test_on_a_gpu_running_out_of_shared_memory_is_a_sentence() -> None:
    tuner = KernelTuner(case("evo_attention", "B1 S64 N256 H4 D128"))
    trial = tuner.run(config(128, num_stages=5))
    assert "bytes of shared memory, and" in trial.note
    assert trial.ms is None
