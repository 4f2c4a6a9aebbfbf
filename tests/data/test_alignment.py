"""Reading a3m, and what is worked out from it."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from megafold.data import (
    DataError,
    featurize,
    query_alignment,
    read_alignment,
    sample_alignments,
)
from megafold.data.alignment import parse_alignment
from megafold.data.constants import RESTYPE_INDEX, RESTYPES


def _letters(row: np.ndarray) -> list[str]:
    return [RESTYPES[c] for c in row]


def test_columns_gaps_and_deletions() -> None:
    alignment = parse_alignment(">query\nACD\n>hit\nAgk-hD\n")
    assert _letters(alignment.msa[0]) == ["ALA", "CYS", "ASP"]
    assert _letters(alignment.msa[1]) == ["ALA", "GAP", "ASP"]
    assert alignment.deletions.tolist() == [[0, 0, 0], [0, 2, 1]]


def test_lower_case_after_the_last_column_is_no_deletion() -> None:
    assert parse_alignment(">q\nAC\n>h\nACgg\n").deletions.tolist() == [[0, 0]]


def test_many_deletions_are_kept_as_255() -> None:
    alignment = parse_alignment(f">q\nAC\n>h\nG{'a' * 300}C\n")
    assert alignment.deletions[1].tolist() == [0, 255]


def test_a_sequence_over_several_lines_is_one_row() -> None:
    assert parse_alignment(">q\nAC\nDE\n>h\nA-\n-E\n").msa.shape == (2, 4)


def test_dots_are_ignored() -> None:
    assert parse_alignment(">q\nA.C\n>h\nAgD\n").msa.shape == (2, 2)


def test_rows_that_repeat_an_earlier_one_are_left_out() -> None:
    alignment = parse_alignment(">q\nAC\n>same\nAC\n>other\nAD\n>again\nAgD\n")
    assert alignment.descriptions == ("q", "other")


def test_only_the_first_rows_are_kept() -> None:
    assert len(parse_alignment(">q\nAC\n>1\nAD\n>2\nAE\n", max_rows=2)) == 2


@pytest.mark.parametrize(
    ("letter", "name"), [("B", "ASP"), ("Z", "GLU"), ("U", "CYS"), ("J", "UNK"), ("X", "UNK")]
)
def test_ambiguous_amino_acids(letter, name) -> None:
    assert _letters(parse_alignment(f">q\n{letter}\n").msa[0]) == [name]


def test_nucleotides_have_classes_of_their_own() -> None:
    assert _letters(parse_alignment(">q\nACGUTN-\n", "rna").msa[0]) == [
        "A", "C", "G", "U", "U", "N", "GAP",
    ]  # fmt: skip


def test_profile_is_the_share_of_each_class_in_a_column() -> None:
    profile = parse_alignment(">q\nA\n>1\nC\n>2\n-\n>3\nD\n").profile
    expected = np.zeros(32)
    for name in ("ALA", "CYS", "GAP", "ASP"):
        expected[RESTYPE_INDEX[name]] = 0.25
    np.testing.assert_allclose(profile, expected[None])


def test_deletion_mean_is_over_all_rows() -> None:
    alignment = parse_alignment(">q\nAC\n>1\nAgggD\n>2\nA-\n")
    np.testing.assert_allclose(alignment.deletion_mean, [0.0, 1.0])


def test_the_query_alone() -> None:
    alignment = query_alignment("ACD")
    assert alignment.msa.shape == (1, 3)
    assert not alignment.deletions.any()


@pytest.mark.parametrize("sample_id", ["102M", "3NZD"])
def test_bundled_alignments_begin_with_their_chain(sample_id, structure_of) -> None:
    (path,) = sample_alignments(sample_id).values()
    alignment = read_alignment(path)
    features = featurize(structure_of(sample_id), {"A": alignment})
    protein = features.is_protein
    np.testing.assert_array_equal(features.msa[0, protein], features.restype[protein])
    assert len(features.msa) == len(alignment) > 500


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "must start with '>'"),
        ("ACDE\n", "must start with '>'"),
        (">q\n>h\nAC\n", "row 'q' has no sequence"),
        (">q\nACD\n>short\nAC\n", "row 'short' has 2 columns, the query 3"),
        (">q\nA*D\n", "'\\*' is no residue"),
    ],
)
def test_what_is_no_alignment_is_refused(text, cause, tmp_path) -> None:
    path = tmp_path / "bad.a3m"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"bad\.a3m: .*{cause}"):
        read_alignment(path)


def test_a_truncated_file_is_refused(tmp_path) -> None:
    path = tmp_path / "cut.a3m.gz"
    path.write_bytes(gzip.compress(b">q\nACDEFGHIKL\n" * 50)[:-12])
    with pytest.raises(DataError, match=r"cut\.a3m\.gz: truncated"):
        read_alignment(path)


def test_a_missing_file_is_an_error_not_an_empty_alignment(tmp_path) -> None:
    with pytest.raises(DataError, match=r"gone\.a3m: no such alignment"):
        read_alignment(tmp_path / "gone.a3m")


def test_an_alignment_of_another_sequence_is_refused(structure_of, tmp_path) -> None:
    structure = structure_of("1CRN")
    sequence = "TTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN"
    featurize(structure, {"A": query_alignment(sequence)})
    with pytest.raises(DataError, match=r"has 45 residues, chain A of 1CRN has 46"):
        featurize(structure, {"A": query_alignment(sequence[1:])})
    with pytest.raises(DataError, match=r"differs from chain A of 1CRN at residue 2 \(THR\)"):
        featurize(structure, {"A": query_alignment("TA" + sequence[2:])})


def test_an_alignment_of_no_polymer_is_refused(structure_of) -> None:
    with pytest.raises(DataError, match="chain B is a ligand"):
        featurize(structure_of("3NZD"), {"B": query_alignment("A")})
    with pytest.raises(DataError, match="text: alignment of a ligand; of protein, rna, dna only"):
        parse_alignment(">q\nA\n", "ligand")
    with pytest.raises(DataError, match="alignment of chain Z, but 3NZD has chains A, B, C"):
        featurize(structure_of("3NZD"), {"Z": query_alignment("A")})
