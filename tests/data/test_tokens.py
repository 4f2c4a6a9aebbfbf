"""``tokenize``, held against numbers counted by hand from the entries."""

from __future__ import annotations

import numpy as np
import pytest

from megafold.data import tokenize
from megafold.data.constants import RESTYPE_INDEX, RESTYPES
from megafold.data.tokens import restype_class


# 1CRN: 46 residues. 1A8O: a dimer of 70 residues. 1LCD: 11 + 11 nucleotides, 51 residues, one
# sodium. 102M: 154 residues and the 43 heavy atoms of haem. 1AS5: 21 standard residues, three
# hydroxyprolines of 8 heavy atoms, one amide nitrogen.
@pytest.mark.parametrize(
    ("sample_id", "count"),
    [
        ("1CRN", 46),
        ("1A8O", 2 * 70),
        ("1LCD", 11 + 11 + 51 + 1),
        ("102M", 154 + 43),
        ("1AS5", 21 + 3 * 8 + 1),
    ],
)
def test_number_of_tokens(sample_id, count, structure_of) -> None:
    assert len(tokenize(structure_of(sample_id))) == count


# Crambin TTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN; heavy atoms of each residue within
# the chain, and the terminal oxygen.
def test_number_of_atoms_of_crambin(structure_of) -> None:
    sequence = "TTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN"
    counts = (5, 11, 8, 8, 6, 9, 4, 8, 8, 11, 7, 6, 7, 12, 7)
    heavy = dict(zip("ARNDCEGILFPSTYV", counts, strict=True))
    assert len(structure_of("1CRN").layout) == sum(heavy[letter] for letter in sequence) + 1


def test_every_atom_belongs_to_one_token_and_order_is_kept(any_sample, structure_of) -> None:
    tokens = tokenize(structure_of(any_sample))
    assert (np.diff(tokens.atom_to_token) >= 0).all()
    assert set(tokens.atom_to_token.tolist()) == set(range(len(tokens)))


def test_centre_and_representative_atom_are_of_the_token(any_sample, structure_of) -> None:
    tokens = tokenize(structure_of(any_sample))
    rows = np.arange(len(tokens))
    np.testing.assert_array_equal(tokens.atom_to_token[tokens.center_atom], rows)
    np.testing.assert_array_equal(tokens.atom_to_token[tokens.representative_atom], rows)


@pytest.mark.parametrize(
    ("name", "chain_type", "centre", "representative"),
    [
        ("ALA", "protein", "CA", "CB"),
        ("GLY", "protein", "CA", "CA"),
        ("DA", "dna", "C1'", "C4"),
        ("DG", "dna", "C1'", "C4"),
        ("DC", "dna", "C1'", "C2"),
        ("DT", "dna", "C1'", "C2"),
    ],
)
def test_centre_and_representative_atom(
    name, chain_type, centre, representative, structure_of
) -> None:
    structure = structure_of("1LCD")
    tokens, layout = tokenize(structure), structure.layout
    here = (layout.residue_name[tokens.center_atom] == name) & ~tokens.is_atom
    assert here.any()
    assert set(layout.atom_name[tokens.center_atom[here]]) == {centre}
    assert set(layout.atom_name[tokens.representative_atom[here]]) == {representative}
    assert getattr(tokens, f"is_{chain_type}")[here].all()


def test_representative_atoms_of_rna(structure_of) -> None:
    structure = structure_of("4P5J")
    tokens, layout = tokenize(structure), structure.layout
    for name, atom in (("A", "C4"), ("G", "C4"), ("C", "C2"), ("U", "C2")):
        here = layout.residue_name[tokens.center_atom] == name
        assert set(layout.atom_name[tokens.representative_atom[here]]) == {atom}


def test_a_modified_residue_is_one_token_for_each_heavy_atom(structure_of) -> None:
    structure = structure_of("1AS5")
    tokens, layout = tokenize(structure), structure.layout
    here = layout.residue_name[tokens.center_atom] == "HYP"
    assert here.sum() == 24
    assert tokens.is_atom[here].all()
    assert tokens.is_protein[here].all()
    assert {RESTYPES[c] for c in tokens.restype[here]} == {"PRO"}
    assert len(set(tokens.residue_index[here].tolist())) == 3


def test_every_token_is_of_one_kind(any_sample, structure_of) -> None:
    tokens = tokenize(structure_of(any_sample))
    kinds = [tokens.is_protein, tokens.is_rna, tokens.is_dna, tokens.is_ligand]
    assert (np.sum(kinds, axis=0) == 1).all()


def test_ligands_are_unknown_amino_acids(any_sample, structure_of) -> None:
    tokens = tokenize(structure_of(any_sample))
    assert set(tokens.restype[tokens.is_ligand].tolist()) <= {RESTYPE_INDEX["UNK"]}


@pytest.mark.parametrize(
    ("name", "chain_type", "expected"),
    [
        ("TRP", "protein", "TRP"),
        ("SEP", "protein", "SER"),
        ("DAL", "protein", "ALA"),
        ("CRO", "protein", "UNK"),  # made of three residues: no single parent
        ("NH2", "protein", "UNK"),
        ("PSU", "rna", "U"),
        ("5MC", "rna", "C"),
        ("5CM", "dna", "DC"),
        ("HEM", "ligand", "UNK"),
    ],
)
def test_a_modified_residue_has_the_class_of_its_parent(name, chain_type, expected) -> None:
    assert RESTYPES[restype_class(name, chain_type)] == expected


def test_chains_of_one_sequence_share_the_entity_and_differ_in_the_copy(structure_of) -> None:
    structure = structure_of("4ZXB")
    tokens = tokenize(structure)
    copies = {(c.entity_id, c.sym_id) for c in structure.chains}
    assert len(copies) == len(structure.chains) == tokens.asym_id.max()
    by_entity: dict[int, set] = {}
    for chain in structure.chains:
        by_entity.setdefault(chain.entity_id, set()).add(chain.components)
    assert all(len(sequences) == 1 for sequences in by_entity.values())
    assert len({next(iter(s)) for s in by_entity.values()}) == len(by_entity)


def test_residue_index_counts_from_one_along_the_sequence(structure_of) -> None:
    tokens = tokenize(structure_of("1A8O"))
    assert tokens.residue_index.tolist() == [*range(1, 71), *range(1, 71)]
    assert tokens.asym_id.tolist() == [1] * 70 + [2] * 70
