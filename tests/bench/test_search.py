"""Search for block sizes, and the command ``megafold tune``.

Without a GPU, stand-ins for the kernels take the time that their configuration says.
"""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from megafold import cli
from megafold.bench import cases, search, tune
from megafold.bench import records as records_module
from megafold.ops.evo_attention import launch
from megafold.ops.tuning import Config, Entry, lookup, read_table, use_config

CASE = cases.case("evo_attention", "B1 S4 N32 H2 D32")
CPU = torch.device("cpu")
DTYPE = torch.float16
SLOW, MIDDLE, FAST = (Config({"BLOCK_Q": size}, 4, 1) for size in (1, 2, 3))
SECONDS = {1: 12e-3, 2: 8e-3, 3: 1e-3}  # of a call, by BLOCK_Q; 4e-3 for what a table says


def stand_in(kernel):
    """A kernel run that takes as long as the configuration in force says."""

    def call():
        config = lookup(kernel, CPU, DTYPE, (("D", 32),)).config
        time.sleep(SECONDS.get(config.blocks["BLOCK_Q"], 4e-3))

    return tune.KernelRun(kernel, call, ())


@pytest.fixture
def trials(monkeypatch):
    """What the candidates gave; to be filled by the test."""
    tried: list[tune.Trial] = []
    kernels = (launch.FORWARD, launch.GRAD_Q)
    monkeypatch.setattr(tune, "runs", lambda *_: [stand_in(kernel) for kernel in kernels])
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
    assert forward.before == search.in_force(CASE, launch.FORWARD, CPU, DTYPE)
    assert 1.5 < forward.gain == forward.before_ms / forward.ms  # 4 ms before, 1 ms after
    assert (forward.ran, len(forward.trials)) == (2, 3)


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


def test_every_candidate_is_of_a_kernel_that_the_case_launches(monkeypatch, trials):
    asked = []
    monkeypatch.setattr(tune, "compile_candidates", lambda _, kernels, *rest: asked.extend(kernels))
    searched()
    assert asked == [launch.FORWARD, launch.GRAD_Q]


def test_configuration_in_force_is_that_of_the_call():
    with use_config(launch.FORWARD, FAST):
        assert search.in_force(CASE, launch.FORWARD, CPU, DTYPE).config == FAST
    sizes = (("D", 32), ("N", 32), ("K", 32), ("R", 4))
    found = search.in_force(CASE, launch.FORWARD, CPU, DTYPE)
    assert found == lookup(launch.FORWARD, CPU, DTYPE, sizes)


def test_entries_hold_all_of_a_configuration_and_the_sizes_of_the_case(trials):
    limited = replace(FAST, max_registers=128)
    trials += [tune.Trial(launch.FORWARD, limited, 1.0)]
    entry, _ = search.entries(searched(), CASE, DTYPE)
    sizes = {"D": 32, "N": 32, "K": 32, "R": 4}
    assert entry == Entry(launch.FORWARD, 16, sizes, {"BLOCK_Q": 3}, 4, 1, 128)


ENTRY = Entry(launch.FORWARD, 16, {"D": 32, "N": 32, "K": 32, "R": 4}, {"BLOCK_Q": 16}, 4, 1)


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
    with pytest.raises(PermissionError, match="write another table with --out"):
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(records_module, "device_description", lambda device: "a GPU")
    monkeypatch.setattr(search, "device_slug", lambda device: "a-gpu")
    before = search.Found(SLOW, "safe default")
    trials = (tune.Trial(launch.FORWARD, FAST, 1.0), tune.Trial(launch.FORWARD, SLOW, None, "no"))
    shapes = []

    def found(of, device, dtype, *, workers):
        shapes.append((of.shape, str(device), str(dtype), workers))
        return [search.Best(launch.FORWARD, before, 2.0, FAST, 1.0, trials)]

    monkeypatch.setattr(search, "search", found)
    return shapes


def test_command_prints_the_gain_and_writes_the_table(gpu, tmp_path, capsys):
    path = tmp_path / "a-gpu.json"
    shapes = ["B1 S4 N32 H2 D32", "B1 S1 N64 H2 D24"]
    assert cli.main(["tune", "--shape", *shapes, "--out", str(path), "--workers", "3"]) == 0
    assert gpu == [(shape, "cuda", "torch.bfloat16", 3) for shape in shapes]
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if launch.FORWARD in line)
    assert row.split() == [launch.FORWARD, "1/2", "2.0000", "1.0000", "2.00x", *str(FAST).split()]
    assert f"written to {path}" in printed
    devices, entries = read_table(path)
    assert devices == ["a-gpu"]
    assert sorted(entry.sizes["N"] for entry in entries) == [32, 64]


def test_command_tunes_the_cases_of_training_into_the_packages_table(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "FOLDER", tmp_path)
    assert cli.main(["tune", "--dtype", "float32"]) == 0
    assert [shape for shape, *_ in gpu] == list(cases.SHAPES["evo_attention"]["full"])
    assert {dtype for *_, dtype, _ in gpu} == {"torch.float32"}
    assert [path.name for path in tmp_path.iterdir()] == ["a-gpu.json"]


def test_command_fails_where_no_candidate_of_a_kernel_ran(gpu, tmp_path, monkeypatch, capsys):
    before = search.Found(SLOW, "safe default")
    trials = (tune.Trial(launch.FORWARD, FAST, None, "96 bytes of registers spilt"),)
    none = search.Best(launch.FORWARD, before, 2.0, SLOW, 2.0, trials)
    monkeypatch.setattr(search, "search", lambda *_, workers: [none])
    shape = ["--shape", "B1 S4 N32 H2 D32", "--out", str(tmp_path / "a.json")]
    assert cli.main(["tune", *shape]) == 1
    captured = capsys.readouterr()
    assert "(as before)" in captured.out
    assert "none ran: 96 bytes of registers spilt" in captured.out
    assert "no candidate ran for 1 kernels" in captured.err


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "B1 N32"], "missing ['S', 'H', 'D']"),
        (["--workers", "0"], "--workers must be 1 or more, not 0"),
        (["--out", "FILE/a-gpu.json"], "cannot be written"),
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
def test_search_on_a_gpu_finds_what_runs_and_is_right(monkeypatch, tmp_path):
    device = torch.device("cuda")
    monkeypatch.setattr(tune, "compile_candidates", lambda *_: None)  # compiled as they are tried
    few = tune.candidates
    monkeypatch.setattr(tune, "candidates", lambda *arguments: few(*arguments)[::40])
    found = search.search(CASE, device, torch.bfloat16, workers=1)
    assert [best.kernel for best in found] == list(launch.KERNELS)
    for best in found:
        assert best.ran
        assert 0 < best.ms <= best.before_ms
    path = tmp_path / "table.json"
    search.add_to_table(path, device, search.entries(found, CASE, torch.bfloat16))
    assert [e.kernel for e in read_table(path)[1]] == sorted(launch.KERNELS)
