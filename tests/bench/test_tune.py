"""The search for block sizes, as far as it needs no GPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from megafold.bench import cases, tune
from megafold.ops import Config
from megafold.ops.evo_attention import launch
from megafold.ops.tuning import Entry, config, lookup, read_table, tables
from megafold.ops.tuning.table import DEFAULT
from tests.numerics import DEVICE

CASE = cases.case("evo_attention", "B1 S3 N20 H2 D24")
HALF = torch.bfloat16


def blocks_of(kernel):
    return next(set(e.blocks) for e in tables()[DEFAULT] if e.kernel == kernel)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("kernel", launch.KERNELS)
def test_candidates_are_many_different_and_have_the_blocks_of_the_kernel(kernel, bits):
    found = tune.candidates(kernel, bits, rows_per_bias=384)
    assert len(found) > 10
    assert len({str(one) for one in found}) == len(found)
    assert all(set(one.blocks) == blocks_of(kernel) for one in found)
    low, high = tune.TILE_REGISTERS
    for one in found:
        tile = one.blocks["BLOCK_Q"] * one.blocks["BLOCK_K"]
        assert low <= tile // (32 * one.num_warps) <= high


def test_no_more_rows_at_a_time_than_share_a_bias():
    def rows(rows_per_bias):
        found = tune.candidates(launch.FORWARD, 16, rows_per_bias)
        return {one.blocks["ROWS"] for one in found}

    assert rows(1) == {1}
    assert rows(3) == {1, 2}
    assert max(rows(384)) > 2


def test_a_case_runs_the_kernels_it_needs_and_no_other():
    def kernels(shape):
        case = cases.case("evo_attention", shape)
        return [run.kernel for run in tune.runs(case, torch.device(DEVICE), torch.float32)]

    shared = kernels("B1 S2 N5 H1 D8")
    alone = kernels("B1 S1 N5 H1 D8")
    assert shared == list(launch.KERNELS)
    assert alone == [k for k in launch.KERNELS if k != launch.GRAD_BIAS]


def test_operators_without_tables_are_refused_by_name():
    case = cases.case("transition", "M3 C8 H16")
    with pytest.raises(ValueError, match="transition has no kernels with tables"):
        tune.runs(case, torch.device(DEVICE), torch.float32)


def test_each_run_fills_what_it_says_it_writes():
    for run in tune.runs(CASE, torch.device(DEVICE), torch.float32):
        run.call()
        right = [t.clone() for t in run.outputs]
        for output in run.outputs:
            output.fill_(float("nan"))
        run.call()
        for output, expected in zip(run.outputs, right, strict=True):
            assert torch.equal(output, expected), run.kernel


@pytest.mark.gpu
def test_the_best_of_some_candidates_is_found(monkeypatch):
    some = {k: tune.candidates(k, 16, 3)[:4] for k in launch.KERNELS}
    monkeypatch.setattr(tune, "candidates", lambda kernel, bits, rows: some[kernel])
    trials = list(tune.try_candidates(CASE, torch.device(DEVICE), HALF))
    assert [t.kernel for t in trials] == [k for k in launch.KERNELS for _ in some[k]]
    for trial in trials:
        assert (trial.ms is None) == bool(trial.note)
        assert not trial.note.startswith("wrong")
    assert {t.kernel for t in trials if t.ms} == set(launch.KERNELS)


# -- Entries and tables.

CONFIG = Config({"BLOCK_Q": 64, "BLOCK_K": 32}, 8, 3)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("B1 S384 N300 H4 D24", {"D": 32, "N": 300, "K": 300, "R": 384}),
        ("B16 S1 N32 K128 H4 D32", {"D": 32, "N": 32, "K": 128, "R": 1}),
        ("B2 S3 N10 H4 D8", {"D": 16, "N": 10, "K": 10, "R": 3}),
        ("B2 S3 N10 H4 D128 shared", {"D": 128, "N": 10, "K": 10, "R": 6}),
    ],
)
def test_an_entry_has_the_sizes_that_its_case_is_looked_up_by(shape, sizes):
    case = cases.case("evo_attention", shape)
    entry = tune.entry(tune.Trial(launch.GRAD_BIAS, CONFIG, 0.1), case, HALF)
    assert entry == Entry(launch.GRAD_BIAS, 16, sizes, dict(CONFIG.blocks), 8, 3)
    arguments = {n: torch.empty(a.shape, device="meta") for n, a in case.arguments.items()}
    problem = launch.Problem.of(*(arguments[name] for name in ("q", "k", "pair_bias")))
    assert sizes["D"] == launch.padded_width(problem.width)
    assert [sizes[n] for n in "NKR"] == [problem.queries, problem.keys, problem.rows_per_bias]


def entry_of(n, kernel=launch.FORWARD, bits=16, warps=4):
    return Entry(kernel, bits, {"D": 32, "N": n}, {"BLOCK_Q": 64}, warps, 2)


def test_new_entries_replace_those_of_the_same_kernel_bits_and_sizes():
    old = [entry_of(1), entry_of(2), entry_of(2, kernel=launch.GRAD_Q), entry_of(2, bits=32)]
    turned = Entry(launch.FORWARD, 16, {"N": 2, "D": 32}, {"BLOCK_Q": 16}, 8, 1)
    found = tune.merged(old, [turned, entry_of(3)])
    assert len(found) == 5
    for kept in (old[0], old[2], old[3], turned, entry_of(3)):
        assert kept in found
    assert old[1] not in found
    assert tune.merged(old, []) == old


def test_a_table_that_is_written_is_read_again(tmp_path):
    path = tmp_path / "new.json"
    entries = [entry_of(20), entry_of(3, launch.GRAD_Q, 32, 8), entry_of(3), entry_of(3, bits=32)]
    entries.append(replace(entry_of(4), max_registers=128))
    tune.write_table(path, ["nvidia-h100", "nvidia-h200"], entries)
    devices, found = read_table(path)
    assert devices == ["nvidia-h100", "nvidia-h200"]
    assert sorted(map(str, found)) == sorted(map(str, entries))


def test_a_table_has_one_line_for_each_entry_in_one_order(tmp_path):
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    entries = [entry_of(2), entry_of(1), entry_of(1, launch.GRAD_Q), entry_of(1, bits=32)]
    tune.write_table(one, ["cpu"], entries)
    tune.write_table(other, ["cpu"], reversed(entries))
    text = one.read_text()
    assert text == other.read_text()
    assert sum('"kernel"' in line for line in text.splitlines()) == len(entries)
    assert all(json.loads(line.strip(" ,")) for line in text.splitlines() if '"kernel"' in line)
    tune.write_table(one, ["cpu"], [replace(entries[0], num_warps=8)])  # in place of the other
    assert [e.num_warps for e in read_table(one)[1]] == [8]


def test_an_empty_table_is_a_table(tmp_path):
    tune.write_table(tmp_path / "empty.json", ["cpu"], [])
    assert read_table(tmp_path / "empty.json") == (["cpu"], [])


def test_a_shipped_table_stays_as_it_is_when_written_again(tmp_path):
    tune.write_table(tmp_path / "again.json", [DEFAULT], tables()[DEFAULT])
    found = read_table(tmp_path / "again.json")[1]
    assert sorted(map(str, found)) == sorted(map(str, tables()[DEFAULT]))


@pytest.fixture
def nothing_looked_up_before():
    config._from_tables.cache_clear()
    yield
    config._from_tables.cache_clear()


def test_lookup_takes_what_a_tuned_table_says(tmp_path, monkeypatch, nothing_looked_up_before):
    tuned = tune.entry(tune.Trial(launch.FORWARD, CONFIG, 0.1), CASE, HALF)
    tune.write_table(tmp_path / "cpu.json", ["cpu"], [tuned])
    devices, entries = read_table(tmp_path / "cpu.json")
    monkeypatch.setattr(config, "tables", lambda: dict.fromkeys(devices, entries))
    sizes = (("D", 32), ("N", 20), ("K", 20), ("R", 3))
    assert lookup(launch.FORWARD, torch.device("cpu"), HALF, sizes).config == CONFIG
