"""Figures of the data pipeline show what is in the data."""

from __future__ import annotations

import numpy as np
import pytest

from megafold import data
from megafold.data.alignment import parse_alignment
from megafold.data.cropping import contiguous_crop
from megafold.data.loading import LoadingCost
from megafold.viz import data_figures


@pytest.fixture(scope="module")
def features() -> data.Features:
    return data.example_features("1LCD")


def _strip(figure, name: str) -> list[str]:
    heatmap = figure.data[0]
    return np.asarray(heatmap.text)[list(heatmap.y).index(name)].tolist()


def test_token_tracks_name_each_tokens_chain(features) -> None:
    figure = data_figures.token_tracks(features)
    expected = ["A: DNA"] * 11 + ["B: DNA"] * 11 + ["C: protein"] * 51 + ["D: NA"]
    assert _strip(figure, "chain") == expected


def test_token_tracks_mark_what_is_true(features) -> None:
    figure = data_figures.token_tracks(features)
    near = [bool(text) for text in _strip(figure, "near another chain")]
    assert near == features.is_interface.tolist()
    assert [bool(text) for text in _strip(figure, "one atom")] == [False] * 73 + [True]


def test_categories_of_a_strip_have_colours_of_their_own(features) -> None:
    heatmap = data_figures.token_tracks(features).data[0]
    numbers, texts = np.asarray(heatmap.z).ravel(), np.asarray(heatmap.text).ravel()
    assert len({(n, t) for n, t in zip(numbers, texts, strict=True)}) == len(set(texts))
    assert len(heatmap.colorscale) == 2 * (numbers.max() + 1)


def test_crop_tracks_show_what_was_taken(features) -> None:
    rows = contiguous_crop(features, 30, np.random.default_rng(0))
    figure = data_figures.crop_tracks(features, {"mine": rows}, title="x")
    assert np.flatnonzero([bool(t) for t in _strip(figure, "mine")]).tolist() == rows.tolist()


def test_pair_distances_are_between_representative_atoms(features) -> None:
    z = np.asarray(data_figures.pair_distances(features).data[0].z)
    atoms = features.positions[features.representative_atom]
    assert z.shape == (74, 74)
    assert z[3, 40] == pytest.approx(np.linalg.norm(atoms[3] - atoms[40]), abs=0.06)


def test_pair_distances_of_what_is_unresolved_are_left_out() -> None:
    features = data.example_features("1EMA")
    unseen = ~features.resolved[features.representative_atom]
    z = np.asarray(data_figures.pair_distances(features).data[0].z)
    assert unseen.any()
    np.testing.assert_array_equal(np.isnan(z), unseen[:, None] | unseen[None])


def test_coverage_counts_the_rows_at_each_residue() -> None:
    alignment = parse_alignment(">q\nACDE\n>a\nAC--\n>b\n-CDF\n")
    line, heatmap = data_figures.alignment_coverage(alignment).data
    assert list(line.y) == [2, 3, 2, 2]
    z = np.asarray(heatmap.z)
    assert np.isnan(z).sum() == 3
    np.testing.assert_allclose(z[:, 1], [1, 1, 0.67], atol=1e-6)


def test_a_deep_alignment_is_drawn_in_part_and_says_so() -> None:
    alignment = data.read_alignment(data.sample_alignments("102M")["A"])
    figure = data_figures.alignment_coverage(alignment)
    drawn = len(np.asarray(figure.data[1].z))
    (caption,) = [a.text for a in figure.layout.annotations if a.name == "caption"]
    assert drawn < len(alignment)
    assert caption == f"727 rows of 154 columns, {drawn} of them drawn."


def test_loading_times_show_both_ways_of_each_structure() -> None:
    cost = LoadingCost("1CRN", 46, 1, 20.0, 0.5, 0.1, 0.1, 0.01)
    figure = data_figures.loading_times([cost], source="here")
    drawn = {trace.name: list(trace.x) for trace in figure.data if trace.name}
    assert drawn == {"from the cache": [0.5], "made afresh": [20.0]}
    assert figure.layout.annotations[0].text == "here"


def test_loading_times_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no measurement"):
        data_figures.loading_times([])
