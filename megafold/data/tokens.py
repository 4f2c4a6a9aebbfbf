"""``Structure`` to tokens (AlphaFold 3, supplement, section 2.6).

A standard residue is one token. A modified residue and every ligand, ion and glycan is one
token per heavy atom.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from megafold.data.assemble import STANDARD_RESIDUES
from megafold.data.components import component
from megafold.data.constants import (
    AMINO_ACIDS,
    PURINES,
    RESTYPE_INDEX,
    UNKNOWN_DNA,
    UNKNOWN_PROTEIN,
    UNKNOWN_RNA,
)
from megafold.data.structure import DNA, LIGAND, PROTEIN, RNA, Structure

_LETTER_TO_AMINO_ACID = dict(zip("ARNDCQEGHILKMFPSTWYV", AMINO_ACIDS, strict=True))
# One-letter code of each class of constants.RESTYPES.
LETTERS = "ARNDCQEGHILKMFPSTWYVX" + "AGCUN" + "AGCTN" + "-"
_UNKNOWN = {PROTEIN: UNKNOWN_PROTEIN, RNA: UNKNOWN_RNA, DNA: UNKNOWN_DNA}


@dataclass(frozen=True)
class Tokens:
    """The tokens of a structure; N of them over A atoms. All ids count from 1."""

    atom_to_token: np.ndarray  # [A] int32, never decreases
    residue_index: np.ndarray  # [N] int32, position in the chain's sequence, from 1
    asym_id: np.ndarray  # [N] int32, one per chain
    entity_id: np.ndarray  # [N] int32, one per distinct sequence or molecule
    sym_id: np.ndarray  # [N] int32, copy number within the entity
    restype: np.ndarray  # [N] int32, class of constants.RESTYPES
    is_protein: np.ndarray  # [N] bool
    is_rna: np.ndarray  # [N] bool
    is_dna: np.ndarray  # [N] bool
    is_ligand: np.ndarray  # [N] bool
    is_atom: np.ndarray  # [N] bool, the token is a single atom
    center_atom: np.ndarray  # [N] int32, row of the centre atom
    representative_atom: np.ndarray  # [N] int32, row of the distogram atom

    def __len__(self) -> int:
        return len(self.restype)

    def __repr__(self) -> str:
        kinds = {f.name[3:]: int(getattr(self, f.name).sum())
                 for f in fields(self) if f.name.startswith("is_")}  # fmt: skip
        counts = ", ".join(f"{number} {kind}" for kind, number in kinds.items() if number)
        return f"Tokens({len(self)}: {counts}; {len(self.atom_to_token)} atoms)"


def restype_class(name: str, chain_type: str) -> int:
    """Class of a component in a chain of the given type; a modified residue is its parent.

    Ligands count as unknown amino acid.
    """
    if chain_type == LIGAND:
        return RESTYPE_INDEX[UNKNOWN_PROTEIN]
    if name not in STANDARD_RESIDUES[chain_type]:
        letter = component(name).letter
        name = {
            PROTEIN: _LETTER_TO_AMINO_ACID.get(letter, ""),
            RNA: letter,
            DNA: "D" + letter,
        }[chain_type]
    if name not in STANDARD_RESIDUES[chain_type]:
        name = _UNKNOWN[chain_type]
    return RESTYPE_INDEX[name]


def tokenize(structure: Structure) -> Tokens:
    """Split a structure into tokens, in the order of its atoms."""
    layout, starts = structure.layout, structure.residue_starts
    ends = np.append(starts[1:], len(layout))
    chain_rows = {
        chain.chain_id: (asym, chain.sym_id) for asym, chain in enumerate(structure.chains, start=1)
    }
    rows: dict[str, list[int]] = {f.name: [] for f in fields(Tokens)}
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        name, kind = str(layout.residue_name[start]), str(layout.chain_type[start])
        standard = name in STANDARD_RESIDUES[kind]
        pieces = [(start, end)] if standard else [(i, i + 1) for i in range(start, end)]
        restype = restype_class(name, kind)
        asym, sym = chain_rows[str(layout.chain_id[start])]
        for first, last in pieces:
            token = len(rows["restype"])
            names = layout.atom_name[first:last].tolist()
            centre, representative = (
                _residue_atoms(name, kind, names) if standard else (names[0], names[0])
            )
            rows["atom_to_token"].extend([token] * (last - first))
            rows["residue_index"].append(int(layout.residue_number[start]))
            rows["asym_id"].append(asym)
            rows["entity_id"].append(int(layout.entity_id[start]))
            rows["sym_id"].append(sym)
            rows["restype"].append(restype)
            for flag in (PROTEIN, RNA, DNA, LIGAND):
                rows[f"is_{flag}"].append(kind == flag)
            rows["is_atom"].append(not standard)
            rows["center_atom"].append(first + names.index(centre))
            rows["representative_atom"].append(first + names.index(representative))
    return Tokens(
        **{
            name: np.array(values, dtype=bool if name.startswith("is_") else np.int32)
            for name, values in rows.items()
        }
    )


def _residue_atoms(name: str, chain_type: str, names: list[str]) -> tuple[str, str]:
    """Centre and representative atom of a standard residue."""
    if chain_type == PROTEIN:
        return "CA", "CB" if "CB" in names else "CA"
    return "C1'", "C4" if name in PURINES else "C2"
