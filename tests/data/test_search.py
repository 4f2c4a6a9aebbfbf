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


RNA = "GGGCCGUUAGCUCAGUUGGUAGAGCAGUUGACUUUUAAUCAAUUGGUCGCAGGUUCGAAUCCUGCACGACCCACCA"


@pytest.fixture(scope="module")
def rna_database(tmp_path_factory: pytest.TempPathFactory):
    """A relative of a tRNA inside a longer RNA, one with an insertion, its reverse complement."""
    generator = np.random.default_rng(0)

    def random(count: int) -> str:
        return "".join(generator.choice(list("ACGU"), count))

    relative = RNA[:9] + "A" + RNA[10:60] + "G" + RNA[61:]
    sequences = {f"random{i}": random(300) for i in range(40)}
    sequences["inside"] = random(50) + relative + random(40)
    sequences["inserted"] = relative[:33] + "CCCC" + relative[33:45] + "A" + relative[46:]
    sequences["reverse"] = RNA.translate(str.maketrans("ACGU", "UGCA"))[::-1]
    path = tmp_path_factory.mktemp("rna") / "rna.fasta"
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in sequences.items()))
    return path


def test_rna_finds_its_relatives_on_the_given_strand(rna_database) -> None:
    alignment = search_alignment(RNA, rna_database, chain_type="rna")
    names = [name.split("/")[0] for name in alignment.descriptions]
    assert names[0] == "query"
    assert set(names[1:]) == {"inside", "inserted"}
    row = names.index("inside")
    differs = np.flatnonzero(alignment.msa[row] != alignment.msa[0])
    assert {9, 60} <= set(differs.tolist())
    assert (alignment.msa[row] == alignment.msa[0]).mean() > 0.9
    assert alignment.deletions[names.index("inserted")].sum() == 4


def test_rna_has_the_e_values_of_nhmmer(rna_database) -> None:
    """Read in pieces and told the size of the database, as if searched at once."""
    import pyhmmer

    alphabet = pyhmmer.easel.Alphabet.rna()
    query = pyhmmer.easel.TextSequence(name="query", sequence=RNA).digitize(alphabet)
    with pyhmmer.easel.SequenceFile(str(rna_database), digital=True, alphabet=alphabet) as file:
        (hits,) = pyhmmer.nhmmer(query, file.read_block(), cpus=1, strand="watson", E=1e-3)
    weakest = max(hit.evalue for hit in hits if hit.evalue <= 1e-3)
    for limit, found in ((weakest * 1.01, len(hits)), (weakest * 0.99, len(hits) - 1)):
        alignment = search_alignment(RNA, rna_database, chain_type="rna", e_value=limit)
        assert len(alignment) - 1 == found


def test_a_database_in_pieces_gives_the_same_rows(database, monkeypatch) -> None:
    from megafold.data import search

    whole, shares = search.search_a3m(QUERY, database), []
    monkeypatch.setattr(search, "_PIECE", 1000)
    assert search.search_a3m(QUERY, database, progress=shares.append) == whole
    assert len(shares) > 5
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_the_rows_are_those_of_jackhmmer(database) -> None:
    import pyhmmer

    alphabet = pyhmmer.easel.Alphabet.amino()
    query = pyhmmer.easel.TextSequence(name="query", sequence=QUERY).digitize(alphabet)
    with pyhmmer.easel.SequenceFile(str(database), digital=True, alphabet=alphabet) as file:
        (result,) = pyhmmer.jackhmmer(
            query, file.read_block(), max_iterations=2, cpus=1,
            E=1e-4, domE=1e-4, incE=1e-4, incdomE=1e-4,
        )  # fmt: skip
    theirs = [row.upper().replace(".", "-") for row in result.msa.textize().alignment]
    ours = search_alignment(QUERY, database, iterations=2)
    assert len(ours) == len(set(theirs))


def test_a_compressed_database_is_searched_as_it_is(database, tmp_path) -> None:
    import gzip

    (path := tmp_path / "proteins.fasta.gz").write_bytes(gzip.compress(database.read_bytes()))
    ours, theirs = (search_alignment(QUERY, p) for p in (path, database))
    np.testing.assert_array_equal(ours.msa, theirs.msa)


def test_dna_is_not_searched_for(database) -> None:
    with pytest.raises(DataError, match="search for a dna; expected protein or rna"):
        search_alignment("ACGT", database, chain_type="dna")
