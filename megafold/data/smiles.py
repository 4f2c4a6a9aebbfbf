"""Ligands that no dictionary has: components made from SMILES.

A component is looked up by name everywhere, so one from SMILES is given a name. It follows from
the SMILES alone: the same text has the same name in every process.
"""

from __future__ import annotations

import base64
import hashlib

import numpy as np
from biotite.structure.info.ccd import get_from_ccd
from rdkit import Chem
from rdkit.Chem import rdDistGeom
from rdkit.rdBase import BlockLogs

from megafold.data.errors import DataError

_NAME_LENGTH = 5  # of a component, at most; what three- to five-letter codes of the wwPDB have
_ATOM_NAME_LENGTH = 4  # at most; the model reads no more

_smiles_of: dict[str, str] = {}


def define_smiles(smiles: str) -> str:
    """Make a component of a SMILES string known, and return its name (``L`` and four letters).

    Raises:
        DataError: It is no SMILES, has an atom that is no element or more atoms of an element
            than there are names for, or RDKit finds no conformer of it.
    """
    digest = base64.b32encode(hashlib.sha256(smiles.encode()).digest()).decode()
    name = "L" + digest[: _NAME_LENGTH - 1]
    if _smiles_of.get(name, smiles) != smiles or get_from_ccd("chem_comp_atom", name) is not None:
        raise DataError(f"SMILES {smiles!r}: its name {name} is taken; write it another way")
    if name not in _smiles_of:
        molecule_from_smiles(smiles)  # whether it can be built, before it is known
        _smiles_of[name] = smiles
    return name


def smiles_of(name: str) -> str | None:
    """The SMILES of a component that ``define_smiles`` made known; None for any other."""
    return _smiles_of.get(name)


def molecule_from_smiles(smiles: str, seed: int = 0, attempts: int = 50) -> Chem.Mol:
    """The heavy atoms, in the order of the SMILES, with an ETKDGv3 conformer and names.

    Names are the element and a number, as in ``C1``, ``C2``, ``O1``; property ``name``.
    """
    with BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
        if molecule is None or molecule.GetNumAtoms() == 0:
            raise DataError(f"{smiles!r} is no SMILES that RDKit understands")
        if any(atom.GetAtomicNum() == 0 for atom in molecule.GetAtoms()):
            raise DataError(f"SMILES {smiles!r} has an atom that is no element (*)")
        full = Chem.AddHs(molecule)
        parameters = rdDistGeom.ETKDGv3()
        parameters.randomSeed, parameters.maxIterations = seed, attempts
        if rdDistGeom.EmbedMolecule(full, parameters) < 0:
            raise DataError(f"SMILES {smiles!r}: RDKit finds no conformer")
        molecule = Chem.RemoveAllHs(full)
    counts: dict[str, int] = {}
    for atom in molecule.GetAtoms():
        symbol = atom.GetSymbol().upper()
        counts[symbol] = counts.get(symbol, 0) + 1
        name = f"{symbol}{counts[symbol]}"
        if len(name) > _ATOM_NAME_LENGTH:
            raise DataError(f"SMILES {smiles!r}: too many atoms of {symbol}, {name} is no name")
        atom.SetProp("name", name)
    return molecule


def conformer_of(molecule: Chem.Mol) -> np.ndarray:
    """Coordinates of the heavy atoms. [n, 3] float32, angstrom."""
    return molecule.GetConformer().GetPositions().astype(np.float32)
