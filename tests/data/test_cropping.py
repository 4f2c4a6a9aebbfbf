"""Crops: size, order, whole tokens, neighbourhood."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megafold.data import crop
from megafold.data.cropping import (
    INTERFACE_DISTANCE,
    METHODS,
    contiguous_crop,
    crop_tokens,
    interface_crop,
    nearest_chains,
    spatial_crop,
)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("size", [1, 17, 64])
def test_a_crop_has_the_size_asked_for_and_keeps_the_order(method, size, features_of) -> None:
    f = features_of("102M")
    for seed in range(5):
        rows = METHODS[method](f, size, np.random.default_rng(seed))
        assert len(rows) == size
        assert (np.diff(rows) > 0).all()


def test_a_structure_that_fits_is_left_as_it_is(features_of) -> None:
    f = features_of("1CRN")
    assert crop(f, 46, generator=np.random.default_rng(0)) is f


def test_the_same_seed_gives_the_same_crop(features_of) -> None:
    f = features_of("5UGO")
    one, two, other = (
        crop(f, 100, generator=np.random.default_rng(seed)).token_index for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_a_contiguous_crop_is_one_run_of_each_chain(features_of) -> None:
    f = features_of("5UGO")
    for seed in range(20):
        rows = contiguous_crop(f, 120, np.random.default_rng(seed))
        for chain in np.unique(f.asym_id[rows]):
            run = rows[f.asym_id[rows] == chain]
            assert (np.diff(run) == 1).all()


def test_a_contiguous_crop_reaches_every_token(features_of) -> None:
    f = features_of("1A8O")
    seen = np.zeros(f.num_tokens, dtype=bool)
    for seed in range(200):
        seen[contiguous_crop(f, 40, np.random.default_rng(seed))] = True
    assert seen.all()


def test_a_spatial_crop_is_a_ball_around_one_token(features_of) -> None:
    f = features_of("1A8O")
    centres = f.positions[f.center_atom]
    rows = spatial_crop(f, 30, np.random.default_rng(0))
    inside = np.zeros(f.num_tokens, dtype=bool)
    inside[rows] = True
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    balls = [distance[middle, inside].max() <= distance[middle, ~inside].min() for middle in rows]
    assert any(balls)


def test_a_spatial_crop_has_no_unresolved_centre(features_of) -> None:
    f = features_of("2XHE")
    for seed in range(10):
        rows = spatial_crop(f, 200, np.random.default_rng(seed))
        assert f.resolved[f.center_atom[rows]].all()


def test_an_interface_crop_has_two_chains(features_of) -> None:
    f = features_of("2XHE")
    for seed in range(10):
        rows = interface_crop(f, 60, np.random.default_rng(seed))
        assert len(np.unique(f.asym_id[rows])) == 2


def test_without_an_interface_the_crop_is_spatial(features_of) -> None:
    f = features_of("1EMA")
    np.testing.assert_array_equal(
        interface_crop(f, 50, np.random.default_rng(3)),
        spatial_crop(f, 50, np.random.default_rng(3)),
    )


def test_methods_are_drawn_as_often_as_in_alphafold_3(features_of, monkeypatch) -> None:
    f, drawn = features_of("1A8O"), Counter()
    for name in METHODS:

        def note(features, size, generator, tokens, wanted, name=name):
            drawn[name] += 1
            return np.arange(size)

        monkeypatch.setitem(METHODS, name, note)
    generator = np.random.default_rng(0)
    for _ in range(2000):
        crop(f, 10, generator=generator)
    share = {name: count / 2000 for name, count in drawn.items()}
    assert share == pytest.approx({"contiguous": 0.2, "spatial": 0.4, "interface": 0.4}, abs=0.04)


def test_of_many_chains_the_20_nearest_to_an_interface_token_are_kept(features_of) -> None:
    f = features_of("4ZXB")
    assert len(np.unique(f.asym_id)) == 30
    rows = nearest_chains(f, np.random.default_rng(0))
    middle = np.random.default_rng(0).choice(np.flatnonzero(f.is_interface))
    centres = f.positions[f.center_atom]
    distance = np.linalg.norm(centres - centres[middle], axis=-1)
    distance[~f.resolved[f.center_atom]] = np.inf
    nearest = {chain: distance[f.asym_id == chain].min() for chain in np.unique(f.asym_id)}
    kept = set(f.asym_id[rows].tolist())
    assert len(kept) == 20
    dropped = nearest.keys() - kept
    assert max(nearest[c] for c in kept) <= min(nearest[c] for c in dropped)
    np.testing.assert_array_equal(rows, np.flatnonzero(np.isin(f.asym_id, list(kept))))


def test_few_chains_are_all_kept(features_of) -> None:
    rows = nearest_chains(features_of("5UGO"), np.random.default_rng(0))
    np.testing.assert_array_equal(rows, np.arange(378))


@pytest.mark.parametrize("method", list(METHODS))
def test_a_crop_of_some_chains_stays_within_them(method, features_of) -> None:
    f = features_of("4ZXB")
    for seed in range(5):
        generator = np.random.default_rng(seed)
        tokens = nearest_chains(f, generator)
        rows = METHODS[method](f, 100, generator, tokens)
        assert len(rows) == 100
        assert set(rows.tolist()) <= set(tokens.tolist())


def test_a_size_below_one_is_refused(features_of) -> None:
    with pytest.raises(ValueError, match="size is 0"):
        crop(features_of("1CRN"), 0, generator=np.random.default_rng(0))


class TestWantedChains:
    """A crop for one chain, or one interface, that was drawn."""

    def test_a_spatial_crop_is_around_a_token_of_the_chain(self, features_of) -> None:
        features = features_of("4ZXB")
        for chain in np.unique(features.asym_id)[:4].tolist():
            wanted = features.asym_id == chain
            for seed in range(5):
                tokens = spatial_crop(features, 30, np.random.default_rng(seed), None, wanted)
                assert chain in features.asym_id[tokens]

    def test_an_interface_crop_is_around_a_token_near_the_other_chain(self, features_of) -> None:
        features = features_of("5UGO")
        centres = features.positions[features.center_atom]
        for pair in ((1, 2), (1, 3)):
            wanted = np.isin(features.asym_id, pair)
            for seed in range(10):
                (token,) = interface_crop(features, 1, np.random.default_rng(seed), None, wanted)
                other = wanted & (features.asym_id != features.asym_id[token])
                distance = np.linalg.norm(centres[other] - centres[token], axis=-1)
                resolved = features.resolved[features.center_atom[other]]
                assert distance[resolved].min() < INTERFACE_DISTANCE

    def test_a_chain_that_is_not_there_is_refused(self, features_of) -> None:
        with pytest.raises(ValueError, match=r"chains \[99\] are not there"):
            crop_tokens(features_of("1CRN"), 10, generator=np.random.default_rng(0), chains=[99])


def test_rows_of_the_alignment_may_be_chosen_with_the_tokens(features_of) -> None:
    features, tokens, rows = features_of("102M"), np.arange(3, 30), np.array([0, 7, 300])
    both = features.select(tokens, rows)
    np.testing.assert_array_equal(both.msa, features.msa[np.ix_(rows, tokens)])
    np.testing.assert_array_equal(both.deletions, features.deletions[np.ix_(rows, tokens)])
    assert both.profile.shape == (27, 32)
