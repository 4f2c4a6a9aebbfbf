"""Chains as a file has them, before they are laid out in full."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from biotite.structure import AtomArray

from megafold.data.components import component
from megafold.data.errors import DataError
from megafold.data.structure import DNA, LIGAND, PROTEIN, RNA

_POLYMER_TYPES = {
    "polypeptide(L)": PROTEIN,
    "polypeptide(D)": PROTEIN,
    "polyribonucleotide": RNA,
    "polydeoxyribonucleotide": DNA,
}


class LinkEnd(NamedTuple):
    """One end of a covalent bond, as mmCIF names it."""

    asym_id: str
    seq_id: str
    auth_seq_id: str
    atom_name: str


MAX_BOND_LENGTH = 2.4  # angstrom; what is longer is no bond (supplement, table 5)

Link = tuple[LinkEnd, LinkEnd]
AtomKey = tuple[str, int, str]  # chain id, residue number, atom name


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
class DraftChain:
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
        """The name in the assembly: copies made by symmetry are ``A-2``, ``A-3``, ...."""
        return self.asym_id if self.copy == 0 else f"{self.asym_id}-{self.copy + 1}"

    def residue_number(self, end: LinkEnd) -> int | None:
        """Where in the chain a bond ends; None where the file does not say."""
        if not self.is_polymer:
            return self.number_of.get(end.auth_seq_id)
        return int(end.seq_id) if end.seq_id.isdigit() else None


def component_type(name: str) -> str:
    """protein, rna, dna or ligand, from the kind of linking the dictionary gives."""
    kind = component(name).kind
    if "PEPTIDE" in kind:
        return PROTEIN
    if "DNA" in kind:
        return DNA
    return RNA if "RNA" in kind else LIGAND


def count(removed: dict[str, int], reason: str, number: int = 1) -> None:
    if number:
        removed[reason] = removed.get(reason, 0) + int(number)


def read_chains(atoms: AtomArray, tables: Tables, removed: dict[str, int]) -> list[DraftChain]:
    """The chains in the order of the file, copies made by symmetry last."""
    groups: dict[tuple[int, str], list[int]] = {}
    for row, key in enumerate(zip(atoms.sym_id.tolist(), atoms.chain_id.tolist(), strict=True)):
        groups.setdefault(key, []).append(row)
    chains = []
    for (copy, asym_id), rows in sorted(groups.items(), key=lambda item: item[0][0]):
        entity = str(atoms.label_entity_id[rows[0]])
        mine = atoms[rows]
        if entity in tables.polymer_types or (not tables.polymer_types and mine.res_id[0] > 0):
            apart = []
            if entity not in tables.sequences:
                mine, apart = _without_strangers(mine)
            if len(mine):
                chains.append(_read_polymer(mine, asym_id, copy, entity, tables, removed))
            chains += [
                _read_ligand(ligand, f"{asym_id}_{ligand.res_id[0]}", copy, removed)
                for ligand in apart
            ]
        else:
            chains.append(_read_ligand(mine, asym_id, copy, removed))
    return chains


def _without_strangers(atoms: AtomArray) -> tuple[AtomArray, list[AtomArray]]:
    """A chain of a file without sequences, and the ligands that the file counts among it.

    Some programs number a ligand as one more residue of the nearest chain. It belongs there only
    where it is bonded to a residue beside it, as an acetyl group is.
    """
    names = dict(zip(atoms.res_id.tolist(), atoms.res_name.tolist(), strict=True))
    strange = [number for number, name in names.items() if component_type(name) == LIGAND]
    polymer, apart = np.ones(len(atoms), dtype=bool), []
    for number in strange:
        here = atoms.res_id == number
        beside = (np.abs(atoms.res_id - number) == 1) & ~np.isin(atoms.res_id, strange)
        distance = np.linalg.norm(atoms.coord[here][:, None] - atoms.coord[beside], axis=-1)
        if distance.min(initial=np.inf) > MAX_BOND_LENGTH:
            polymer &= ~here
            apart.append(atoms[here])
    return atoms[polymer], apart


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
            count(removed, "atoms: less occupied component")
    return residues


def _read_polymer(
    atoms: AtomArray, asym_id: str, copy: int, entity: str, tables: Tables, removed: dict[str, int]
) -> DraftChain:
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
    types = _residue_types(components, tables.polymer_types.get(entity, ""), sequence is not None)
    return DraftChain(
        asym_id=asym_id,
        copy=copy,
        is_polymer=True,
        numbers=list(full),
        components=components,
        types=types,
        atoms=_atoms_of_residues(atoms, numbers, seen, removed),
    )


def _residue_types(components: list[str], declared: str, has_sequence: bool) -> list[str]:
    """Kind of each residue of a polymer chain.

    What the file declares holds for all, but for hybrids and for files without sequences, which
    may put chains of several kinds into one entity: there the components say it, and a cap such
    as acetyl is of the kind that most of the chain is.
    """
    polymer = _POLYMER_TYPES.get(declared)
    if has_sequence and polymer is not None:
        return [polymer] * len(components)
    kinds = [component_type(name) for name in components]
    if has_sequence:
        return kinds
    known = [kind for kind in kinds if kind != LIGAND]
    most = max(sorted(set(known)), key=known.count) if known else polymer or LIGAND
    return [most if kind == LIGAND else kind for kind in kinds]


def _read_ligand(atoms: AtomArray, asym_id: str, copy: int, removed: dict[str, int]) -> DraftChain:
    """A ligand, an ion or a glycan; residues are told apart by the author's number."""
    number_of: dict[str, int] = {}
    for author in atoms.auth_seq_id.tolist():
        number_of.setdefault(author, len(number_of) + 1)
    numbers = [number_of[author] for author in atoms.auth_seq_id.tolist()]
    seen = _most_occupied(atoms, numbers)
    return DraftChain(
        asym_id=asym_id,
        copy=copy,
        is_polymer=False,
        numbers=list(seen),
        components=list(seen.values()),
        types=[LIGAND] * len(seen),
        atoms=_atoms_of_residues(atoms, numbers, seen, removed),
        number_of=number_of,
    )


def resolve_links(chains: list[DraftChain], links: list[Link]) -> list[tuple[AtomKey, AtomKey]]:
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
                number = chain.residue_number(end)
                if end.atom_name in chain.atoms.get(number, {}):
                    ends.append((chain, number, end.atom_name))
            if len(ends) == 2 and not _along_polymer(*ends):
                found.append(tuple((c.chain_id, number, atom) for c, number, atom in ends))
    return list(dict.fromkeys(found))  # a bond in two locations is listed twice


def _along_polymer(first: tuple[DraftChain, int, str], second: tuple[DraftChain, int, str]) -> bool:
    same = first[0] is second[0] and first[0].is_polymer
    return same and abs(first[1] - second[1]) == 1
