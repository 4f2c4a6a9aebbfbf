"""``featurize``: conformers, alignments side by side, bonds."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from megafold.data import Features, featurize
from megafold.data.alignment import parse_alignment
from megafold.data.components import component, reference_conformer
from megafold.data.constants import RESTYPE_INDEX
from megafold.data.features import ARRAY_FIELDS, COLUMN_FIELDS


def _distances(positions: np.ndarray) -> np.ndarray:
    return np.linalg.norm(positions[:, None] - positions[None], axis=-1)


def test_every_sample_becomes_features_of_the_right_shape(any_sample, features_of) -> None:
    f = features_of(any_sample)
    n, a, m = f.num_tokens, f.num_atoms, len(f.msa)
    assert f.msa.shape == f.msa_mask.shape == f.deletions.shape == (m, n)
    assert f.msa.dtype == f.deletions.dtype == np.uint8
    assert f.profile.shape == (n, 32)
    assert f.ref_pos.shape == f.positions.shape == (a, 3)
    assert f.ref_atom_name_chars.shape == (a, 4)
    assert len(f.layout) == a
    for field in fields(Features):
        if field.name != "layout":
            assert getattr(f, field.name).dtype != np.float64, field.name
    assert {f.name for f in fields(Features)} == {*ARRAY_FIELDS, "layout"}
    assert set(COLUMN_FIELDS) < set(ARRAY_FIELDS)


def test_profiles_are_distributions(any_sample, features_of) -> None:
    np.testing.assert_allclose(features_of(any_sample).profile.sum(axis=-1), 1, atol=1e-5)


def test_atom_names_are_spelled_in_characters(features_of) -> None:
    f = features_of("1LCD")
    spelled = ["".join(chr(c + 32) for c in row).strip() for row in f.ref_atom_name_chars]
    assert spelled == f.layout.atom_name.tolist()
    assert f.ref_atom_name_chars.max() < 64


def test_elements_are_atomic_numbers(features_of) -> None:
    f = features_of("102M")
    iron = f.layout.element == "FE"
    assert f.ref_element[iron].tolist() == [26]
    assert set(f.ref_element[f.layout.element == "C"].tolist()) == {6}


def test_each_residue_has_a_reference_space_of_its_own(any_sample, features_of) -> None:
    f = features_of(any_sample)
    keys = zip(f.layout.chain_id.tolist(), f.layout.residue_number.tolist(), strict=True)
    of_key = {}
    for key, uid in zip(keys, f.ref_space_uid.tolist(), strict=True):
        assert of_key.setdefault(key, uid) == uid
    assert len(set(of_key.values())) == len(of_key)


@pytest.mark.parametrize("name", ["ALA", "TRP", "DG", "A", "ATP", "NAG", "HEM"])
def test_conformers_have_the_bond_lengths_of_chemistry(name) -> None:
    conformer, parts = reference_conformer(name), component(name)
    assert conformer.source == "etkdg"
    assert conformer.mask.all()
    heavy = np.array([e != "FE" for e in parts.elements])
    bonds = parts.bonds[heavy[parts.bonds].all(axis=-1)]
    length = _distances(conformer.positions)[bonds[:, 0], bonds[:, 1]]
    assert ((length > 1.1) & (length < 2.0)).all()


def test_conformers_keep_the_hand_of_the_amino_acid() -> None:
    """CA of an L amino acid: looking from H, CO, R, N run clockwise."""
    for name, sign in (("ALA", 1), ("TRP", 1), ("DAL", -1)):
        at = dict(zip(component(name).atom_names, reference_conformer(name).positions, strict=True))
        n, c, cb = (at[atom] - at["CA"] for atom in ("N", "C", "CB"))
        assert np.sign(np.dot(np.cross(n, c), cb)) == sign


def test_a_conformer_is_the_same_every_time() -> None:
    first = reference_conformer("TRP").positions.copy()
    reference_conformer.cache_clear()
    np.testing.assert_array_equal(reference_conformer("TRP").positions, first)


def test_where_no_conformer_is_found_the_dictionary_has_ideal_coordinates() -> None:
    """Chlorophyll a, which distance geometry does not solve."""
    conformer = reference_conformer("CLA")
    assert conformer.source == "ideal"
    assert conformer.mask.all()


def test_rows_of_the_alignment_stand_side_by_side_and_short_ones_end(structure_of) -> None:
    structure = structure_of("1LCD")
    sequences = {c.chain_id: c for c in structure.chains}
    letters = dict(zip(("DA", "DC", "DG", "DT"), "ACGT", strict=True))
    dna = "".join(letters[name] for name in sequences["A"].components)
    mutated = ("C" if dna[0] != "C" else "G") + dna[1:]
    f = featurize(structure, {"A": parse_alignment(f">q\n{dna}\n>h\n{mutated}\n", "dna")})
    first = f.asym_id == 1
    assert len(f.msa) == 2
    assert f.msa_mask[0].all()
    np.testing.assert_array_equal(f.msa_mask[1], first)
    assert set(f.msa[1, ~first].tolist()) == {RESTYPE_INDEX["GAP"]}
    assert f.profile[0, RESTYPE_INDEX["D" + dna[0]]] == 0.5


def test_copies_of_a_chain_share_its_alignment(structure_of) -> None:
    from megafold.data.constants import RESTYPES
    from megafold.data.msa_features import chain_sequence

    structure = structure_of("1A8O")
    one_letter = dict(zip(RESTYPES[:20], "ARNDCQEGHILKMFPSTWYV", strict=True))
    query = "".join(one_letter[RESTYPES[c]] for c in chain_sequence(structure.chains[0]))
    text = f">q\n{query}\n>h\n{'A' * 70}\n"
    f = featurize(structure, {"A": parse_alignment(text)})
    assert f.msa_mask.all()
    np.testing.assert_array_equal(f.msa[:, :70], f.msa[:, 70:])


def test_all_tokens_of_a_modified_residue_have_its_column(structure_of) -> None:
    structure = structure_of("1AS5")
    query = "HPPCCLYGKCRRYPGCSSASCCQRX"
    deleted = query[:2] + "gg" + query[2:]
    other = deleted.replace("CC", "AC", 1)
    f = featurize(structure, {"A": parse_alignment(f">q\n{query}\n>h\n{other}\n")})
    third = f.residue_index == 3
    assert third.sum() == 8
    assert set(f.deletions[1, third].tolist()) == {2}


def test_bonds_are_those_of_ligands(features_of) -> None:
    haem = features_of("102M")
    first, second = haem.bonds.T
    assert haem.is_ligand[first].all()
    assert haem.is_ligand[second].all()
    assert len(haem.bonds) == 50  # between the 43 heavy atoms of haem, iron included
    assert len(features_of("1CRN").bonds) == 0


def test_bonds_join_glycans_to_the_protein(features_of) -> None:
    f = features_of("4ZXB")
    mixed = f.is_ligand[f.bonds].sum(axis=-1) == 1
    assert mixed.sum() > 0
    polymer = np.where(f.is_ligand[f.bonds[mixed, 0]], f.bonds[mixed, 1], f.bonds[mixed, 0])
    assert set(f.restype[polymer].tolist()) == {RESTYPE_INDEX["ASN"]}


def test_interface_tokens_are_those_within_15_angstrom_of_another_chain(features_of) -> None:
    f = features_of("1LCD")
    centres, seen = f.positions[f.center_atom], f.resolved[f.center_atom]
    near = _distances(centres) <= 15
    near &= (f.asym_id[:, None] != f.asym_id[None]) & seen[:, None] & seen[None]
    np.testing.assert_array_equal(f.is_interface, near.any(axis=-1))


def test_selecting_tokens_keeps_whole_tokens_and_their_order(features_of) -> None:
    f = features_of("102M")
    chosen = np.array([3, 10, 11, 150, 160, 170])
    part = f.select(chosen)
    np.testing.assert_array_equal(part.token_index, chosen)
    for i, token in enumerate(chosen):
        ours, whole = part.atom_to_token == i, f.atom_to_token == token
        np.testing.assert_array_equal(part.positions[ours], f.positions[whole])
        np.testing.assert_array_equal(part.layout.atom_name[ours], f.layout.atom_name[whole])
    np.testing.assert_array_equal(
        part.positions[part.center_atom], f.positions[f.center_atom[chosen]]
    )
    np.testing.assert_array_equal(part.msa, f.msa[:, chosen])


def test_selecting_everything_changes_nothing(any_sample, features_of) -> None:
    f = features_of(any_sample)
    same = f.select(np.arange(f.num_tokens))
    for name in ARRAY_FIELDS:
        np.testing.assert_array_equal(getattr(same, name), getattr(f, name), err_msg=name)


def test_bonds_follow_a_selection(features_of) -> None:
    f = features_of("102M")
    ligand = np.flatnonzero(f.is_ligand)
    assert len(f.select(ligand).bonds) == len(f.bonds)
    assert len(f.select(np.flatnonzero(f.is_protein)).bonds) == 0


@pytest.mark.parametrize("rows", [[], [3, 2], [1, 1], [-1, 2], [0, 10**6]])
def test_a_selection_that_cannot_be_is_refused(rows, features_of) -> None:
    with pytest.raises(ValueError, match="token_indices"):
        features_of("1CRN").select(np.array(rows, dtype=int))
