"""Rows of different chains' alignments that are put side by side, because they are of one species.

After AlphaFold-Multimer and AlphaFold 3 (supplement, section 2.3): proteins that meet in a complex
come from one genome, so what co-varies between them shows only where rows are paired.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megafold.data.alignment import Alignment

MAX_PAIRED_ROWS = 8_191  # below the query
MAX_ROWS_PER_SPECIES = 600  # of one chain; a species with more is left out, as a whole


def pair_rows(alignments: Sequence[Alignment], max_rows: int = MAX_PAIRED_ROWS) -> np.ndarray:
    """Rows of E alignments that belong together, the queries aside.

    A species that at least two alignments have gives as many rows as it has in the one with
    fewest, the most similar to each query first. Rows that more alignments take part in come
    first, then those that stand higher in them (by the product of their places).

    Args:
        alignments: One for each distinct sequence. Rows whose ``species`` is empty never pair.
        max_rows: At most so many.

    Returns:
        [P, E] int64: row of each alignment, -1 where it has none of that species.
    """
    by_species: dict[str, dict[int, list[int]]] = {}
    for place, alignment in enumerate(alignments):
        identity = (alignment.msa == alignment.msa[:1]).mean(axis=1)
        for row in np.argsort(-identity, kind="stable").tolist():
            if row > 0 and (species := alignment.species[row]):
                by_species.setdefault(species, {}).setdefault(place, []).append(row)
    paired: list[list[int]] = []
    for rows_of in by_species.values():
        counts = [len(rows) for rows in rows_of.values()]
        if len(counts) < 2 or max(counts) > MAX_ROWS_PER_SPECIES:
            continue
        for i in range(min(counts)):
            paired.append([rows_of[e][i] if e in rows_of else -1 for e in range(len(alignments))])
    table = np.array(paired, dtype=np.int64).reshape(len(paired), len(alignments))
    present = table >= 0
    height = np.where(present, np.log(np.maximum(table, 1)), 0.0).sum(axis=1)
    return table[np.lexsort((height, -present.sum(axis=1)))][:max_rows]
