"""Atoms of a residue or ligand that its chemistry does not tell apart.

The two oxygens of a carboxylate may be named either way round; a loss must not depend on
which. AlphaFold 3 asks RDKit which namings are equivalent (supplement, section 4.2).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from biotite.structure.info.ccd import get_from_ccd
from biotite.structure.io.pdbx import BinaryCIFCategory
from rdkit import Chem

from megafold.data.components import component
from megafold.data.layout import AtomLayout

MAX_NAMINGS = 1000


def symmetric_atoms(layout: AtomLayout) -> tuple[np.ndarray, ...]:
    """Equivalent namings of the atoms of each residue and ligand.

    Returns:
        Arrays ``[R, P, n]`` int64, one for each (P, n): R residues with P equivalent orders
        of n atoms each, as rows of the layout. ``[:, 0]`` is the order in use. Only atoms
        that move in some order are listed, residues without any are left out.
    """
    chain, number = layout.chain_id, layout.residue_number
    new = (chain[1:] != chain[:-1]) | (number[1:] != number[:-1])
    starts = np.concatenate([[0], np.flatnonzero(new) + 1, [len(layout)]])
    groups: dict[tuple[int, ...], list[np.ndarray]] = {}
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        name = str(layout.residue_name[start])
        orders = equivalent_orders(name, tuple(layout.atom_name[start:end].tolist()))
        if orders.shape[1]:
            groups.setdefault(orders.shape, []).append(start + orders)
    return tuple(np.stack(groups[shape]) for shape in sorted(groups))


@lru_cache(maxsize=4096)
def equivalent_orders(name: str, atoms: tuple[str, ...]) -> np.ndarray:
    """Orders of ``atoms`` of component ``name`` that chemistry does not tell apart.

    An order keeps bonds, elements, R and S, and which atoms have a double or aromatic bond.
    Of the atoms at the ends, O, N and S may change places whichever bond is drawn double, as
    in a carboxylate, a phosphate or a guanidinium.

    Args:
        name: As in the chemical component dictionary.
        atoms: Those that are there; the others are taken into account, but not moved to.

    Returns:
        ``[P, n]`` int64, places in ``atoms``; row 0 is the given order. Atoms that never
        move are left out: n may be 0, and is for what is not in the dictionary. At most 1000
        orders, among the first that RDKit finds.
    """
    given = np.arange(len(atoms))
    bonds = get_from_ccd("chem_comp_bond", name)
    if bonds is None or len(atoms) < 2:
        return given[None, :0]
    names = component(name).atom_names
    kinds, edges = _labelled_graph(name, names, bonds)
    molecule = Chem.RWMol()
    for kind in kinds:
        atom = Chem.Atom(6)
        atom.SetNoImplicit(True)
        atom.SetIsotope(kind)  # the label that a match must keep
        molecule.AddAtom(atom)
    for first, second in edges:
        molecule.AddBond(first, second, Chem.BondType.SINGLE)
    graph = molecule.GetMol()
    found = graph.GetSubstructMatches(graph, uniquify=False, maxMatches=MAX_NAMINGS)
    place = {atom: i for i, atom in enumerate(atoms)}
    rows = [names.index(atom) for atom in atoms if atom in names]
    if len(rows) < len(atoms):
        return given[None, :0]  # not the dictionary's component of this name
    others = [[place.get(names[order[row]], -1) for row in rows] for order in found]
    others = [order for order in others if min(order) >= 0 and order != given.tolist()]
    orders = np.array([given.tolist(), *others[: MAX_NAMINGS - 1]], dtype=np.int64)
    return orders[:, (orders != given).any(axis=0)]


def _labelled_graph(
    name: str, atoms: tuple[str, ...], bonds: BinaryCIFCategory
) -> tuple[list[int], list[tuple[int, int]]]:
    """A label from 1 for each atom, equal for atoms of one kind, and the bonds among them."""
    place = {atom: i for i, atom in enumerate(atoms)}
    columns = ("atom_id_1", "atom_id_2", "value_order", "pdbx_aromatic_flag")
    edges, unsaturated = [], set()
    for a, b, order, aromatic in zip(*(bonds[c].as_array(str) for c in columns), strict=True):
        if order != "SING" or aromatic == "Y":
            unsaturated |= {a, b}
        if a in place and b in place:
            edges.append((place[a], place[b]))
    degree = np.bincount(np.array(edges, dtype=np.int64).reshape(-1), minlength=len(atoms))
    table = get_from_ccd("chem_comp_atom", name)
    columns = ("atom_id", "type_symbol", "pdbx_stereo_config")
    rows = zip(*(table[c].as_array(str) for c in columns), strict=True)
    known = {atom: (element.upper(), stereo) for atom, element, stereo in rows}
    kinds: dict[tuple, int] = {}
    labels = []
    for atom in atoms:
        element, stereo = known.get(atom, (atom, ""))
        end = degree[place[atom]] == 1 and element in ("O", "N", "S")
        kind = (element, stereo, not end and atom in unsaturated)
        labels.append(kinds.setdefault(kind, len(kinds) + 1))
    return labels, edges
