"""Chemical components: which heavy atoms a residue has, and a reference conformer of them.

Atoms, bonds and ideal coordinates come from the wwPDB chemical component dictionary (CCD)
that biotite carries, so nothing is downloaded. Conformers are made by RDKit's ETKDGv3, as
AlphaFold 3 makes them (supplement, section 2.8).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from biotite.interface.rdkit import to_mol
from biotite.structure import AtomArray, BondList, BondType
from biotite.structure.info.ccd import get_from_ccd
from rdkit import Chem
from rdkit.Chem import rdDistGeom
from rdkit.rdBase import BlockLogs

from megafold.data.errors import DataError
from megafold.data.smiles import conformer_of, molecule_from_smiles, smiles_of

CONFORMER_SEED = 0
# Enough for drug-like molecules; without a limit RDKit tries chlorophyll for twelve seconds.
CONFORMER_ATTEMPTS = 50

_HYDROGENS = ("H", "D")
_BOND_TYPES = {
    "SING": BondType.SINGLE,
    "DOUB": BondType.DOUBLE,
    "TRIP": BondType.TRIPLE,
    "QUAD": BondType.QUADRUPLE,
}


@dataclass(frozen=True)
class Component:
    """One entry of the chemical component dictionary, heavy atoms only (n of them)."""

    name: str
    kind: str  # CCD type in capitals, for example L-PEPTIDE LINKING
    letter: str  # one-letter code of the standard parent residue, X where there is none
    atom_names: tuple[str, ...]  # [n]
    elements: tuple[str, ...]  # [n], symbols in capitals
    charges: np.ndarray  # [n] float32, formal
    leaving: np.ndarray  # [n] bool, lost when the component is bonded
    bonds: np.ndarray  # [b, 2] int64, pairs of atoms bonded within the component

    def __len__(self) -> int:
        return len(self.atom_names)


@dataclass(frozen=True)
class Conformer:
    """Reference coordinates of a component's heavy atoms."""

    positions: np.ndarray  # [n, 3] float32, angstrom; zero where there is none
    mask: np.ndarray  # [n] bool
    source: str  # etkdg, ideal (CCD coordinates), single atom (at the origin) or none


def known_component(name: str) -> bool:
    """Whether the dictionary has the component, with at least one atom."""
    return get_from_ccd("chem_comp_atom", name) is not None


@lru_cache(maxsize=4096)
def component(name: str) -> Component:
    """The component called ``name`` (``ALA``, ``DG``, ``ATP``, ...).

    Raises:
        DataError: The dictionary has no such component, and ``smiles.define_smiles`` made none.
    """
    if (smiles := smiles_of(name)) is not None:
        return _component_from_smiles(name, smiles)
    if not known_component(name):
        raise DataError(
            f"component {name!r} is not in the chemical component dictionary bundled with biotite"
        )
    atoms = get_from_ccd("chem_comp_atom", name)
    names = atoms["atom_id"].as_array(str)
    elements = np.char.upper(atoms["type_symbol"].as_array(str))
    heavy = ~np.isin(elements, _HYDROGENS)
    first, second, _ = _bond_table(name)
    kept = {atom: i for i, atom in enumerate(names[heavy])}
    bonds = [(kept[a], kept[b]) for a, b in zip(first, second, strict=True) if {a, b} <= set(kept)]
    return Component(
        name=name,
        kind=get_from_ccd("chem_comp", name, "type").as_item().upper(),
        letter=_letter(name),
        atom_names=tuple(names[heavy].tolist()),
        elements=tuple(elements[heavy].tolist()),
        charges=atoms["charge"].as_array(np.float32, 0.0)[heavy],
        leaving=atoms["pdbx_leaving_atom_flag"].as_array(str)[heavy] == "Y",
        bonds=np.array(bonds, dtype=np.int64).reshape(-1, 2),
    )


@lru_cache(maxsize=4096)
def reference_conformer(name: str) -> Conformer:
    """A conformer of component ``name``, the same at every call.

    ETKDGv3 with a fixed seed on the molecule with its hydrogens; where that fails, the
    dictionary's ideal coordinates; atoms that have neither are False in ``mask``.
    """
    if (smiles := smiles_of(name)) is not None:
        positions = conformer_of(molecule_from_smiles(smiles, CONFORMER_SEED, CONFORMER_ATTEMPTS))
        source = "single atom" if len(positions) == 1 else "etkdg"
        return Conformer(positions, np.ones(len(positions), dtype=bool), source)
    heavy = ~np.isin(_all_elements(name), _HYDROGENS)
    if len(heavy) == 1:
        return Conformer(np.zeros((1, 3), dtype=np.float32), np.ones(1, dtype=bool), "single atom")
    embedded = _embed(name)
    if embedded is not None:
        return Conformer(embedded[heavy], np.ones(heavy.sum(), dtype=bool), "etkdg")
    ideal = _ideal_positions(name)[heavy]
    mask = np.isfinite(ideal).all(axis=-1)
    source = "ideal" if mask.any() else "none"
    return Conformer(np.where(mask[:, None], ideal, 0.0).astype(np.float32), mask, source)


def _component_from_smiles(name: str, smiles: str) -> Component:
    molecule = molecule_from_smiles(smiles, CONFORMER_SEED, CONFORMER_ATTEMPTS)
    atoms = list(molecule.GetAtoms())
    bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()]
    return Component(
        name=name,
        kind="NON-POLYMER",
        letter="X",
        atom_names=tuple(atom.GetProp("name") for atom in atoms),
        elements=tuple(atom.GetSymbol().upper() for atom in atoms),
        charges=np.array([atom.GetFormalCharge() for atom in atoms], dtype=np.float32),
        leaving=np.zeros(len(atoms), dtype=bool),
        bonds=np.array(bonds, dtype=np.int64).reshape(-1, 2),
    )


def _letter(name: str) -> str:
    column = get_from_ccd("chem_comp", name, "one_letter_code")
    letter = column.as_array(str, "X")[0]
    return letter if len(letter) == 1 and letter.isalpha() else "X"


def _all_elements(name: str) -> np.ndarray:
    return np.char.upper(get_from_ccd("chem_comp_atom", name)["type_symbol"].as_array(str))


def _ideal_positions(name: str) -> np.ndarray:
    """Ideal coordinates of all atoms, hydrogens too, NaN where missing. [n, 3] float32."""
    atoms = get_from_ccd("chem_comp_atom", name)
    columns = [f"pdbx_model_Cartn_{axis}_ideal" for axis in "xyz"]
    return np.stack([atoms[c].as_array(np.float32, np.nan) for c in columns], axis=-1)


def _bond_table(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    bonds = get_from_ccd("chem_comp_bond", name)
    if bonds is None:  # a single atom, such as an ion
        empty = np.empty(0, dtype=str)
        return empty, empty, empty
    columns = ("atom_id_1", "atom_id_2", "value_order")
    return tuple(bonds[c].as_array(str) for c in columns)


def _embed(name: str) -> np.ndarray | None:
    """ETKDGv3 coordinates of all atoms, hydrogens too, or None where RDKit finds none."""
    atoms = get_from_ccd("chem_comp_atom", name)
    names = atoms["atom_id"].as_array(str)
    array = AtomArray(len(names))
    array.atom_name = names
    array.element = _all_elements(name)
    array.set_annotation("charge", atoms["charge"].as_array(int, 0))
    ideal = _ideal_positions(name)
    array.coord = np.nan_to_num(ideal)
    index = {atom: i for i, atom in enumerate(names)}
    table = zip(*_bond_table(name), strict=True)
    bonds = [(index[a], index[b], _BOND_TYPES.get(order, BondType.ANY)) for a, b, order in table]
    array.bonds = BondList(len(names), np.array(bonds, dtype=np.int64).reshape(-1, 3))
    with BlockLogs():
        try:
            molecule = to_mol(array, explicit_hydrogen=bool((array.element == "H").any()))
            Chem.SanitizeMol(molecule)
            if np.isfinite(ideal).all():
                Chem.AssignStereochemistryFrom3D(molecule)
            molecule.RemoveAllConformers()
            parameters = rdDistGeom.ETKDGv3()
            parameters.randomSeed = CONFORMER_SEED
            parameters.maxIterations = CONFORMER_ATTEMPTS
            if rdDistGeom.EmbedMolecule(molecule, parameters) < 0:
                return None
        except (RuntimeError, ValueError):  # RDKit's chemistry errors derive from ValueError
            return None
        return molecule.GetConformer().GetPositions().astype(np.float32)
