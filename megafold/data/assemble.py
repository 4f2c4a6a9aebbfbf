"""Atoms of a file and its tables, put together into a ``Structure``."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from biotite.structure import AtomArray

from megafold.data import cleaning
from megafold.data.components import component
from megafold.data.constants import AMINO_ACIDS, DNA_NUCLEOTIDES, RNA_NUCLEOTIDES
from megafold.data.errors import DataError
from megafold.data.layout import AtomLayout
from megafold.data.structure import DNA, LIGAND, POLYMERS, PROTEIN, RNA, Structure

MAX_BOND_LENGTH = 2.4  # angstrom; what is longer is no bond (supplement, table 5)

STANDARD_RESIDUES = {
    PROTEIN: frozenset(AMINO_ACIDS),
    RNA: frozenset(RNA_NUCLEOTIDES),
    DNA: frozenset(DNA_NUCLEOTIDES),
    LIGAND: frozenset(),
}
_POLYMER_TYPES = {
    "polypeptide(L)": PROTEIN,
    "polypeptide(D)": PROTEIN,
    "polyribonucleotide": RNA,
    "polydeoxyribonucleotide": DNA,
}
# Leaving atoms that a chain keeps at its end: the C terminus of a protein, the 5' end of
# a nucleic acid.
_LAST_RESIDUE_KEEPS = {PROTEIN: "OXT"}
_FIRST_RESIDUE_KEEPS = {RNA: "OP3", DNA: "OP3"}


class LinkEnd(NamedTuple):
    """One end of a covalent bond, as mmCIF names it."""

    asym_id: str
    seq_id: str
    auth_seq_id: str
    atom_name: str


Link = tuple[LinkEnd, LinkEnd]
AtomKey = tuple[str, int, str]  # chain id, residue number, atom name

_DTYPES = {"entity_id": np.int32, "residue_number": np.int32}
_NOWHERE = np.full(3, np.nan, dtype=np.float32)


@dataclass(frozen=True)
class Tables:
    """What a file says beside its atoms."""

    polymer_types: dict[str, str]  # entity -> type of polymer
    sequences: dict[str, dict[int, list[str]]]  # entity -> position -> components
    links: list[Link]
    method: str
    resolution: float | None
    release_date: str
    title: str


@dataclass
class _Chain:
    """One chain while it is being put together."""

    asym_id: str
    copy: int
    is_polymer: bool
    numbers: list[int]
    components: list[str]
    types: list[str]  # of each residue; they differ in a DNA-RNA hybrid only
    atoms: dict[int, dict[str, np.ndarray]]  # number -> atom name -> coordinates [3]
    number_of: dict[str, int] = field(default_factory=dict)  # author's number -> ours, ligands

    @property
    def chain_id(self) -> str:
        return self.asym_id if self.copy == 0 else f"{self.asym_id}-{self.copy + 1}"


def component_type(name: str) -> str:
    """protein, rna, dna or ligand, from the kind of linking the dictionary gives."""
    kind = component(name).kind
    if "PEPTIDE" in kind:
        return PROTEIN
    if "DNA" in kind:
        return DNA
    return RNA if "RNA" in kind else LIGAND


def assemble(name: str, atoms: AtomArray, tables: Tables) -> Structure:
    """Clean the atoms, lay out every residue in full, and fill in what was resolved."""
    removed: dict[str, int] = {}
    atoms = _clean_atoms(atoms, tables.method, removed)
    chains = _read_chains(atoms, tables, removed)
    chains = [chain for chain in chains if _acceptable(chain, removed)]
    if not chains:
        raise DataError(f"nothing left after cleaning (removed: {removed})")
    links = _resolve_links(chains, tables.links)
    layout, positions, resolved = _lay_out(chains, links, removed)
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


def _count(removed: dict[str, int], reason: str, number: int = 1) -> None:
    if number:
        removed[reason] = removed.get(reason, 0) + int(number)


def _clean_atoms(atoms: AtomArray, method: str, removed: dict[str, int]) -> AtomArray:
    keep = np.ones(len(atoms), dtype=bool)
    for reason, mask in cleaning.unwanted_atoms(atoms, method).items():
        _count(removed, f"atoms: {reason}", mask.sum())
        keep &= ~mask
    return cleaning.selenomethionine_to_methionine(atoms[keep])


def _read_chains(atoms: AtomArray, tables: Tables, removed: dict[str, int]) -> list[_Chain]:
    """The chains in the order of the file, copies made by symmetry last."""
    groups: dict[tuple[int, str], list[int]] = {}
    for row, key in enumerate(zip(atoms.sym_id.tolist(), atoms.chain_id.tolist(), strict=True)):
        groups.setdefault(key, []).append(row)
    chains = []
    for (copy, asym_id), rows in sorted(groups.items(), key=lambda item: item[0][0]):
        entity = str(atoms.label_entity_id[rows[0]])
        if entity in tables.polymer_types or (
            not tables.polymer_types and atoms.res_id[rows[0]] > 0
        ):
            chain = _read_polymer(atoms[rows], asym_id, copy, entity, tables, removed)
        else:
            chain = _read_ligand(atoms[rows], asym_id, copy, removed)
        chains.append(chain)
    return chains


def _most_occupied(atoms: AtomArray, numbers: list[int]) -> dict[int, str]:
    """number -> component with the largest occupancy there."""
    weight: dict[int, dict[str, float]] = {}
    rows = zip(numbers, atoms.res_name.tolist(), atoms.occupancy.tolist(), strict=True)
    for number, name, occupancy in rows:
        names = weight.setdefault(number, {})
        names[name] = max(names.get(name, 0.0), occupancy)
    return {number: max(names, key=names.get) for number, names in weight.items()}


def _atoms_of_residues(
    atoms: AtomArray, numbers: list[int], chosen: dict[int, str], removed: dict[str, int]
) -> dict[int, dict[str, np.ndarray]]:
    residues: dict[int, dict[str, np.ndarray]] = {}
    rows = zip(numbers, atoms.res_name.tolist(), atoms.atom_name.tolist(), atoms.coord, strict=True)
    for number, name, atom, position in rows:
        if chosen[number] == name:
            residues.setdefault(number, {})[atom] = position
        else:
            _count(removed, "atoms: less occupied component")
    return residues


def _read_polymer(
    atoms: AtomArray, asym_id: str, copy: int, entity: str, tables: Tables, removed: dict[str, int]
) -> _Chain:
    numbers = atoms.res_id.tolist()
    seen = _most_occupied(atoms, numbers)
    sequence = tables.sequences.get(entity)
    if sequence is None:  # a file without one, such as a model's: what is there is all there is
        full = dict(sorted(seen.items()))
    else:
        for number, name in seen.items():
            if name not in sequence.get(number, ()):
                expected = "/".join(sequence.get(number, ["nothing"]))
                raise DataError(
                    f"chain {asym_id}: residue {number} is {name} in atom_site, {expected} in "
                    "entity_poly_seq"
                )
        full = {n: seen.get(n, names[0]) for n, names in sorted(sequence.items())}
    components = list(full.values())
    polymer = _POLYMER_TYPES.get(tables.polymer_types.get(entity, ""))
    return _Chain(
        asym_id=asym_id,
        copy=copy,
        is_polymer=True,
        numbers=list(full),
        components=components,
        types=[polymer or component_type(name) for name in components],
        atoms=_atoms_of_residues(atoms, numbers, seen, removed),
    )


def _read_ligand(atoms: AtomArray, asym_id: str, copy: int, removed: dict[str, int]) -> _Chain:
    """A ligand, an ion or a glycan; residues are told apart by the author's number."""
    number_of: dict[str, int] = {}
    for author in atoms.auth_seq_id.tolist():
        number_of.setdefault(author, len(number_of) + 1)
    numbers = [number_of[author] for author in atoms.auth_seq_id.tolist()]
    seen = _most_occupied(atoms, numbers)
    return _Chain(
        asym_id=asym_id,
        copy=copy,
        is_polymer=False,
        numbers=list(seen),
        components=list(seen.values()),
        types=[LIGAND] * len(seen),
        atoms=_atoms_of_residues(atoms, numbers, seen, removed),
        number_of=number_of,
    )


def _acceptable(chain: _Chain, removed: dict[str, int]) -> bool:
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
        _count(removed, f"chains: {fault}")
    return fault is None


def _resolve_links(chains: list[_Chain], links: list[Link]) -> list[tuple[AtomKey, AtomKey]]:
    """The bonds between the chains that are left, in every copy; not those along a polymer."""
    by_id = {(chain.asym_id, chain.copy): chain for chain in chains}
    copies = sorted({chain.copy for chain in chains})
    found = []
    for first, second in links:
        for copy in copies:
            ends = []
            for end in (first, second):
                chain = by_id.get((end.asym_id, copy))
                if chain is None:
                    continue
                number = (
                    int(end.seq_id) if chain.is_polymer else chain.number_of.get(end.auth_seq_id)
                )
                if end.atom_name in chain.atoms.get(number, {}):
                    ends.append((chain, number, end.atom_name))
            if len(ends) == 2 and not _along_polymer(*ends):
                found.append(tuple((c.chain_id, number, atom) for c, number, atom in ends))
    return found


def _along_polymer(first: tuple[_Chain, int, str], second: tuple[_Chain, int, str]) -> bool:
    same = first[0] is second[0] and first[0].is_polymer
    return same and abs(first[1] - second[1]) == 1


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


def _lay_out(
    chains: list[_Chain], links: list[tuple[AtomKey, AtomKey]], removed: dict[str, int]
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
                _count(removed, "atoms: leaving", leaving)
                _count(removed, "atoms: not of the component", len(strange) - leaving)
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
            _count(removed, "bonds: longer than 2.4 A")
    return np.array(sorted(set(bonds)), dtype=np.int64).reshape(-1, 2)
