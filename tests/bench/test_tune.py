"""The search for block sizes, as far as it needs no GPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from megafold.bench import cases, tune
from megafold.bench.launches import tunable
from megafold.ops import Config
from megafold.ops.evo_attention import launch
from megafold.ops.tuning import Entry, config, lookup, read_table, tables
from megafold.ops.tuning.table import DEFAULT
from tests.numerics import DEVICE

CASE = cases.case("evo_attention", "B1 S3 N20 H2 D24")
HALF = torch.bfloat16


@pytest.mark.gpu
def test_the_best_of_some_candidates_is_found(monkeypatch):
    some = {k: tune.distinct_candidates(CASE, k, HALF)[:4] for k in launch.KERNELS}
    monkeypatch.setattr(tune, "distinct_candidates", lambda of, kernel, dtype: some[kernel])
    trials = list(tune.try_candidates(CASE, torch.device(DEVICE), HALF, kernels=launch.KERNELS))
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
    of = tunable(cases.case("evo_attention", shape), launch.GRAD_Q, HALF)
    assert tune.entry(of, CONFIG) == Entry(launch.GRAD_Q, 16, sizes, dict(CONFIG.blocks), 8, 3)


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
    tuned = tune.entry(tunable(CASE, launch.FORWARD, HALF), CONFIG)
    tune.write_table(tmp_path / "cpu.json", ["cpu"], [tuned])
    devices, entries = read_table(tmp_path / "cpu.json")
    monkeypatch.setattr(config, "tables", lambda: dict.fromkeys(devices, entries))
    sizes = (("D", 32), ("N", 20), ("K", 20), ("R", 3))
    assert lookup(launch.FORWARD, torch.device("cpu"), 16, sizes).config == CONFIG
