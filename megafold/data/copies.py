"""Where the same atom is in the other copies of its chain.

Which of several identical chains a prediction calls A is its own choice. To permute the truth
accordingly, a crop needs the truth of all copies, also of those that it left out.
"""

from __future__ import annotations

import numpy as np

from megafold.data.features import Features


def chain_copies(features: Features, whole: Features) -> tuple[np.ndarray, np.ndarray]:
    """Truth of each atom of ``features`` in each copy of its entity in ``whole``.

    Args:
        features: ``whole`` or a crop of it.
        whole: The features of the whole structure.

    Returns:
        Positions ``[K, A, 3]`` float32 in angstrom and whether they are resolved ``[K, A]``,
        for the copies with sym_id 1 to K; K is that of the entity with most copies. Where an
        entity has no such copy, or the copy no such atom, unresolved and zero.

    Raises:
        ValueError: ``features`` is not a crop of ``whole``.
    """
    here = _keys(features)
    residues = np.isin(_residues(whole), _residues(features))
    rows = np.flatnonzero(residues[whole.atom_to_token])
    there = _keys(whole, rows)
    copy = whole.sym_id[whole.atom_to_token[rows]] - 1
    copies = int(copy.max()) + 1 if len(copy) else 1
    positions = np.zeros((copies, features.num_atoms, 3), dtype=np.float32)
    resolved = np.zeros((copies, features.num_atoms), dtype=bool)
    for k in range(copies):
        mine = np.flatnonzero(copy == k)
        place = {key: rows[i] for i, key in zip(mine, [there[i] for i in mine], strict=True)}
        found = np.array([place.get(key, -1) for key in here], dtype=np.int64)
        ok = found >= 0
        positions[k, ok] = whole.positions[found[ok]]
        resolved[k, ok] = whole.resolved[found[ok]]
    own = features.sym_id[features.atom_to_token] - 1
    index = np.arange(features.num_atoms)
    if (own >= copies).any() or not np.array_equal(resolved[own, index], features.resolved):
        raise ValueError("features is not a crop of whole: its own atoms are not there")
    return positions, resolved


def _residues(features: Features) -> np.ndarray:
    """One number for each (entity, residue) of the tokens. [N] int64."""
    return (features.entity_id.astype(np.int64) << 32) + features.residue_index


def _keys(features: Features, rows: np.ndarray | None = None) -> list[tuple[int, int, str]]:
    """What an atom has in common with the same atom of another copy."""
    chosen = np.arange(features.num_atoms) if rows is None else rows
    token = features.atom_to_token[chosen]
    return list(
        zip(
            features.entity_id[token].tolist(),
            features.layout.residue_number[chosen].tolist(),
            features.layout.atom_name[chosen].tolist(),
            strict=True,
        )
    )
