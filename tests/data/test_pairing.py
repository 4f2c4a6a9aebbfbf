"""Rows of different chains side by side: which belong together, and in what order."""

from __future__ import annotations

import numpy as np
import pytest

from megafold.data import featurize
from megafold.data.alignment import Alignment, parse_alignment
from megafold.data.constants import RESTYPE_INDEX
from megafold.data.pairing import MAX_ROWS_PER_SPECIES, pair_rows
from megafold.data.species import species_of


@pytest.mark.parametrize(
    ("description", "species"),
    [
        ("tr|A0A146SKV9|A0A146SKV9_FUNHE/1-85", "FUNHE"),
        ("sp|P69905|HBA_HUMAN Hemoglobin subunit alpha OS=Homo sapiens OX=9606", "HUMAN"),
        ("UniRef90_P69905 Hemoglobin n=4 Tax=Homininae TaxID=207598 RepID=HBA_HUMAN", "207598"),
        ("A0A1 something OX=9606 GN=X", "9606"),
        ("UniRef100_UPI00186459A6_118141/\t154\t0.287", "118141"),
        ("MGYP001332167773", ""),
        ("query", ""),
    ],
)
def test_the_organism_is_read_from_the_description(description, species) -> None:
    assert species_of(description) == species


def _alignment(*rows: tuple[str, str]) -> Alignment:
    text = "".join(
        f">{f'x OX={name}' if name else f'row{i}'}\n{sequence}\n"
        for i, (name, sequence) in enumerate(rows)
    )
    return parse_alignment(text)


def test_rows_of_one_species_pair_and_others_do_not() -> None:
    a = _alignment(("", "ACDE"), ("1", "ACDF"), ("2", "ACGG"))
    b = _alignment(("", "KLMN"), ("3", "KLMM"), ("1", "KLLL"))
    assert pair_rows([a, b]).tolist() == [[1, 2]]


def test_of_several_rows_of_a_species_the_most_similar_to_the_query_pair() -> None:
    a = _alignment(("", "ACDE"), ("1", "AGGG"), ("1", "ACDG"))
    b = _alignment(("", "KLMN"), ("1", "KLMA"))
    assert pair_rows([a, b]).tolist() == [[2, 1]]


def test_as_many_rows_pair_as_the_chain_with_fewest_has() -> None:
    a = _alignment(("", "ACDE"), ("1", "ACDG"), ("1", "ACGG"), ("1", "AGGG"))
    b = _alignment(("", "KLMN"), ("1", "KLMA"), ("1", "KLAA"))
    assert pair_rows([a, b]).tolist() == [[1, 1], [2, 2]]


def test_rows_that_more_chains_take_part_in_come_first() -> None:
    a = _alignment(("", "ACDE"), ("1", "ACDG"), ("2", "ACGG"))
    b = _alignment(("", "KLMN"), ("1", "KLMA"), ("2", "KLAA"))
    c = _alignment(("", "WWWW"), ("2", "WWWA"))
    assert pair_rows([a, b, c]).tolist() == [[2, 2, 1], [1, 1, -1]]


def test_a_species_with_too_many_rows_is_left_out() -> None:
    letters = "ACDEFGHIKLMNPQRSTVWY"
    many = [("1", f"{x}{y}{z}A") for x in letters for y in letters for z in letters[:2]]
    b = _alignment(("", "KLMN"), ("1", "KLMA"))
    kept = pair_rows([_alignment(("", "WWWW"), *many[:MAX_ROWS_PER_SPECIES]), b])
    assert len(kept) == 1
    assert len(pair_rows([_alignment(("", "WWWW"), *many[: MAX_ROWS_PER_SPECIES + 1]), b])) == 0


def test_no_more_rows_than_asked_for() -> None:
    rows = [(str(i), f"AC{x}") for i, x in enumerate("FGHIKL")]
    assert len(pair_rows([_alignment(("", "ACD"), *rows)] * 2, max_rows=4)) == 4


def test_one_chain_or_none_has_nothing_to_pair() -> None:
    assert pair_rows([]).shape == (0, 0)
    assert pair_rows([_alignment(("", "AC"), ("1", "AD"))]).shape == (0, 1)


@pytest.fixture(scope="module")
def two_proteins(structure_of):
    """2XHE: two proteins of 650 and 279 residues, with three homologs each that were made up."""
    structure = structure_of("2XHE")
    texts = {}
    for chain, names in (("A", "123"), ("B", "245")):
        (sequence,) = (c.sequence for c in structure.chains if c.chain_id == chain)
        rows = [f">q\n{sequence}\n"]
        for i, name in enumerate(names):
            letter = "W" if sequence[i] != "W" else "A"
            rows.append(f">x OX={name}\n{sequence[:i]}{letter}{sequence[i + 1 :]}\n")
        texts[chain] = parse_alignment("".join(rows))
    return structure, texts


def test_the_complex_has_the_query_then_pairs_then_each_chains_own_rows(two_proteins) -> None:
    structure, alignments = two_proteins
    f = featurize(structure, alignments)
    a, b = (np.flatnonzero(f.asym_id == asym) for asym in (1, 2))
    assert f.msa.shape[0] == 4  # the query, species 2, and two rows of either chain
    np.testing.assert_array_equal(f.msa[0], f.restype)
    np.testing.assert_array_equal(f.msa[1, a], alignments["A"].msa[2])  # species 2
    np.testing.assert_array_equal(f.msa[1, b], alignments["B"].msa[1])
    np.testing.assert_array_equal(f.msa[2:, a], alignments["A"].msa[[1, 3]])
    np.testing.assert_array_equal(f.msa[2:, b], alignments["B"].msa[[2, 3]])
    assert f.msa_mask.all()


def test_profiles_are_of_the_chains_own_alignment(two_proteins) -> None:
    structure, alignments = two_proteins
    f = featurize(structure, alignments)
    np.testing.assert_array_equal(f.profile[f.asym_id == 1], alignments["A"].profile)


def test_rows_to_pair_may_come_from_another_search(two_proteins) -> None:
    structure, alignments = two_proteins
    f = featurize(structure, {"A": alignments["A"]}, to_pair=alignments)
    a, b = (np.flatnonzero(f.asym_id == asym) for asym in (1, 2))
    np.testing.assert_array_equal(f.msa[1, b], alignments["B"].msa[1])
    assert not f.msa_mask[2:, b].any()
    assert set(f.msa[2:, b].ravel().tolist()) == {RESTYPE_INDEX["GAP"]}
    assert f.msa_mask[:, a].all()


def test_copies_of_one_protein_are_not_paired_but_aligned(structure_of) -> None:
    structure = structure_of("1A8O")
    sequence = structure.chains[0].sequence
    text = f">q\n{sequence}\n>x OX=1\n{'A' * 70}\n>x OX=2\n{'G' * 70}\n"
    f = featurize(structure, {"A": parse_alignment(text)})
    assert len(f.msa) == 3
    np.testing.assert_array_equal(f.msa[:, :70], f.msa[:, 70:])
