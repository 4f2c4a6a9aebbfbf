"""Chains that stand in each other's way (AlphaFold 3, supplement, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from biotite.structure import CellList

CLASH_DISTANCE = 1.7  # angstrom
MAX_CLASHING_SHARE = 0.3  # of a chain's atoms, with one other chain


def clashing_chains(
    positions: Sequence[np.ndarray], bonded: Sequence[np.ndarray], ids: Sequence[str]
) -> set[int]:
    """Which chains to remove so that no two clash.

    Two chains clash where more than 30 % of the atoms of one are within 1.7 angstrom of the
    other. Of the two goes the one with the larger share of such atoms, then the one with fewer
    atoms, then the one with the larger id. Pairs are settled from the worst on.

    Args:
        positions: Resolved atoms of each chain, [n, 3].
        bonded: Which of them have a covalent bond to another residue, [n] bool: near by nature.
        ids: Names of the chains.

    Returns:
        Places in the lists.
    """
    sizes = np.array([len(p) for p in positions])
    near = _atoms_near(np.concatenate(positions), np.concatenate(bonded), sizes)
    worst = sorted(
        (-max(number / sizes[a], near.get((b, a), 0) / sizes[b]), a, b)
        for (a, b), number in near.items()
    )
    removed: set[int] = set()
    for share, a, b in worst:
        if -share > MAX_CLASHING_SHARE and not {a, b} & removed:
            removed.add(
                max(a, b, key=lambda c: (near.get((c, b if c == a else a), 0) / sizes[c],
                                         -sizes[c], ids[c]))
            )  # fmt: skip
    return removed


def _atoms_near(
    positions: np.ndarray, bonded: np.ndarray, sizes: np.ndarray
) -> dict[tuple[int, int], int]:
    """(chain, other chain) -> how many atoms of the first are near one of the other."""
    chain = np.repeat(np.arange(len(sizes)), sizes)
    neighbours = CellList(positions, cell_size=CLASH_DISTANCE * 2).get_atoms(
        positions, CLASH_DISTANCE
    )  # [n, k], padded with -1
    other = (neighbours >= 0) & (chain[neighbours] != chain[:, None])
    other &= ~bonded[:, None] & ~bonded[neighbours]
    atoms, columns = np.nonzero(other)
    pairs = np.stack([atoms, chain[neighbours[atoms, columns]]], axis=-1)
    counts: dict[tuple[int, int], int] = {}
    for atom, there in np.unique(pairs, axis=0).tolist():
        key = (int(chain[atom]), there)
        counts[key] = counts.get(key, 0) + 1
    return counts
