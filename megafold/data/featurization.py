"""``Structure`` and alignments to ``Features`` (AlphaFold 3, supplement, table 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from biotite.structure import CellList
from rdkit import Chem

from megafold.data.alignment import Alignment
from megafold.data.components import component, reference_conformer
from megafold.data.cropping import INTERFACE_DISTANCE
from megafold.data.features import Features
from megafold.data.msa_features import alignment_features
from megafold.data.structure import Structure
from megafold.data.template_chains import Template, template_arrays
from megafold.data.tokens import Tokens, tokenize


def featurize(
    structure: Structure,
    alignments: Mapping[str, Alignment] | None = None,
    *,
    to_pair: Mapping[str, Alignment] | None = None,
    templates: Mapping[str, Sequence[Template]] | None = None,
) -> Features:
    """Work out everything deterministic about a structure.

    Args:
        structure: As ``read_structure`` gives it.
        alignments: Alignment by chain id. The one given for the first chain of an entity serves
            all its chains; a chain without one has its own sequence as the only row.
        to_pair: Alignments whose rows are paired across chains by species, where those are not
            the main ones, such as of a search in UniProt.
        templates: By chain id, the best first; the first 20 are kept. As with alignments, those
            of an entity's first chain serve all.

    Raises:
        DataError: An alignment is for a chain that is not there or no polymer, its query is not
            the chain's sequence, or a template has not the length of its chain.
    """
    tokens = tokenize(structure)
    return Features(
        token_index=np.arange(len(tokens), dtype=np.int32),
        **{
            name: getattr(tokens, name)
            for name in (
                "residue_index",
                "asym_id",
                "entity_id",
                "sym_id",
                "restype",
                "is_protein",
                "is_rna",
                "is_dna",
                "is_ligand",
                "is_atom",
                "center_atom",
                "representative_atom",
                "atom_to_token",
            )
        },
        is_interface=_interface_tokens(structure, tokens),
        bonds=_token_bonds(structure, tokens),
        ligand_bonds=_ligand_bonds(structure),
        resolution=np.array([structure.resolution or np.nan], dtype=np.float32),
        **alignment_features(structure, tokens, alignments or {}, to_pair or {}),
        **template_arrays(structure, tokens, templates or {}),
        **_conformer_features(structure),
        positions=structure.positions,
        resolved=structure.resolved,
        layout=structure.layout,
    )


def _interface_tokens(structure: Structure, tokens: Tokens) -> np.ndarray:
    """Tokens whose centre atom is resolved and near one of another chain. [N] bool."""
    near = np.zeros(len(tokens), dtype=bool)
    rows = np.flatnonzero(structure.resolved[tokens.center_atom])
    if len(rows) == 0:
        return near
    centres = structure.positions[tokens.center_atom[rows]]
    cells = CellList(centres, cell_size=INTERFACE_DISTANCE)
    chain = tokens.asym_id[rows]
    neighbours = cells.get_atoms(centres, INTERFACE_DISTANCE)  # [n, k], padded with -1
    other = (neighbours >= 0) & (chain[neighbours] != chain[:, None])
    near[rows] = other.any(axis=-1)
    return near


def _token_bonds(structure: Structure, tokens: Tokens) -> np.ndarray:
    """Polymer-ligand and ligand-ligand bonds between tokens. [B, 2] int32, sorted."""
    ligand = structure.layout.chain_type == "ligand"
    pairs = [structure.bonds]
    starts = structure.residue_starts
    for start, end in zip(starts, np.append(starts[1:], len(ligand)), strict=True):
        if ligand[start]:
            parts = component(str(structure.layout.residue_name[start]))
            rows = {name: start + i for i, name in
                    enumerate(structure.layout.atom_name[start:end].tolist())}  # fmt: skip
            within = [
                (rows[parts.atom_names[a]], rows[parts.atom_names[b]])
                for a, b in parts.bonds
                if parts.atom_names[a] in rows and parts.atom_names[b] in rows
            ]
            pairs.append(np.array(within, dtype=np.int64).reshape(-1, 2))
    atoms = np.concatenate(pairs)
    atoms = atoms[ligand[atoms].any(axis=-1)]
    bonded = np.sort(tokens.atom_to_token[atoms], axis=-1)
    return np.unique(bonded, axis=0).astype(np.int32).reshape(-1, 2)


def _ligand_bonds(structure: Structure) -> np.ndarray:
    """Bonds between an atom of a polymer and one of a ligand. [L, 2] int32, sorted."""
    ligand = structure.layout.chain_type[structure.bonds] == "ligand"
    bonds = np.sort(structure.bonds[ligand[:, 0] != ligand[:, 1]], axis=-1)
    return np.unique(bonds, axis=0).astype(np.int32).reshape(-1, 2)


def _conformer_features(structure: Structure) -> dict[str, np.ndarray]:
    layout, starts = structure.layout, structure.residue_starts
    table = Chem.GetPeriodicTable()
    number = {e: table.GetAtomicNumber(e.capitalize()) for e in set(layout.element.tolist())
              if e != "X"}  # fmt: skip
    positions, mask, charge = [], [], []
    ends = np.append(starts[1:], len(layout))
    for start, end in zip(starts, ends, strict=True):
        name = str(layout.residue_name[start])
        parts, conformer = component(name), reference_conformer(name)
        index = {atom: i for i, atom in enumerate(parts.atom_names)}
        rows = [index[atom] for atom in layout.atom_name[start:end].tolist()]
        positions.append(conformer.positions[rows])
        mask.append(conformer.mask[rows])
        charge.append(parts.charges[rows])
    names = np.char.ljust(layout.atom_name.astype("U4"), 4)
    codes = np.frombuffer(names.astype("S4").tobytes(), dtype=np.uint8).reshape(-1, 4)
    return {
        "ref_pos": np.concatenate(positions),
        "ref_mask": np.concatenate(mask),
        "ref_element": np.array([number.get(e, 0) for e in layout.element.tolist()], np.uint8),
        "ref_charge": np.concatenate(charge).astype(np.float32),
        "ref_atom_name_chars": np.where(codes >= 32, codes - 32, 0).astype(np.uint8),
        "ref_space_uid": np.repeat(np.arange(len(starts), dtype=np.int32), ends - starts),
    }
