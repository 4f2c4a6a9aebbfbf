"""Chains and interfaces are drawn by AlphaFold 3's weights."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from megafold.data import (
    Cache,
    DataError,
    Example,
    SampledDataset,
    build_cache,
    example_weights,
    find_examples,
    sample_path,
)
from megafold.data import sampling as module
from megafold.data.sampling import chains_of, interfaces_of


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    out = tmp_path_factory.mktemp("sampling") / "cache"
    build_cache([sample_path(name) for name in ("1A8O", "1LCD", "4CUP")], out)
    return Cache(out)


def _example(cluster: str, *kinds: str) -> Example:
    return Example("X", tuple(range(1, len(kinds) + 1)), kinds, cluster)


class TestExamples:
    """What there is to draw."""

    def test_every_chain_with_its_sequence_or_components(self, features_of) -> None:
        found = {c.asym_id: (c.kind, c.content) for c in chains_of(features_of("1LCD"))}
        assert found == {
            1: ("nucleic", "DNA AATTGTGAGCG"),
            2: ("nucleic", "DNA CGCTCACAATT"),
            3: ("protein", "MKPVTLYDVAEYAGVSYQTVSRVVNQASHVSAKTREKVEAAMAELNYIPNR"),
            4: ("ligand", "NA"),
        }

    def test_a_modified_residue_counts_as_its_parent_once(self, features_of) -> None:
        (chain,) = chains_of(features_of("1AS5"))
        assert chain.content == "HPPCCLYGKCRRYPGCSSASCCQRX"  # the file's canonical sequence

    def test_interfaces_are_chains_with_heavy_atoms_within_5_angstrom(self, features_of) -> None:
        features = features_of("1LCD")
        rows = np.flatnonzero(features.resolved)
        chain, positions = features.asym_id[features.atom_to_token[rows]], features.positions[rows]
        expected = []
        for a in range(1, 5):
            for b in range(a + 1, 5):
                gaps = positions[chain == a][:, None] - positions[chain == b]
                if np.linalg.norm(gaps, axis=-1).min() < 5.0:
                    expected.append((a, b))
        assert interfaces_of(features) == expected
        assert interfaces_of(features_of("1CRN")) == []

    def test_copies_of_a_chain_share_a_cluster_and_so_do_their_interfaces(self, cache) -> None:
        examples = [e for e in find_examples(cache) if e.name == "4CUP"]
        protein_ligand = [e for e in examples if e.kinds == ("protein", "ligand")]
        clusters = Counter(e.cluster for e in protein_ligand)
        assert max(clusters.values()) >= 2
        assert len({e.cluster for e in examples if e.kinds == ("protein",)}) == 1

    def test_what_was_found_is_kept_until_the_entries_change(
        self, cache, tmp_path, monkeypatch
    ) -> None:
        build_cache(sample_path("1CRN"), tmp_path / "cache")
        first = find_examples(Cache(tmp_path / "cache"))
        looked = []
        assert find_examples(Cache(tmp_path / "cache"), progress=looked.append) == first
        assert looked == []
        build_cache(sample_path("1AS5"), tmp_path / "cache")
        assert len(find_examples(Cache(tmp_path / "cache"), progress=looked.append)) == 2
        assert looked == ["1AS5", "1CRN"]
        assert json.loads((tmp_path / "cache" / "examples.json").read_text())["made_from"]

    def test_an_empty_cache_is_refused(self, tmp_path) -> None:
        with pytest.raises(DataError, match="the cache has no structure"):
            find_examples(Cache.create(tmp_path / "cache"))


class TestWeights:
    """beta / N_cluster (3 n_prot + 3 n_nuc + 1 n_ligand), worked out by hand."""

    @pytest.mark.parametrize(
        ("examples", "expected"),
        [
            ([_example("a", "protein"), _example("a|a", "protein", "protein")], [1.5, 6]),
            ([_example("a", "nucleic"), _example("b", "ligand")], [1.5, 0.5]),
            ([_example("a", "protein"), _example("a", "protein"), _example("b", "protein")],
             [0.75, 0.75, 1.5]),
            ([_example("a|b", "protein", "ligand"), _example("a|c", "protein", "nucleic")],
             [4, 6]),
        ],
    )  # fmt: skip
    def test_they_are_those_of_the_paper(self, examples, expected) -> None:
        weights = example_weights(examples)
        np.testing.assert_allclose(weights, np.array(expected) / np.sum(expected))

    def test_of_a_dimer_the_interface_is_drawn_most(self, cache) -> None:
        examples = [e for e in find_examples(cache) if e.name == "1A8O"]
        np.testing.assert_allclose(example_weights(examples), [0.1, 0.1, 0.8])

    def test_examples_are_drawn_as_often_as_they_weigh(self, cache) -> None:
        dataset = SampledDataset(cache, 20, steps=4000)
        drawn = Counter(dataset.example(step) for step in range(4000))
        share = [drawn[example] / 4000 for example in dataset.examples]
        np.testing.assert_allclose(share, example_weights(dataset.examples), atol=0.02)


def test_a_short_protein_is_clustered_by_its_sequence(monkeypatch) -> None:
    def clustered(sequences, method):
        assert sequences == {"A" * 10}
        return {"A" * 10: "A" * 10}

    monkeypatch.setattr(module, "cluster_sequences", clustered)
    chains = {
        "X": [
            module.ChainInfo(1, "protein", "A" * 9),
            module.ChainInfo(2, "protein", "A" * 10),
        ]
    }
    one, two = module._clustered(chains, {"X": []}, "alignment")
    assert (one.cluster, two.cluster) == ("protein AAAAAAAAA", "protein AAAAAAAAAA")


class TestSampledDataset:
    """A step is an example."""

    def test_seed_and_step_decide_a_batch(self, cache) -> None:
        def positions(seed: int, step: int) -> bytes:
            return SampledDataset(cache, 30, steps=10, seed=seed)[step].ref_pos.numpy().tobytes()

        assert positions(0, 3) == positions(0, 3)
        assert len({positions(s, i) for s in (0, 1) for i in (0, 1)}) == 4

    def test_a_crop_in_space_has_a_token_of_what_it_was_drawn_for(self, cache) -> None:
        ligand = [e for e in find_examples(cache) if e.kinds == ("ligand",)]
        dataset = SampledDataset(cache, 24, steps=40, examples=ligand)
        held = [
            bool(np.isin(dataset[i].asym_id.numpy(), dataset.example(i).chains).any())
            for i in range(40)
        ]
        assert sum(held) >= 0.7 * 40  # one crop of five is contiguous, and may miss it

    def test_examples_that_the_cache_has_not_are_refused(self, cache) -> None:
        with pytest.raises(DataError, match="no structure X"):
            SampledDataset(cache, 20, steps=1, examples=[_example("a", "protein")])
        with pytest.raises(DataError, match="no example"):
            SampledDataset(cache, 20, steps=1, examples=[])
