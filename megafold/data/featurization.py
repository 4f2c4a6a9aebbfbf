"""``Structure`` and alignments to ``Features`` (AlphaFold 3, supplement, table 5)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from biotite.structure import CellList
from rdkit import Chem

from megafold.data.alignment import Alignment
from megafold.data.components import component, reference_conformer
from megafold.data.constants import GAP, NUM_RESTYPES, RESTYPE_INDEX
from megafold.data.cropping import INTERFACE_DISTANCE
from megafold.data.errors import DataError
from megafold.data.features import Features
from megafold.data.structure import POLYMERS, Chain, Structure
from megafold.data.tokens import Tokens, restype_class, tokenize

_GAP = RESTYPE_INDEX[GAP]


def featurize(structure: Structure, alignments: Mapping[str, Alignment] | None = None) -> Features:
    """Work out everything deterministic about a structure.

    Args:
        structure: As ``read_structure`` gives it.
        alignments: Alignment by chain id. Chains of the same entity share an alignment given
            for one of them; a chain without one has its own sequence as the only row.

    Raises:
        DataError: An alignment is for a chain that is not there or no polymer, or its query
            is not the chain's sequence.
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
        **_alignment_features(structure, tokens, alignments or {}),
        **_no_templates(len(tokens)),
        **_conformer_features(structure),
        positions=structure.positions,
        resolved=structure.resolved,
        layout=structure.layout,
    )


def chain_sequence(chain: Chain) -> np.ndarray:
    """Restype class of each residue of a chain. [L] uint8."""
    classes = [restype_class(name, chain.chain_type) for name in chain.components]
    return np.array(classes, dtype=np.uint8)


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


def _alignment_of_chains(
    structure: Structure, alignments: Mapping[str, Alignment]
) -> dict[str, Alignment | None]:
    """The alignment of each chain, checked; shared within an entity."""
    by_id = {chain.chain_id: chain for chain in structure.chains}
    of_entity: dict[int, Alignment] = {}
    for chain_id, alignment in alignments.items():
        if chain_id not in by_id:
            raise DataError(
                f"{alignment.source}: alignment of chain {chain_id}, but {structure.name} has "
                f"chains {', '.join(by_id)}"
            )
        chain = by_id[chain_id]
        if chain.chain_type not in POLYMERS:
            raise DataError(f"{alignment.source}: chain {chain_id} is a {chain.chain_type}")
        query, expected = alignment.msa[0], chain_sequence(chain)
        if len(query) != len(expected):
            raise DataError(
                f"{alignment.source}: the query has {len(query)} residues, chain {chain_id} of "
                f"{structure.name} has {len(expected)}"
            )
        if (query != expected).any():
            at = int(np.flatnonzero(query != expected)[0])
            raise DataError(
                f"{alignment.source}: the query differs from chain {chain_id} of "
                f"{structure.name} at residue {at + 1} ({chain.components[at]})"
            )
        of_entity.setdefault(chain.entity_id, alignment)
    return {
        c.chain_id: alignments.get(c.chain_id, of_entity.get(c.entity_id)) for c in structure.chains
    }


def _alignment_features(
    structure: Structure, tokens: Tokens, alignments: Mapping[str, Alignment]
) -> dict[str, np.ndarray]:
    """Each chain's rows side by side, the query first, without pairing."""
    chosen = _alignment_of_chains(structure, alignments)
    depth = max([1, *(len(a) for a in chosen.values() if a is not None)])
    n = len(tokens)
    msa = np.full((depth, n), _GAP, dtype=np.uint8)
    mask = np.zeros((depth, n), dtype=bool)
    deletions = np.zeros((depth, n), dtype=np.uint8)
    profile = np.zeros((n, NUM_RESTYPES), dtype=np.float32)
    deletion_mean = np.zeros(n, dtype=np.float32)
    msa[0], mask[0] = tokens.restype, True
    profile[np.arange(n), tokens.restype] = 1.0
    for asym, chain in enumerate(structure.chains, start=1):
        alignment = chosen[chain.chain_id]
        if alignment is None:
            continue
        here = np.flatnonzero(tokens.asym_id == asym)
        numbers = np.array(chain.residue_numbers)
        columns = np.searchsorted(numbers, tokens.residue_index[here])
        rows = np.arange(len(alignment))
        msa[np.ix_(rows, here)] = alignment.msa[:, columns]
        deletions[np.ix_(rows, here)] = alignment.deletions[:, columns]
        mask[np.ix_(rows, here)] = True
        profile[here] = alignment.profile[columns]
        deletion_mean[here] = alignment.deletion_mean[columns]
    return {
        "msa": msa,
        "msa_mask": mask,
        "deletions": deletions,
        "profile": profile,
        "deletion_mean": deletion_mean,
    }


def _no_templates(n: int) -> dict[str, np.ndarray]:
    return {
        "template_restype": np.zeros((0, n), dtype=np.uint8),
        "template_pseudo_beta": np.zeros((0, n, 3), dtype=np.float32),
        "template_pseudo_beta_mask": np.zeros((0, n), dtype=bool),
        "template_backbone": np.zeros((0, n, 3, 3), dtype=np.float32),
        "template_backbone_mask": np.zeros((0, n), dtype=bool),
    }
