"""``read_structure``: what is kept, what is cleaned away, and against another parser."""

from __future__ import annotations

import gzip
import re
import warnings

import numpy as np
import pytest
from Bio.PDB import MMCIFParser
from biotite.structure.io.pdbx import (
    BinaryCIFBlock,
    BinaryCIFCategory,
    BinaryCIFFile,
    CIFFile,
)

from megafold.data import Structure, read_structure, sample_path


def _rows(structure: Structure, **wanted) -> np.ndarray:
    keep = np.ones(len(structure.layout), dtype=bool)
    for name, value in wanted.items():
        keep &= getattr(structure.layout, name) == value
    return np.flatnonzero(keep)


# Entries whose first assembly is the asymmetric unit, so that Biopython sees the same atoms.
@pytest.mark.parametrize("sample_id", ["1CRN", "1AS5", "1LCD", "5UGO", "3NZD", "2XHE", "4P5J"])
def test_polymer_coordinates_are_those_that_biopython_reads(sample_id, structure_of, tmp_path):
    path = tmp_path / "entry.cif"
    path.write_bytes(gzip.decompress(sample_path(sample_id).read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = MMCIFParser(QUIET=True, auth_chains=False, auth_residues=False)
        model = next(iter(parser.get_structure("entry", str(path))))
    theirs = {
        (chain.id, residue.id[1], atom.get_name()): atom.coord
        for chain in model
        for residue in chain
        for atom in residue
        if atom.element not in ("H", "D")
    }
    structure = structure_of(sample_id)
    layout, compared = structure.layout, 0
    for i in np.flatnonzero(structure.resolved & (layout.chain_type != "ligand")):
        if layout.residue_name[i] == "ARG" and layout.atom_name[i] in ("NH1", "NH2"):
            continue  # renamed by distance
        key = (layout.chain_id[i], layout.residue_number[i], layout.atom_name[i])
        np.testing.assert_allclose(structure.positions[i], theirs[key], atol=1e-3)
        compared += 1
    polymer_atoms = {
        (c.chain_id, n) for c in structure.chains if c.chain_type != "ligand"
        for n in c.residue_numbers
    }  # fmt: skip
    expected = sum((chain, number) in polymer_atoms for chain, number, _ in theirs)
    arginine_nitrogens = sum(
        1 for chain, number, atom in theirs
        if atom in ("NH1", "NH2") and (chain, number) in polymer_atoms
    )  # fmt: skip
    assert compared == expected - arginine_nitrogens


def test_no_atom_is_without_a_finite_coordinate(any_sample, structure_of) -> None:
    structure = structure_of(any_sample)
    assert np.isfinite(structure.positions).all()
    assert not structure.positions[~structure.resolved].any()


def test_every_residue_has_all_its_heavy_atoms(any_sample, structure_of) -> None:
    structure = structure_of(any_sample)
    layout = structure.layout
    assert not np.isin(layout.element, ("H", "D")).any()
    alanine = _rows(structure, residue_name="ALA", chain_type="protein")
    names = set(layout.atom_name[alanine].tolist())
    assert names <= {"N", "CA", "C", "O", "CB", "OXT"}


def test_unresolved_residues_are_kept_as_many_as_the_depositors_list(structure_of) -> None:
    text = gzip.decompress(sample_path("2XHE").read_bytes()).decode()
    listed = CIFFile.deserialize(text).block["pdbx_unobs_or_zero_occ_residues"].row_count
    structure = structure_of("2XHE")
    seen = np.add.reduceat(structure.resolved, structure.residue_starts)
    assert [len(chain) for chain in structure.chains] == [650, 279]
    assert (seen == 0).sum() == listed > 0


def test_the_terminal_oxygen_stands_at_the_end_of_a_protein_only(structure_of) -> None:
    structure = structure_of("1A8O")
    oxt = _rows(structure, atom_name="OXT")
    assert structure.layout.residue_number[oxt].tolist() == [70, 70]


def test_selenomethionine_is_read_as_methionine(structure_of) -> None:
    assert "MSE" in gzip.decompress(sample_path("1A8O").read_bytes()).decode()
    structure = structure_of("1A8O")
    assert "MSE" not in structure.layout.residue_name
    sulphur = _rows(structure, residue_name="MET", atom_name="SD")
    assert len(sulphur) == 8  # four in each copy
    assert set(structure.layout.element[sulphur].tolist()) == {"S"}
    assert structure.resolved[sulphur].all()


def test_the_first_assembly_is_built_by_symmetry(structure_of) -> None:
    structure = structure_of("1A8O")
    assert [chain.chain_id for chain in structure.chains] == ["A", "A-2"]
    assert [chain.sym_id for chain in structure.chains] == [1, 2]
    assert [chain.entity_id for chain in structure.chains] == [1, 1]
    first, second = (structure.positions[structure.layout.chain_id == c] for c in ("A", "A-2"))
    inner = [np.linalg.norm(p[:, None] - p[None], axis=-1) for p in (first, second)]
    np.testing.assert_allclose(*inner, atol=1e-3)
    assert np.abs(first - second).max() > 1


def test_an_nmr_entry_gives_its_first_model(structure_of) -> None:
    text = gzip.decompress(sample_path("1AS5").read_bytes()).decode()
    first = next(line for line in text.splitlines() if line.startswith("ATOM"))
    structure = structure_of("1AS5")
    assert len(structure.layout) == 185
    assert [f"{x:.3f}" for x in structure.positions[0]] == first.split()[10:13]


def test_waters_go_and_are_counted(structure_of) -> None:
    structure = structure_of("102M")
    assert "HOH" not in structure.layout.residue_name
    assert structure.removed["atoms: water"] == 155


def test_crystallisation_aids_leave_crystal_structures_only(structure_of, write_cif) -> None:
    text = gzip.decompress(sample_path("102M").read_bytes()).decode()
    assert structure_of("102M").removed["atoms: crystallisation aid"] == 5
    assert "SO4" not in structure_of("102M").layout.residue_name
    solution = write_cif("NMR.cif", text.replace("'X-RAY DIFFRACTION'", "'SOLUTION NMR'"))
    assert "SO4" in read_structure(solution).layout.residue_name


def test_the_more_occupied_location_is_taken(cif_text, write_cif) -> None:
    line = next(s for s in cif_text.splitlines() if re.match(r"ATOM +5 +C +CB", s))
    fields = line.split()
    assert fields[13] == "1.00"

    def location(letter: str, x: str, occupancy: str) -> str:
        changed = [*fields]
        changed[4], changed[10], changed[13] = letter, x, occupancy
        return " ".join(changed)

    both = f"{location('A', '1.000', '0.30')}\n{location('B', '2.000', '0.70')}"
    structure = read_structure(write_cif("ALT.cif", cif_text.replace(line, both)))
    beta = _rows(structure, residue_number=1, atom_name="CB")
    assert structure.positions[beta, 0].tolist() == [2.0]


@pytest.mark.parametrize("in_blocks", [False, True])
def test_where_the_sequence_varies_the_more_occupied_residue_is_taken(
    in_blocks, cif_text, write_cif
) -> None:
    """Residue 1 of crambin as threonine (0.4) and, at the same place, serine (0.6)."""
    lines, waiting = [], []
    for line in cif_text.splitlines():
        fields = line.split()
        is_first = line.startswith("ATOM") and fields[8] == "1"
        if not is_first:
            lines += waiting
            waiting = []
        if is_first:
            fields[4], fields[13] = "A", "0.40"
            lines.append(" ".join(fields))
            if fields[3] in ("N", "CA", "C", "O", "CB", "OG1"):
                fields[3] = fields[3].replace("OG1", "OG")
                fields[4], fields[5], fields[13] = "B", "SER", "0.60"
                (waiting if in_blocks else lines).append(" ".join(fields))
        elif fields == ["1", "1", "THR", "n"]:
            lines += ["1 1 THR y", "1 1 SER y"]
        else:
            lines.append(line)
    structure = read_structure(write_cif("HETERO.cif", "\n".join(lines) + "\n"))
    first = _rows(structure, residue_number=1)
    assert set(structure.layout.residue_name[first].tolist()) == {"SER"}
    assert structure.layout.atom_name[first].tolist() == ["N", "CA", "C", "O", "CB", "OG"]
    assert structure.resolved[first].all()
    assert len(structure.chains[0]) == 46


def test_arginine_nh1_is_the_nitrogen_nearer_to_cd(any_sample, structure_of) -> None:
    structure = structure_of(any_sample)
    layout = structure.layout
    rows = {name: _rows(structure, residue_name="ARG", atom_name=name)
            for name in ("CD", "NH1", "NH2")}  # fmt: skip
    whole = np.logical_and.reduce([structure.resolved[r] for r in rows.values()])
    cd, nh1, nh2 = (structure.positions[r[whole]] for r in rows.values())
    assert (np.linalg.norm(nh1 - cd, axis=-1) <= np.linalg.norm(nh2 - cd, axis=-1)).all()
    assert len(layout.chain_id) == len(structure.resolved)


def test_arginine_nitrogens_named_the_other_way_are_swapped(structure_of, write_cif) -> None:
    text = gzip.decompress(sample_path("1A8O").read_bytes()).decode()
    swapped = re.sub(r"\bNH([12])\b( +\S+ +ARG)", lambda m: f"NH{3 - int(m[1])}{m[2]}", text)
    assert swapped != text
    structure = read_structure(write_cif("SWAP.cif", swapped))
    np.testing.assert_array_equal(structure.positions, structure_of("1A8O").positions)


def test_a_bonded_sugar_loses_its_leaving_oxygen(structure_of) -> None:
    structure = structure_of("4ZXB")
    layout = structure.layout
    linked = {(layout.chain_id[a], layout.residue_number[a])
              for a in structure.bonds.ravel() if layout.atom_name[a] == "C1"}  # fmt: skip
    assert linked
    for row in _rows(structure, residue_name="NAG", atom_name="C1"):
        key = (layout.chain_id[row], layout.residue_number[row])
        oxygens = _rows(structure, chain_id=key[0], residue_number=key[1], atom_name="O1")
        assert len(oxygens) == (0 if key in linked else 1)


def test_covalent_bonds_join_sugars_to_each_other_and_to_asparagine(structure_of) -> None:
    structure = structure_of("4ZXB")
    layout = structure.layout
    ends = [
        tuple(sorted(f"{layout.residue_name[a]}.{layout.atom_name[a]}" for a in bond))
        for bond in structure.bonds
    ]
    assert ("ASN.ND2", "NAG.C1") in ends
    assert ("NAG.C1", "NAG.O4") in ends
    length = np.linalg.norm(np.diff(structure.positions[structure.bonds], axis=1), axis=-1)
    assert (length < 2.4).all()


def test_a_binary_file_gives_the_same_structure(tmp_path, structure_of) -> None:
    source = gzip.decompress(sample_path("1CRN").read_bytes()).decode()
    block = CIFFile.deserialize(source).block
    binary = BinaryCIFBlock(
        {
            name: BinaryCIFCategory(
                {column: block[name][column].as_array(str) for column in block[name]}
            )
            for name in ("atom_site", "entity_poly", "entity_poly_seq", "exptl")
        }
    )
    file = BinaryCIFFile({"1CRN": binary})
    file.write(path := tmp_path / "1CRN.bcif")
    structure = read_structure(path)
    np.testing.assert_array_equal(structure.positions, structure_of("1CRN").positions)


def test_what_the_entry_says_about_itself_is_kept(structure_of) -> None:
    structure = structure_of("5UGO")
    assert structure.method == "X-RAY DIFFRACTION"
    assert structure.resolution == 1.897
    assert structure.release_date == "2017-07-26"
    assert structure.title == "DNA polymerase beta nick complex with imidodiphosphate"
