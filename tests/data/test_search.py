"""Alignments by search, in a small database with a known answer."""

from __future__ import annotations

import numpy as np
import pytest

from megafold.data import DataError, read_alignment, sample_alignments, search_alignment
from megafold.data.constants import RESTYPE_INDEX

QUERY = "MVLSEGEWQLVLHVWAKVEADVAGHGQDILIRLFKSHPETLEKFDRFKHLKTEAEMKASEDLKKAGVTVLTALGAILKKKGHHEAELKPL"
_LETTERS = np.array(list("ACDEFGHIKLMNPQRSTVWY"))


def _random_protein(seed: int) -> str:
    return "".join(np.random.default_rng(seed).choice(_LETTERS, size=90))


def _mutate(sequence: str, count: int, seed: int) -> str:
    generator, letters = np.random.default_rng(seed), list(sequence)
    for at in generator.choice(len(letters), size=count, replace=False):
        letters[at] = str(generator.choice(_LETTERS))
    return "".join(letters)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory):
    """Three relatives of the query among a hundred random proteins."""
    sequences = {f"random{i}": _random_protein(i) for i in range(100)}
    sequences["close"] = _mutate(QUERY, 10, seed=1)
    sequences["inserted"] = _mutate(QUERY[:40] + "GGGGG" + QUERY[40:], 8, seed=2)
    sequences["shorter"] = _mutate(QUERY[:30] + QUERY[36:], 8, seed=3)
    path = tmp_path_factory.mktemp("search") / "proteins.fasta"
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in sequences.items()))
    return path


def test_relatives_are_found_and_strangers_are_not(database) -> None:
    alignment = search_alignment(QUERY, database)
    names = {name.split("/")[0] for name in alignment.descriptions[1:]}
    assert names == {"close", "inserted", "shorter"}


def test_the_query_is_the_first_row_and_gives_the_columns(database) -> None:
    alignment = search_alignment(QUERY, database)
    assert alignment.descriptions[0] == "query"
    assert alignment.msa.shape[1] == len(QUERY)
    assert not alignment.deletions[0].any()


def test_insertions_and_gaps_are_where_they_were_made(database) -> None:
    alignment = search_alignment(QUERY, database)
    row = {name.split("/")[0]: i for i, name in enumerate(alignment.descriptions)}
    deletions = alignment.deletions[row["inserted"]]
    assert deletions.sum() == 5
    assert abs(int(np.argmax(deletions)) - 40) <= 3
    gaps = np.flatnonzero(alignment.msa[row["shorter"]] == 31)
    assert len(gaps) == 6
    assert abs(gaps.mean() - 32.5) <= 3


def test_a_protein_without_relatives_has_itself(database) -> None:
    assert search_alignment(_random_protein(999), database).msa.shape == (1, 90)


def test_the_same_search_gives_the_same_rows(database) -> None:
    one, two = (search_alignment(QUERY, database, iterations=2) for _ in range(2))
    assert one.descriptions == two.descriptions
    np.testing.assert_array_equal(one.msa, two.msa)


def test_only_the_best_rows_are_kept(database) -> None:
    alignment = search_alignment(QUERY, database, max_rows=2)
    assert [name.split("/")[0] for name in alignment.descriptions] == ["query", "close"]


def test_the_bundled_alignment_is_of_globins(structure_of) -> None:
    """The distal histidine 64 (mutated in this entry) and the proximal histidine 93.

    Myoglobin is numbered without its first methionine, so residue 64 is column 64 from 0.
    """
    alignment = read_alignment(sample_alignments("102M")["A"])
    histidine = RESTYPE_INDEX["HIS"]
    assert alignment.msa[0, 64] != histidine
    assert alignment.profile[64, histidine] > 0.5
    assert alignment.profile[93, histidine] > 0.9


@pytest.mark.parametrize(("sequence", "cause"), [("", "is empty"), ("AC1", r"has letters \['1'\]")])
def test_a_query_that_is_no_protein_is_refused(sequence, cause, database) -> None:
    with pytest.raises(DataError, match=cause):
        search_alignment(sequence, database)


def test_a_database_that_is_none_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r"gone\.fasta: not a FASTA file"):
        search_alignment("ACD", tmp_path / "gone.fasta")
    (tmp_path / "empty.fasta").write_text("")
    with pytest.raises(DataError, match=r"empty\.fasta"):
        search_alignment("ACD", tmp_path / "empty.fasta")
