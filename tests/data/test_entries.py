"""Real entries against numbers counted by hand from their mmCIF text.

The counting used awk and grep on the files, nothing of this package:

- tokens: rows of ``_entity_poly_seq`` for each chain of ``_struct_asym``, less the modified ones
  (not among the 20 amino acids, MSE, and 8 nucleotides), plus the atoms of those and of ligands,
  times the operations of ``_pdbx_struct_assembly_gen``;
- resolved atoms: distinct (chain, residue, atom) among the ``ATOM`` and ``HETATM`` rows of model
  1, without H, D, HOH and crystallisation aids, times the operations;
- bonds of ligand tokens: a molecule of n atoms and r rings has n - 1 + r, rings counted on the
  drawn formula; plus the ``covale`` rows of ``_struct_conn`` that a ligand takes part in.

With ``MEGAFOLD_ENTRIES`` naming a folder of structure files, all of those are read as well.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from megafold.data import ExcludedError, featurize, read_structure, sample_path
from megafold.data.blocks import SUFFIXES

ENTRIES = Path(__file__).parent / "entries"

# Entry: tokens, resolved atoms, bonds of ligand tokens.
COUNTS = {
    # 46 residues, complete.
    "1CRN": (46, 327, 0),
    # Two strands of 12 nucleotides; 486 ATOM rows, all else is water.
    "1BNA": (2 * 12, 486, 0),
    # (10 nucleotides + 3 cobalt ions) twice; 202 ATOM rows and 3 ions, in two places or one.
    "4ZKK": (2 * (10 + 3), 2 * (202 + 3), 0),
    # 154 residues and haem: 43 atoms, 4 pyrroles and 4 rings closed by iron: 43 - 1 + 8.
    "102M": (154 + 43, 1220 + 43, 50),
    # 236 residues, one of them the chromophore CRO of 22 atoms; the six MSE are standard.
    "1EMA": (235 + 22, 1771, 0),
    # NDP: 48 atoms, 5 rings (adenine 2, riboses 2, nicotinamide); D2Q: 32 atoms, 3 rings.
    "3NZD": (186 + 48 + 32, 1479 + 23 + 48 + 32, (48 - 1 + 5) + (32 - 1 + 3)),
    # 86 nucleotides, one of them A23 of 25 atoms; 12 hexamines of 7, 2 magnesium, spermine of 14.
    "4P5J": (85 + 25 + 12 * 7 + 2 + 14, 1885, 12 * 6 + 13),
    # 5 + 11 + 16 nucleotides, 335 residues; 2PN of 9 atoms and 2 calcium ions.
    "5UGO": (5 + 11 + 16 + 335 + 9 + 2, 3193 + 66 + 9 + 2, 8),
    # (Five chains, 317 atoms of sugars) twice; each sugar is one ring; 25 covale rows.
    "4ZXB": (2 * (219 + 219 + 220 + 214 + 894 + 317), 2 * 12918, 2 * (317 + 25)),
    # (166 residues, GNP of 32 atoms and 3 rings, magnesium) twice.
    "721P-assembly1": (2 * (166 + 32 + 1), 2 * (1321 + 33), 2 * (32 - 1 + 3)),
}


def entry_path(name: str) -> Path:
    bundled = ENTRIES / f"{name}.cif.gz"
    return bundled if bundled.exists() else sample_path(name)


@pytest.mark.parametrize("name", COUNTS)
def test_tokens_atoms_and_bonds_are_those_counted_by_hand(name) -> None:
    features = featurize(read_structure(entry_path(name)))
    found = (features.num_tokens, int(features.resolved.sum()), len(features.bonds))
    assert found == COUNTS[name]


def test_binary_cif_as_the_archive_writes_it() -> None:
    """1GL4: 285 and 98 residues and a zinc ion, some of them unresolved; 174 waters."""
    structure = read_structure(ENTRIES / "1GL4.bcif.gz")
    assert [len(chain) for chain in structure.chains] == [285, 98, 1]
    assert structure.removed["atoms: water"] == 174
    assert structure.method == "X-RAY DIFFRACTION"
    assert structure.name == "1GL4"


def test_ligands_that_a_file_numbers_as_residues_are_molecules_of_their_own() -> None:
    structure = read_structure(ENTRIES / "721P-assembly1.cif.gz")
    kinds = [(c.chain_id, c.chain_type, c.components) for c in structure.chains if len(c) == 1]
    assert kinds == [
        ("A_167", "ligand", ("MG",)), ("A_168", "ligand", ("GNP",)),
        ("B_167", "ligand", ("MG",)), ("B_168", "ligand", ("GNP",)),
    ]  # fmt: skip


def test_a_covalent_ligand_keeps_its_bond() -> None:
    structure = read_structure(ENTRIES / "4I39.cif.gz")
    layout = structure.layout
    (bond,) = structure.bonds
    assert sorted(f"{layout.residue_name[a]}.{layout.atom_name[a]}" for a in bond) == [
        "CYS.SG", "HC4.C1",
    ]  # fmt: skip
    features = featurize(structure)
    (pair,) = features.ligand_bonds
    assert set(layout.residue_name[pair].tolist()) == {"CYS", "HC4"}
    mixed = features.is_ligand[features.bonds].sum(axis=1) == 1
    assert mixed.sum() == 1


def _folder_entries() -> list:
    folder = os.environ.get("MEGAFOLD_ENTRIES")
    endings = tuple(end for suffix in SUFFIXES for end in (suffix, f"{suffix}.gz"))
    if not folder:
        skip = pytest.mark.skip(reason="MEGAFOLD_ENTRIES names no folder of structure files")
        return [pytest.param(Path("none"), marks=skip)]
    return [path for path in sorted(Path(folder).iterdir()) if path.name.endswith(endings)]


@pytest.mark.parametrize("path", _folder_entries(), ids=lambda path: path.name)
def test_every_entry_of_a_folder_goes_through_or_says_which_rule_excludes_it(path) -> None:
    try:
        structure = read_structure(path)
    except ExcludedError as error:
        assert "nothing left after cleaning (removed: {" in str(error)  # noqa: PT017
        return
    features = featurize(structure)
    assert np.isfinite(features.positions).all()
    assert np.isfinite(features.ref_pos).all()
    assert features.resolved.any()
    assert len(structure.chains) == features.asym_id.max()
