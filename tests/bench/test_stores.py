"""The stores that are compared hold the same, and what is measured of them can be told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megafold.bench import rows
from megafold.bench.data_inputs import Input, deepen, prepare_input
from megafold.bench.data_pipeline import Plan, measure_steps, measure_stores
from megafold.bench.store_records import DESIGNS, StepRecord, StoreRecord
from megafold.bench.store_trials import kill_writers, same_features
from megafold.bench.stores import STORES, open_store
from megafold.data import DataError, Features, read_alignment, sample_alignments, sample_path

SMALL = Plan(
    crop=32, rows=64, repeats=2, slow_repeats=1, readers=2, seconds=0.1, kills=1, workers=1, steps=2
)  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Input:
    folder = tmp_path_factory.mktemp("inputs")
    return prepare_input(sample_path("102M"), sample_alignments("102M")["A"].parent, folder, 1000)


@pytest.fixture(scope="module")
def features(given) -> Features:
    return given.features()


@pytest.mark.parametrize("kind", list(STORES))
def test_a_store_gives_back_what_it_was_given(kind, features, tmp_path) -> None:
    store = open_store(kind, tmp_path)
    assert "x" not in store
    store.put("x", features)
    assert "x" in store
    assert same_features(store.load("x"), features)
    store.close()


@pytest.mark.parametrize("kind", list(STORES))
def test_all_stores_draw_the_same_crop(kind, features, tmp_path) -> None:
    drawn = []
    for one in ("safetensors", kind):
        store = open_store(one, tmp_path / one)
        store.put("x", features)
        drawn.append(store.draw("x", 40, 100, np.random.default_rng(3)))
        store.close()
    assert drawn[1].msa.shape == (100, 40)
    assert same_features(*drawn)


def test_a_store_that_is_not_known_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="no store 'hdf5'; there are safetensors, lmdb"):
        open_store("hdf5", tmp_path)


def test_a_kill_leaves_a_torn_pickle_and_no_torn_entry_of_ours(features, tmp_path) -> None:
    assert kill_writers("safetensors", tmp_path / "ours", features, kills=4) == (0, 0)
    torn, wrong = kill_writers("gzip pickle", tmp_path / "theirs", features, kills=4)
    assert torn > 0
    assert wrong == 0


class TestInputs:
    """Alignments made deeper than they are."""

    def test_real_rows_stay_and_others_are_made_of_two_of_them(self) -> None:
        real = read_alignment(sample_alignments("102M")["A"])
        deep = deepen(real, len(real) + 50)
        np.testing.assert_array_equal(deep.msa[: len(real)], real.msa)
        for row in deep.msa[len(real) :]:
            starts = (real.msa == row).cumprod(axis=1).sum(axis=1).max()
            ends = (real.msa == row)[:, ::-1].cumprod(axis=1).sum(axis=1).max()
            assert starts + ends >= len(row)

    def test_they_have_the_depth_asked_for(self, given, features) -> None:
        real = len(read_alignment(sample_alignments("102M")["A"]))
        assert given.made_up_rows == 1000 - real
        assert 990 <= len(features.msa) <= 1000  # a made-up row may repeat another

    def test_an_alignment_that_does_not_fit_is_named(self, tmp_path) -> None:
        (tmp_path / "102M_A.a3m").write_text(">q\nACDE\n")
        with pytest.raises(DataError, match=r"no alignment for 102M\. .*query has 4 residues"):
            prepare_input(sample_path("102M"), tmp_path, tmp_path / "deep", 10)


def test_the_measurements_become_rows_of_csv(given, features, tmp_path) -> None:
    stores = list(measure_stores(given, {given.name: features}, tmp_path / "s", SMALL))
    assert [record.store for record in stores] == [*STORES, "uncached"]
    steps = list(measure_steps(given, features, tmp_path / "s", SMALL))
    assert {(r.design, r.workers) for r in steps if r.stage == "step"} == {
        (design, workers) for design in DESIGNS for workers in (0, 1)
    }
    assert {r.stage for r in steps if r.design == "uncached"} == {
        "structure", "alignments", "featurize", "crop", "batch", "step",
    }  # fmt: skip
    for kind, measured in ((StoreRecord, stores), (StepRecord, steps)):
        (path,) = rows.append(kind, measured, tmp_path / "records", "cpu")
        back = rows.read(kind, tmp_path / "records")
        assert path == Path(tmp_path, "records", "cpu", f"feature_cache{kind.SUFFIX}.csv")
        assert [r.entry for r in back] == ["102M"] * len(measured)
