"""Structures written as mmCIF: read again by us and by others."""

from __future__ import annotations

import gzip
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
from Bio.PDB import MMCIFParser
from biotite.structure.io.pdbx import CIFFile, get_structure

from megafold.data import AtomLayout, predicted_structure, read_structure, write_mmcif


def test_what_is_written_is_read_again(any_sample, structure_of, tmp_path) -> None:
    structure = structure_of(any_sample)
    again = read_structure(write_mmcif(structure, tmp_path / f"{any_sample}.cif"))
    for field in fields(AtomLayout):
        np.testing.assert_array_equal(
            getattr(again.layout, field.name), getattr(structure.layout, field.name)
        )
    np.testing.assert_array_equal(again.resolved, structure.resolved)
    np.testing.assert_allclose(again.positions, structure.positions, atol=5.1e-4)
    np.testing.assert_array_equal(again.bonds, structure.bonds)
    assert again.chains == structure.chains
    assert not again.removed


@pytest.mark.parametrize("sample_id", ["1A8O", "1LCD", "102M", "4P5J"])
def test_biotite_and_biopython_read_the_same_atoms(sample_id, structure_of, tmp_path) -> None:
    structure = structure_of(sample_id)
    path = write_mmcif(structure, tmp_path / "entry.cif")
    expected = structure.positions[structure.resolved]
    atoms = get_structure(CIFFile.read(path), model=1)
    np.testing.assert_allclose(atoms.coord, expected, atol=5.1e-4)
    assert atoms.chain_id.tolist() == structure.layout.chain_id[structure.resolved].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = MMCIFParser(QUIET=True).get_structure("entry", str(path))
    coordinates = np.array([atom.coord for atom in theirs.get_atoms()])
    assert len(coordinates) == len(expected)
    order = [np.lexsort(np.round(c, 3).T) for c in (coordinates, expected)]
    np.testing.assert_allclose(coordinates[order[0]], expected[order[1]], atol=1.1e-3)


def test_gemmi_reads_chains_sequences_and_bonds(structure_of, tmp_path) -> None:
    gemmi = pytest.importorskip("gemmi")
    structure = structure_of("4ZXB")
    theirs = gemmi.read_structure(str(write_mmcif(structure, tmp_path / "entry.cif")))
    assert theirs[0].count_atom_sites() == structure.resolved.sum()
    assert len(theirs.connections) == len(structure.bonds)
    entity = theirs.get_entity("1")
    assert entity.full_sequence == list(structure.chains[0].components)


def test_a_compressed_file_is_written_where_the_name_says_so(structure_of, tmp_path) -> None:
    path = write_mmcif(structure_of("1CRN"), tmp_path / "new" / "1CRN.cif.gz")
    assert gzip.decompress(path.read_bytes()).startswith(b"data_1CRN")
    assert read_structure(path).chains == structure_of("1CRN").chains


def test_writing_twice_gives_the_same_bytes(structure_of, tmp_path) -> None:
    one, two = (write_mmcif(structure_of("102M"), tmp_path / name) for name in ("1.cif", "2.cif"))
    assert one.read_bytes() == two.read_bytes()


def test_a_prediction_has_every_atom(structure_of, tmp_path) -> None:
    layout = structure_of("2XHE").layout
    coordinates = np.random.default_rng(0).normal(size=(len(layout), 3)).astype(np.float32)
    structure = predicted_structure(layout, coordinates, name="guess")
    assert structure.resolved.all()
    assert structure.chains == structure_of("2XHE").chains
    path = write_mmcif(structure, tmp_path / "guess.cif")
    atoms = get_structure(CIFFile.read(path), model=1)
    np.testing.assert_allclose(atoms.coord, coordinates, atol=5.1e-4)


def test_a_prediction_of_a_crop_keeps_its_residue_numbers(features_of, tmp_path) -> None:
    crop = features_of("1A8O").select(np.arange(20, 110))
    structure = predicted_structure(crop.layout, crop.positions + 1)
    again = read_structure(write_mmcif(structure, tmp_path / "crop.cif"))
    numbers = [(c.chain_id, c.residue_numbers[0], c.residue_numbers[-1]) for c in again.chains]
    assert numbers == [("A", 1, 70), ("A-2", 1, 70)]  # one entity: the union of what is there
    np.testing.assert_allclose(
        again.positions[again.resolved], crop.positions[crop.resolved] + 1, atol=5.1e-4
    )


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda x: x[:-1], r"shape \(326, 3\), expected \(327, 3\)"),
        (lambda x: x[None], r"shape \(1, 327, 3\), expected \(327, 3\)"),
        (lambda x: np.where(x == x[5, 1], np.nan, x), "coordinates of atom 5 are not finite"),
    ],
)
def test_coordinates_that_do_not_fit_the_layout_are_refused(change, cause, structure_of) -> None:
    structure = structure_of("1CRN")
    with pytest.raises(ValueError, match=cause):
        predicted_structure(structure.layout, change(structure.positions.copy()))


def test_a_structure_without_atoms_is_not_written(structure_of, tmp_path) -> None:
    empty = replace(structure_of("1CRN"), resolved=np.zeros(327, dtype=bool))
    with pytest.raises(ValueError, match="1CRN: no resolved atom"):
        write_mmcif(empty, tmp_path / "empty.cif")
    assert not list(tmp_path.iterdir())


def test_b_factors_are_written_for_the_atoms_that_are(structure_of, tmp_path) -> None:
    structure = structure_of("1EMA")
    values = np.linspace(0, 100, len(structure.layout))
    path = write_mmcif(structure, tmp_path / "entry.cif", b_factors=values)
    atoms = get_structure(CIFFile.read(path), model=1, extra_fields=["b_factor"])
    np.testing.assert_allclose(atoms.b_factor, values[structure.resolved], atol=5.1e-3)
    for bad in (values[1:], np.full(len(values), np.nan)):
        with pytest.raises(ValueError, match="b_factors"):
            write_mmcif(structure, tmp_path / "bad.cif", b_factors=bad)
    assert not (tmp_path / "bad.cif").exists()


def test_a_name_with_spaces_is_written_so_that_others_read_it(structure_of, tmp_path) -> None:
    gemmi = pytest.importorskip("gemmi")
    structure = replace(structure_of("1CRN"), name="My fold (TEST)")
    path = write_mmcif(structure, tmp_path / "entry.cif")
    assert gemmi.cif.read(str(path)).sole_block().name == "My_fold_(TEST)"
    assert gemmi.read_structure(str(path))[0].count_atom_sites() == structure.resolved.sum()
