"""Which atoms and chains of a deposited entry a model should see.

After AlphaFold 3 (supplement, section 2.1). ``read.py`` applies these rules in this order.
"""

from __future__ import annotations

import numpy as np
from biotite.structure import AtomArray

WATERS = ("HOH", "DOD", "WAT")
# Atoms or residues whose chemistry the depositors did not know: nothing to build from.
UNKNOWN_COMPONENTS = ("UNX", "UNL")
# AlphaFold 3, supplement, table 9. Removed from crystal structures only.
CRYSTALLISATION_AIDS = (
    "SO4", "GOL", "EDO", "PO4", "ACT", "PEG", "DMS", "TRS",
    "PGE", "PG4", "FMT", "EPE", "MPD", "MES", "CD", "IOD",
)  # fmt: skip
MIN_RESOLVED_RESIDUES = 4
MAX_CA_DISTANCE = 10.0  # angstrom, between consecutive residues


def unwanted_atoms(atoms: AtomArray, method: str) -> dict[str, np.ndarray]:
    """Masks of the atoms to leave out, by reason. Each [n] bool; they do not overlap."""
    rules = {
        "water": np.isin(atoms.res_name, WATERS),
        "hydrogen": np.isin(atoms.element, ("H", "D")),
        "unknown component": np.isin(atoms.res_name, UNKNOWN_COMPONENTS),
    }
    if "X-RAY" in method:
        rules["crystallisation aid"] = np.isin(atoms.res_name, CRYSTALLISATION_AIDS)
    taken = np.zeros(len(atoms), dtype=bool)
    masks = {}
    for reason, mask in rules.items():
        masks[reason] = mask & ~taken
        taken |= mask
    return masks


def selenomethionine_to_methionine(atoms: AtomArray) -> AtomArray:
    """MSE written as MET, its selenium as sulphur."""
    atoms = atoms.copy()
    selenium = (atoms.res_name == "MSE") & (atoms.atom_name == "SE")
    atoms.atom_name[selenium] = "SD"
    atoms.element[selenium] = "S"
    atoms.res_name[atoms.res_name == "MSE"] = "MET"
    return atoms


def fix_arginine(positions: dict[str, np.ndarray]) -> None:
    """Name the guanidinium nitrogens so that NH1 is the one closer to CD, in place.

    ``positions`` gives the coordinates of each resolved atom of one arginine.
    """
    if {"CD", "NH1", "NH2"} <= positions.keys():
        cd, nh1, nh2 = (positions[name] for name in ("CD", "NH1", "NH2"))
        if np.linalg.norm(nh2 - cd) < np.linalg.norm(nh1 - cd):
            positions["NH1"], positions["NH2"] = nh2, nh1


def chain_fault(
    chain_type: str, components: list[str], numbers: np.ndarray, ca: np.ndarray, seen: int
) -> str | None:
    """Why a polymer chain should be left out, or None.

    Args:
        chain_type: protein, rna or dna.
        components: Component of each residue.
        numbers: [r] position of each residue in the sequence.
        ca: [r, 3] coordinates of CA, NaN where unresolved.
        seen: How many residues have a resolved atom.
    """
    if set(components) <= {"UNK", "N", "DN"}:
        return "chain of unknown residues"
    if seen < MIN_RESOLVED_RESIDUES:
        return "chain with fewer than 4 resolved residues"
    if chain_type == "protein":
        step = np.linalg.norm(np.diff(ca, axis=0), axis=-1)
        with np.errstate(invalid="ignore"):
            if ((step > MAX_CA_DISTANCE) & (np.diff(numbers) == 1)).any():
                return "protein chain with a gap over 10 A between neighbours"
    return None
