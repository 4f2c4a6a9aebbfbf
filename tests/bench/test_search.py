"""Search for block sizes, and the command ``megafold tune``.

Without a GPU, stand-ins for the kernels take the time that their configuration says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from megafold import cli
from megafold.bench import cases, measure, search, tune, tuning_records
from megafold.bench import records as records_module
from megafold.bench.launches import Tunable, tunables
from megafold.ops.evo_attention import launch
from megafold.ops.precision import META, bits_of
from megafold.ops.recording import launches
from megafold.ops.tuning import Config, Entry, read_table

CASE = cases.case("evo_attention", "B1 S4 N32 H2 D32")
CPU = torch.device("cpu")
DTYPE = torch.float16
SLOW, MIDDLE, FAST = (Config({"BLOCK_Q": size}, 4, 1) for size in (1, 2, 3))
SECONDS = {1: 12e-3, 2: 8e-3, 3: 1e-3}  # of a launch, by BLOCK_Q; 4e-3 for what a table says
SIZES = {"D": 32, "N": 32, "K": 32, "R": 4}
FORWARD, GRAD_Q = (Tunable(name, 16, (SIZES,)) for name in (launch.FORWARD, launch.GRAD_Q))


class StandIn:
    """A case whose kernels take as long as their configuration says."""

    around: ClassVar[dict[int, float]] = {}  # seconds of the pass beside its kernel, by BLOCK_Q

    def __init__(self, *_):
        pass

    def compare(self, kernel, configs, seconds):
        return [1e3 * SECONDS.get(c.blocks["BLOCK_Q"], 4e-3) for c in configs]

    def compare_passes(self, kernel, configs, seconds):
        alone = self.compare(kernel, configs, seconds)
        around = [1e3 * self.around.get(c.blocks["BLOCK_Q"], 0) for c in configs]
        return [one + other for one, other in zip(alone, around, strict=True)]


@pytest.fixture
def trials(monkeypatch):
    """What the candidates gave; to be filled by the test."""
    tried: list[tune.Trial] = []
    found = {of.kernel: of for of in (FORWARD, GRAD_Q)}
    monkeypatch.setattr(search, "tunables", lambda *_: found)
    monkeypatch.setattr(tune, "Bench", StandIn)
    monkeypatch.setattr(tune, "compile_candidates", lambda *_: None)
    monkeypatch.setattr(tune, "try_candidates", lambda *_, kernels: iter(tried))
    return tried


def searched():
    return search.search(CASE, CPU, DTYPE, workers=1, seconds=0.05)


def test_fastest_candidate_replaces_the_configuration_in_force(trials):
    trials += [
        tune.Trial(launch.FORWARD, SLOW, 9.0),
        tune.Trial(launch.FORWARD, FAST, 1.0),
        tune.Trial(launch.FORWARD, MIDDLE, None, "32 bytes of registers spilt"),
        tune.Trial(launch.GRAD_Q, FAST, 1.0),
    ]
    forward, _ = searched()
    assert forward.kernel == launch.FORWARD
    assert forward.config == FAST
    assert forward.before == FORWARD.in_force(CPU)
    assert forward.gain == pytest.approx(4)  # 4 ms before, 1 ms after
    assert (forward.ran, len(forward.trials)) == (2, 3)


def test_fastest_when_timed_again_wins_whatever_its_first_time(trials):
    trials += [tune.Trial(launch.FORWARD, SLOW, 0.1), tune.Trial(launch.FORWARD, FAST, 0.2)]
    assert searched()[0].config == FAST


def test_candidate_that_loses_when_timed_again_replaces_nothing(trials):
    trials += [
        tune.Trial(launch.FORWARD, SLOW, 0.001),  # a lucky first timing
        tune.Trial(launch.GRAD_Q, MIDDLE, None, "out of shared memory"),
    ]
    forward, grad_q = searched()
    for best in (forward, grad_q):
        assert best.config == best.before.config
        assert best.gain == 1
    assert (forward.ran, grad_q.ran) == (1, 0)


def test_candidate_with_which_the_pass_is_slower_replaces_nothing(trials, monkeypatch):
    """Its programs leave more to add up, say."""
    trials += [tune.Trial(launch.FORWARD, FAST, 1.0)]
    monkeypatch.setattr(StandIn, "around", {3: 5e-3})
    forward, _ = searched()
    assert forward.config == forward.before.config


def test_every_candidate_is_of_a_kernel_that_the_case_launches(monkeypatch, trials):
    asked = []
    monkeypatch.setattr(tune, "compile_candidates", lambda _, kernels, *rest: asked.extend(kernels))
    searched()
    assert asked == [launch.FORWARD, launch.GRAD_Q]


def test_entries_hold_all_of_a_configuration_and_the_sizes_of_the_case(trials):
    limited = replace(FAST, max_registers=128)
    trials += [tune.Trial(launch.FORWARD, limited, 1.0)]
    best, _ = searched()
    assert best.entry == Entry(launch.FORWARD, 16, SIZES, {"BLOCK_Q": 3}, 4, 1, 128)


def test_a_kernel_and_a_pass_are_timed_with_each_configuration(monkeypatch):
    """By the number of programs, not by how long they take: that is no matter of a test."""
    kernel = "layer_norm_linear.forward"

    def programs(calls, device, *, seconds):
        found = []
        for call in calls:
            with launches(run=True) as launched:
                call()
            of_kernel = sum(one.launcher.grid[0] for one in launched if one.kernel == kernel)
            found.append(measure.Timing(of_kernel, of_kernel, of_kernel, 1))
        return found

    monkeypatch.setattr(measure, "time_in_turns", programs)
    bench = tune.Bench(cases.case("layer_norm_linear", "M64 C16 O64"), CPU, DTYPE)
    configs = [Config({"BLOCK_M": size, "BLOCK_O": 64}, 4, 1) for size in (16, 64)]
    for compare in (bench.compare, bench.compare_passes):
        small, large = compare(kernel, configs, 0.0)
        assert small > large == 1


ENTRY = Entry(launch.FORWARD, 16, SIZES, {"BLOCK_Q": 16}, 4, 1)


def test_table_keeps_what_is_not_replaced(tmp_path):
    path = tmp_path / "new" / "cpu.json"
    other = replace(ENTRY, sizes={**ENTRY.sizes, "N": 64})
    search.add_to_table(path, CPU, [ENTRY, other])
    better = replace(ENTRY, num_stages=3)
    search.add_to_table(path, CPU, [better])
    devices, entries = read_table(path)
    assert devices == ["cpu"]
    assert sorted(entries, key=lambda e: e.sizes["N"]) == [better, other]


def test_table_of_a_device_is_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "FOLDER", tmp_path)
    own = tmp_path / "cpu.json"
    assert search.table_of(CPU) == own
    tune.write_table(own, ["cpu"], [ENTRY])
    assert search.table_of(CPU) == own
    tune.write_table(tmp_path / "family.json", ["gpu", "cpu"], [ENTRY])
    with pytest.raises(ValueError, match=r"family\.json holds .* cpu and of other devices"):
        search.table_of(CPU)


def test_place_for_the_table_is_checked_before_the_search(tmp_path, monkeypatch):
    search.check_table(tmp_path / "not" / "there" / "yet.json", CPU)
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match=r"x\.json cannot be written: no new file .*/file;"):
        search.check_table(tmp_path / "file" / "x.json", CPU)
    foreign = tmp_path / "foreign.json"
    tune.write_table(foreign, ["nvidia-a100"], [ENTRY])
    with pytest.raises(ValueError, match=r"is the table of nvidia-a100, not of cpu"):
        search.check_table(foreign, CPU)
    foreign.write_text("nonsense")
    with pytest.raises(ValueError, match="no table of block sizes"):
        search.check_table(foreign, CPU)
    monkeypatch.setattr(search.os, "access", lambda folder, mode: False)
    with pytest.raises(PermissionError, match="write another table with --table"):
        search.check_table(tmp_path / "new.json", CPU)


def test_command_without_a_gpu_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ([], ["--device", "cuda"], ["--device", "cpu"]):
        assert cli.main(["tune", *device]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("megafold tune: needs a GPU, because")
        assert captured.err.count("\n") == 1
        assert not captured.out


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, as far as the command can tell; returns the shapes searched, which fill up."""
    here = replace(records_module.environment("cpu"), device="a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(records_module, "device_description", lambda device: "a GPU")
    monkeypatch.setattr(records_module, "device_name", lambda device: "a-gpu")
    monkeypatch.setattr(tuning_records, "environment", lambda device: here)
    monkeypatch.setattr(search, "device_slug", lambda device: "a-gpu")
    before = search.Found(SLOW, "safe default")
    trials = (tune.Trial(launch.FORWARD, FAST, 1.0), tune.Trial(launch.FORWARD, SLOW, None, "no"))
    shapes = []

    def found(of, device, dtype, *, workers):
        shapes.append((of.op, of.shape, str(device), str(dtype), workers))
        sizes = {**SIZES, "N": len(shapes)}
        kernel = Tunable(launch.FORWARD, bits_of(dtype, META), (sizes,))
        return [search.Best(kernel, before, 2.0, FAST, 1.0, trials)]

    monkeypatch.setattr(search, "search", found)
    return shapes


ATTENTION = ["tune", "evo_attention", "--shape"]


def test_command_prints_the_gain_and_writes_the_table(gpu, tmp_path, capsys):
    path = tmp_path / "a-gpu.json"
    shapes = ["B1 S4 N32 H2 D32", "B1 S1 N64 H2 D24"]
    assert cli.main([*ATTENTION, *shapes, "--table", str(path), "--workers", "3"]) == 0
    assert gpu == [("evo_attention", shape, "cuda", "torch.bfloat16", 3) for shape in shapes]
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if launch.FORWARD in line)
    assert row.split() == [launch.FORWARD, "1/2", "2.0000", "1.0000", "2.00x", *str(FAST).split()]
    assert f"written to {path}" in printed
    devices, entries = read_table(path)
    assert devices == ["a-gpu"]
    assert sorted(entry.sizes["N"] for entry in entries) == [1, 2]


def test_command_tunes_fp32_whose_products_are_in_tf32(
    gpu, tmp_path, monkeypatch, capsys, fp32_setting
):
    monkeypatch.setattr(torch.version, "hip", None)
    shape, path = "B1 S4 N32 H2 D32", tmp_path / "a.json"
    kept = ["--table", str(path), "--out", str(tmp_path), "--workers", "3"]
    assert cli.main([*ATTENTION, shape, "--dtype", "tf32", *kept]) == 0
    assert gpu == [("evo_attention", shape, "cuda", "torch.float32", 3)]
    assert "a GPU, tf32, revision" in capsys.readouterr().out
    assert [entry.bits for entry in read_table(path)[1]] == [19]
    assert {r.dtype for r in tuning_records.read(tmp_path)} == {"tf32"}


def test_command_appends_every_trial_to_the_records(gpu, tmp_path, capsys):
    shape, table = "M64 C128 H512", ["--table", str(tmp_path / "a.json")]
    command = ["tune", "transition", "--shape", shape, *table, "--out", str(tmp_path)]
    assert cli.main(command) == cli.main(command) == 0
    assert f"trials appended below {tmp_path / 'a-gpu'}" in capsys.readouterr().out
    assert (tmp_path / "a-gpu" / "transition_tuning.csv").is_file()
    found = tuning_records.read(tmp_path, "a-gpu", "transition")
    assert [(r.op, r.shape, r.kernel, r.ms, r.note) for r in found] == 2 * [
        ("transition", shape, launch.FORWARD, 1.0, ""),
        ("transition", shape, launch.FORWARD, None, "no"),
    ]


def test_command_tunes_the_cases_of_training_into_the_packages_table(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "FOLDER", tmp_path)
    assert cli.main(["tune", "--dtype", "float32"]) == 0
    found = {op: [shape for one, shape, *_ in gpu if one == op] for op, *_ in gpu}
    assert set(found) == {*cases.SHAPES} - {"pair_block", "transition"}  # whose fp32 has no table
    for op, shapes in found.items():
        assert shapes == list(cases.SHAPES[op]["full"])
    assert {dtype for *_, dtype, _ in gpu} == {"torch.float32"}
    assert [path.name for path in tmp_path.iterdir()] == ["a-gpu.json"]


def test_command_passes_over_shapes_of_training_without_a_kernel_with_a_table(gpu, tmp_path):
    table = ["--table", str(tmp_path / "a.json")]
    assert cli.main(["tune", "transition", *table]) == 0
    shapes = cases.SHAPES["transition"]["full"]
    assert [shape for _, shape, *_ in gpu] == [s for s in shapes if " C128 " in s]


def test_command_fails_where_no_candidate_of_a_kernel_ran(gpu, tmp_path, monkeypatch, capsys):
    before = search.Found(SLOW, "safe default")
    trials = (tune.Trial(launch.FORWARD, FAST, None, "96 bytes of registers spilt"),)
    none = search.Best(FORWARD, before, 2.0, SLOW, 2.0, trials)
    monkeypatch.setattr(search, "search", lambda *_, workers: [none])
    assert cli.main([*ATTENTION, "B1 S4 N32 H2 D32", "--table", str(tmp_path / "a.json")]) == 1
    captured = capsys.readouterr()
    assert "(as before)" in captured.out
    assert "none ran: 96 bytes of registers spilt" in captured.out
    assert "no candidate ran for 1 kernels" in captured.err


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evo_attention", "--shape", "B1 N32"], "missing ['S', 'H', 'D']"),
        (["--shape", "M1 C1 O1"], "--shape needs exactly one operator"),
        (["pair_block"], "unknown operator 'pair_block'; choose from ['evo_attention', "),
        (["transition", "--shape", "M9 C384 H9"], "launches no kernel with tables"),
        (["transition", "--dtype", "float32"], "launches no kernel with tables"),
        (["--workers", "0"], "--workers must be 1 or more, not 0"),
        (["--table", "FILE/a-gpu.json"], "cannot be written"),
    ],
)
def test_command_refuses_bad_arguments_before_it_searches(
    arguments, message, tmp_path, capsys, gpu
):
    (tmp_path / "file").write_text("")
    arguments = [a.replace("FILE", str(tmp_path / "file")) for a in arguments]
    assert cli.main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert gpu == []


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "shape"), [("evo_attention", CASE.shape), ("triangle_multiplication", "B1 N32 C64")]
)
def test_search_on_a_gpu_finds_what_runs_and_is_right(monkeypatch, tmp_path, op, shape):
    device, of = torch.device("cuda"), cases.case(op, shape)
    monkeypatch.setattr(tune, "compile_candidates", lambda *_: None)  # compiled as they are tried
    every = tune.distinct_candidates
    monkeypatch.setattr(tune, "distinct_candidates", lambda *arguments: every(*arguments)[::15])
    found = search.search(of, device, torch.bfloat16, workers=1)
    assert [best.kernel for best in found] == list(tunables(of, torch.bfloat16))
    for best in found:
        assert best.ran
        assert 0 < best.ms <= best.before_ms
    path = tmp_path / "table.json"
    search.add_to_table(path, device, [best.entry for best in found])
    assert [e.kernel for e in read_table(path)[1]] == sorted(best.kernel for best in found)
