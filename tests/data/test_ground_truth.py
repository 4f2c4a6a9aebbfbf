"""Frames, equivalent namings, copies of chains and bonds: what losses need of the truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megafold.data import crop, make_batch, pad_batch
from megafold.data.components import component
from megafold.data.copies import chain_copies
from megafold.data.frames import token_frames
from megafold.data.symmetry import equivalent_orders, symmetric_atoms


def moved_atoms(name: str, atoms: tuple[str, ...] | None = None) -> list[dict[str, str]]:
    """Each order but the given one, as which atom takes the place of which."""
    atoms = component(name).atom_names if atoms is None else atoms
    orders = equivalent_orders(name, atoms)
    return [
        {atoms[a]: atoms[b] for a, b in zip(orders[0], order, strict=True) if a != b}
        for order in orders[1:]
    ]


def without(name: str, *gone: str) -> tuple[str, ...]:
    return tuple(atom for atom in component(name).atom_names if atom not in gone)


def test_a_phenylalanine_ring_has_two_namings():
    flip = {"CD1": "CD2", "CD2": "CD1", "CE1": "CE2", "CE2": "CE1"}
    assert moved_atoms("PHE", without("PHE", "OXT")) == [flip]


@pytest.mark.parametrize(
    ("name", "gone", "pair"),
    [
        ("ASP", "OXT", {"OD1", "OD2"}),  # one of them is drawn with a double bond
        ("ARG", "OXT", {"NH1", "NH2"}),
        ("LEU", "OXT", {"CD1", "CD2"}),
        ("DA", "OP3", {"OP1", "OP2"}),
    ],
)
def test_pairs_that_chemistry_does_not_tell_apart(name, gone, pair):
    (swap,) = moved_atoms(name, without(name, gone))
    assert set(swap) == pair


@pytest.mark.parametrize("name", ["ASN", "GLN", "HIS", "ILE", "THR", "TRP", "ALA"])
def test_residues_without_equivalent_atoms(name):
    assert moved_atoms(name, without(name, "OXT")) == []


def test_a_sulfate_has_24_namings_and_the_order_in_use_comes_first():
    orders = equivalent_orders("SO4", component("SO4").atom_names)
    assert orders.shape == (24, 4)
    assert len({tuple(order) for order in orders.tolist()}) == 24
    assert (np.diff(orders[0]) > 0).all()


def test_a_centre_keeps_its_handedness():
    # Meso-tartrate has an R and an S half, each the other's mirror image: not to be exchanged.
    halves = [{"C1", "C4"} & set(order) for order in moved_atoms("SRT")]
    assert halves
    assert not any(halves)
    # The halves of L-tartrate are both R.
    assert any({"C1", "C4"} <= set(order) for order in moved_atoms("TLA"))


def test_no_more_than_a_thousand_namings():
    # Six terminal phosphates: 6^6 namings and more.
    assert len(equivalent_orders("IHP", component("IHP").atom_names)) == 1000


def test_atoms_that_a_crop_lacks_are_not_moved_to(features_of):
    features = features_of("3NZD")
    ligand = np.flatnonzero(features.is_ligand)
    kept = features.select(np.concatenate([np.arange(60), ligand[:5]]))
    for orders in symmetric_atoms(kept.layout):
        assert orders.max() < kept.num_atoms
        assert (np.sort(orders, axis=-1) == np.sort(orders[:, :1], axis=-1)).all()


def test_namings_keep_residue_and_element(any_sample, features_of):
    layout = features_of(any_sample).layout
    for orders in symmetric_atoms(layout):
        for column in (layout.chain_id, layout.residue_number, layout.element):
            assert (column[orders] == column[orders[:, :1]]).all()


def test_frames_of_residues_are_their_backbone(features_of):
    features = features_of("1LCD")
    atoms, valid = token_frames(features)
    names = features.layout.atom_name[atoms]
    protein, dna = features.is_protein & ~features.is_atom, features.is_dna & ~features.is_atom
    assert valid[protein | dna].all()
    assert (names[protein] == ["N", "CA", "C"]).all()
    assert (names[dna] == ["C1'", "C3'", "C4'"]).all()


def test_frames_of_single_atoms_are_the_nearest_of_their_own_molecule(features_of):
    features = features_of("3NZD")
    atoms, valid = token_frames(features)
    single = features.is_atom & valid
    assert single.any()
    assert (atoms[single, 1] == features.center_atom[single]).all()
    uid = features.ref_space_uid
    for a, b, c in atoms[single]:
        assert uid[a] == uid[b] == uid[c]
        d = np.linalg.norm(features.ref_pos[uid == uid[b]] - features.ref_pos[b], axis=-1)
        nearest = np.sort(d)[1:3]
        got = np.linalg.norm(features.ref_pos[[a, c]] - features.ref_pos[b], axis=-1)
        np.testing.assert_allclose(got, nearest)


def test_an_ion_has_no_frame_and_neither_have_atoms_in_line(features_of):
    ion = features_of("1LCD")
    _, valid = token_frames(ion)
    assert not valid[ion.is_ligand].any()
    features = features_of("3NZD")
    line = features.ref_pos.copy()
    line[:, 1:] = 0.0
    _, valid = token_frames(replace(features, ref_pos=line))
    assert not valid[features.is_atom].any()
    assert valid[~features.is_atom].all()


def test_copies_are_the_truth_of_the_other_chains(features_of):
    features = features_of("5UGO")
    positions, resolved = chain_copies(features, features)
    sym = features.sym_id[features.atom_to_token] - 1
    index = np.arange(features.num_atoms)
    assert np.array_equal(positions[sym, index], features.positions)
    assert np.array_equal(resolved[sym, index], features.resolved)


def test_a_crop_has_copies_that_it_left_out(features_of):
    whole = features_of("1A8O")
    first = np.flatnonzero(whole.sym_id == 1)[10:30]
    part = whole.select(first)
    positions, resolved = chain_copies(part, whole)
    rows = whole.sym_id[whole.atom_to_token] == 2
    wanted = dict(
        zip(
            zip(
                whole.layout.residue_number[rows].tolist(),
                whole.layout.atom_name[rows].tolist(),
                strict=True,
            ),
            whole.positions[rows],
            strict=True,
        )
    )
    for i, key in enumerate(
        zip(part.layout.residue_number.tolist(), part.layout.atom_name.tolist(), strict=True)
    ):
        if resolved[1, i]:
            np.testing.assert_array_equal(positions[1, i], wanted[key])
    assert resolved[1].any()
    assert not chain_copies(part, part)[1][1:].any()


def test_a_crop_of_another_structure_is_refused(features_of):
    with pytest.raises(ValueError, match="not a crop of whole"):
        chain_copies(features_of("1CRN"), features_of("1A8O"))


def test_bonds_of_ligands_follow_their_atoms(features_of):
    features = features_of("4CUP")
    atom = int(np.flatnonzero(features.is_ligand[features.atom_to_token])[0])
    bonds = np.array([[10, atom]], dtype=np.int32)
    bonded = replace(features, ligand_bonds=bonds)
    keep = np.unique(features.atom_to_token[[10, atom]])
    part = bonded.select(keep)
    ends = part.ligand_bonds[0]
    assert (part.layout.atom_name[ends] == features.layout.atom_name[bonds[0]]).all()
    assert bonded.select(keep[:1]).ligand_bonds.shape == (0, 2)


def test_resolution_is_that_of_the_entry_or_nan(features_of):
    assert make(features_of("3NZD")).resolution == pytest.approx(1.8)
    assert np.isnan(make(features_of("1AS5")).resolution)  # NMR


def test_padding_keeps_frames_and_copies(features_of):
    batch = make(crop(features_of("3NZD"), 40, generator=np.random.default_rng(0)))
    padded = pad_batch(batch, batch.num_tokens + 3, batch.num_atoms + 5)
    assert not padded.frame_mask[-3:].any()
    assert not padded.copy_resolved[:, -5:].any()
    assert padded.frame_atoms.shape == (batch.num_tokens + 3, 3)


def make(features):
    return make_batch(features, generator=np.random.default_rng(0), msa_rows=4)
