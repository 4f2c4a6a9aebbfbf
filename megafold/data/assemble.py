"""Atoms of a file and its tables, put together into a ``Structure``."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
from biotite.structure import AtomArray

from megafold.data import cleaning
from megafold.data.clashes import clashing_chains
from megafold.data.components import component
from megafold.data.constants import AMINO_ACIDS, DNA_NUCLEOTIDES, RNA_NUCLEOTIDES
from megafold.data.drafts import (
    MAX_BOND_LENGTH,
    AtomKey,
    DraftChain,
    Tables,
    count,
    read_chains,
    resolve_links,
)
from megafold.data.errors import ExcludedError
from megafold.data.layout import AtomLayout
from megafold.data.structure import DNA, LIGAND, POLYMERS, PROTEIN, RNA, Structure

STANDARD_RESIDUES = {
    PROTEIN: frozenset(AMINO_ACIDS),
    RNA: frozenset(RNA_NUCLEOTIDES),
    DNA: frozenset(DNA_NUCLEOTIDES),
    LIGAND: frozenset(),
}
# Leaving atoms that a chain keeps at its end: the C terminus of a protein, the 5' end of
# a nucleic acid.
_LAST_RESIDUE_KEEPS = {PROTEIN: "OXT"}
_FIRST_RESIDUE_KEEPS = {RNA: "OP3", DNA: "OP3"}

_DTYPES = {"entity_id": np.int32, "residue_number": np.int32}
_NOWHERE = np.full(3, np.nan, dtype=np.float32)


def assemble(name: str, atoms: AtomArray, tables: Tables) -> Structure:
    """Clean the atoms, lay out every residue in full, and fill in what was resolved."""
    removed: dict[str, int] = {}
    atoms = _clean_atoms(atoms, tables.method, removed)
    chains = read_chains(atoms, tables, removed)
    chains = [chain for chain in chains if _acceptable(chain, removed)]
    if not chains:
        raise ExcludedError(f"nothing left after cleaning (removed: {removed})")
    chains = _without_clashes(chains, resolve_links(chains, tables.links), removed)
    links = resolve_links(chains, tables.links)
    layout, positions, resolved = lay_out(chains, links, removed)
    return Structure(
        name=name,
        layout=layout,
        positions=positions,
        resolved=resolved,
        bonds=_bond_rows(links, layout, positions, resolved, removed),
        method=tables.method,
        resolution=tables.resolution,
        release_date=tables.release_date,
        title=tables.title,
        removed=MappingProxyType(removed),
    )


def _clean_atoms(atoms: AtomArray, method: str, removed: dict[str, int]) -> AtomArray:
    keep = np.ones(len(atoms), dtype=bool)
    for reason, mask in cleaning.unwanted_atoms(atoms, method).items():
        count(removed, f"atoms: {reason}", mask.sum())
        keep &= ~mask
    return cleaning.selenomethionine_to_methionine(atoms[keep])


def _acceptable(chain: DraftChain, removed: dict[str, int]) -> bool:
    if not chain.is_polymer:
        return True
    fault = cleaning.chain_fault(
        chain.types[0],
        chain.components,
        np.array(chain.numbers),
        np.array([chain.atoms.get(n, {}).get("CA", _NOWHERE) for n in chain.numbers]),
        seen=len(chain.atoms),
    )
    if fault is not None:
        count(removed, f"chains: {fault}")
    return fault is None


def _without_clashes(
    chains: list[DraftChain], links: list[tuple[AtomKey, AtomKey]], removed: dict[str, int]
) -> list[DraftChain]:
    ends = {end for link in links for end in link}
    positions, bonded = [], []
    for chain in chains:
        atoms = [(n, name, xyz) for n, names in chain.atoms.items() for name, xyz in names.items()]
        positions.append(np.array([xyz for _, _, xyz in atoms], dtype=np.float32))
        bonded.append(np.array([(chain.chain_id, n, name) in ends for n, name, _ in atoms]))
    clashing = clashing_chains(positions, bonded, [chain.chain_id for chain in chains])
    count(removed, "chains: clashing with another", len(clashing))
    return [chain for i, chain in enumerate(chains) if i not in clashing]


def _kept_atoms(
    name: str, chain_type: str, is_first: bool, is_last: bool, bonded: set[str]
) -> np.ndarray:
    """Which heavy atoms of a component are there: leaving atoms have left where it is bonded.

    Along a polymer every leaving atom has left, but for those that a chain's end keeps.
    Of a ligand those have left that hang on an atom in ``bonded``.
    """
    parts = component(name)
    if chain_type in POLYMERS:
        kept = ~parts.leaving
        ends = (_FIRST_RESIDUE_KEEPS.get(chain_type) if is_first else None,
                _LAST_RESIDUE_KEEPS.get(chain_type) if is_last else None)  # fmt: skip
        return kept | np.array([atom in ends for atom in parts.atom_names])
    kept = np.ones(len(parts), dtype=bool)
    for a, b in parts.bonds:
        for here, there in ((a, b), (b, a)):
            if parts.atom_names[here] in bonded and parts.leaving[there]:
                kept[there] = False
    return kept


def lay_out(
    chains: list[DraftChain], links: list[tuple[AtomKey, AtomKey]], removed: dict[str, int]
) -> tuple[AtomLayout, np.ndarray, np.ndarray]:
    """Every heavy atom of every residue, with coordinates where there are any."""
    bonded: dict[tuple[str, int], set[str]] = {}
    for chain_id, number, atom in (end for link in links for end in link):
        bonded.setdefault((chain_id, number), set()).add(atom)
    entities: dict[tuple, int] = {}
    columns: dict[str, list] = {name: [] for name in AtomLayout.__dataclass_fields__}
    positions: list[np.ndarray] = []
    for chain in chains:
        key = (tuple(chain.types), tuple(chain.components))
        entity = entities.setdefault(key, len(entities) + 1)
        for i, (number, name) in enumerate(zip(chain.numbers, chain.components, strict=True)):
            parts, kind, found = component(name), chain.types[i], chain.atoms.get(number, {})
            is_first, is_last = i == 0, i == len(chain.numbers) - 1
            partners = bonded.get((chain.chain_id, number), set())
            kept = np.flatnonzero(_kept_atoms(name, kind, is_first, is_last, partners))
            names = [parts.atom_names[k] for k in kept]
            if strange := found.keys() - set(names):
                leaving = len(strange & set(parts.atom_names))
                count(removed, "atoms: leaving", leaving)
                count(removed, "atoms: not of the component", len(strange) - leaving)
            if name == "ARG":
                cleaning.fix_arginine(found)
            positions.extend(found.get(atom, _NOWHERE) for atom in names)
            columns["atom_name"].extend(names)
            columns["element"].extend(parts.elements[k] for k in kept)
            for column, value in (
                ("chain_id", chain.chain_id),
                ("entity_id", entity),
                ("residue_number", number),
                ("residue_name", name),
                ("is_hetero", name not in STANDARD_RESIDUES[kind]),
                ("chain_type", kind),
            ):
                columns[column].extend([value] * len(names))
    coordinates = np.array(positions, dtype=np.float32).reshape(-1, 3)
    resolved = np.isfinite(coordinates).all(axis=-1)
    coordinates[~resolved] = 0.0
    layout = AtomLayout(
        **{name: np.array(values, dtype=_DTYPES.get(name)) for name, values in columns.items()}
    )
    return layout, coordinates, resolved


def _bond_rows(
    links: list[tuple[AtomKey, AtomKey]],
    layout: AtomLayout,
    positions: np.ndarray,
    resolved: np.ndarray,
    removed: dict[str, int],
) -> np.ndarray:
    keys = zip(layout.chain_id.tolist(), layout.residue_number.tolist(),
               layout.atom_name.tolist(), strict=True)  # fmt: skip
    rows = {key: i for i, key in enumerate(keys)}
    bonds = []
    for first, second in links:
        a, b = rows.get(first), rows.get(second)
        if a is None or b is None:
            continue
        if np.linalg.norm(positions[a] - positions[b]) < MAX_BOND_LENGTH:
            bonds.append((a, b))
        else:
            count(removed, "bonds: longer than 2.4 A")
    return np.array(sorted(set(bonds)), dtype=np.int64).reshape(-1, 2)
