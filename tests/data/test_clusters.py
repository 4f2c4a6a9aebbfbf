"""Clusters at 40 % identity, with MMseqs2 and without."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from megafold.data import DataError, clusters
from megafold.data.clusters import are_similar, cluster_sequences, clustering_method

LETTERS = np.array(list("ARNDCQEGHILKMFPSTWYV"))
# Stands for MMseqs2: one cluster for each first letter, and the arguments in a file.
FAKE = """#!/usr/bin/env python3
import pathlib, sys
fasta, out = sys.argv[2:4]
pathlib.Path({log!r}).write_text(" ".join(sys.argv[1:2] + sys.argv[5:]))
lines = pathlib.Path(fasta).read_text().split()
first = {{}}
with open(out + "_cluster.tsv", "w") as file:
    for name, sequence in zip(lines[::2], lines[1::2]):
        print(first.setdefault(sequence[0], name[1:]), name[1:], sep="\\t", file=file)
sys.exit({status})
"""


def _random(length: int, seed: int) -> str:
    return "".join(np.random.default_rng(seed).choice(LETTERS, length))


def _changed(sequence: str, share: float, seed: int = 0) -> str:
    """``share`` of the residues replaced by others."""
    rng, letters = np.random.default_rng(seed), list(sequence)
    for at in rng.choice(len(letters), round(share * len(letters)), replace=False):
        letters[at] = rng.choice(LETTERS[letters[at] != LETTERS])
    return "".join(letters)


@pytest.fixture
def no_mmseqs(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def fake_mmseqs(monkeypatch, tmp_path):
    """(exit status) -> the file of arguments."""

    def install(status: int = 0) -> Path:
        log, program = tmp_path / "arguments", tmp_path / "mmseqs"
        program.write_text(FAKE.format(log=str(log), status=status))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return log

    return install


class TestByAlignment:
    """Without MMseqs2."""

    def test_half_identical_sequences_are_one_cluster_and_unrelated_ones_are_not(
        self, no_mmseqs
    ) -> None:
        one, other = _random(120, 1), _random(120, 2)
        near = _changed(one, 0.5)
        found = cluster_sequences([near, other, one, one])
        assert found == {one: found[near], near: found[near], other: other}
        assert found[near] in (one, near)

    @pytest.mark.parametrize(("share", "similar"), [(0.0, True), (0.45, True), (0.72, False)])
    def test_forty_percent_of_the_residues_must_be_identical(self, share, similar) -> None:
        one = _random(200, 3)
        assert are_similar(one, _changed(one, share)) == similar

    def test_the_alignment_must_cover_most_of_both(self) -> None:
        one = _random(100, 4)
        assert not are_similar(one, one[:70])
        assert are_similar(one, one[:85])

    def test_the_order_of_the_sequences_does_not_matter(self, no_mmseqs) -> None:
        one = _random(100, 5)
        several = [one, _changed(one, 0.4), _random(90, 6), _changed(one, 0.4, seed=1)]
        assert cluster_sequences(several) == cluster_sequences(several[::-1])

    def test_too_many_to_align_is_a_sentence_that_names_mmseqs(
        self, no_mmseqs, monkeypatch
    ) -> None:
        monkeypatch.setattr(clusters, "MAX_ALIGNED", 1)
        with pytest.raises(DataError, match=r"2 distinct .*Install MMseqs2"):
            cluster_sequences(["AAAAAAAAAA", "CCCCCCCCCC"])


class TestByMmseqs:
    """With a program of that name on the path."""

    def test_its_clusters_are_taken(self, fake_mmseqs) -> None:
        log = fake_mmseqs()
        assert clustering_method() == "mmseqs"
        found = cluster_sequences(["AC", "AD", "CC", "ADD"])
        assert found == {"ADD": "ADD", "AC": "ADD", "AD": "ADD", "CC": "CC"}
        assert log.read_text() == "easy-cluster --min-seq-id 0.4 -c 0.8 --cov-mode 0"

    def test_its_failure_is_an_error(self, fake_mmseqs) -> None:
        fake_mmseqs(status=3)
        with pytest.raises(DataError, match="mmseqs easy-cluster failed"):
            cluster_sequences(["AC"])
