"""Alignments of the chains, put together into the alignment of the complex.

AlphaFold 3, supplement, section 2.3: the query first, then rows of different proteins paired by
species, then every chain's own rows from the top, side by side.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megafold.data.alignment import MAX_ROWS, Alignment
from megafold.data.constants import GAP, NUM_RESTYPES, RESTYPE_INDEX
from megafold.data.errors import DataError
from megafold.data.pairing import MAX_PAIRED_ROWS, pair_rows
from megafold.data.structure import POLYMERS, PROTEIN, Chain, Structure
from megafold.data.tokens import Tokens, restype_class

_GAP = RESTYPE_INDEX[GAP]


def chain_sequence(chain: Chain) -> np.ndarray:
    """Restype class of each residue of a chain. [L] uint8."""
    classes = [restype_class(name, chain.chain_type) for name in chain.components]
    return np.array(classes, dtype=np.uint8)


def alignment_features(
    structure: Structure,
    tokens: Tokens,
    alignments: Mapping[str, Alignment],
    to_pair: Mapping[str, Alignment],
) -> dict[str, np.ndarray]:
    """The arrays of ``Features`` that come from alignments, by name.

    A chain that has fewer rows than another is a gap below them, and False in ``msa_mask``.
    Profile and mean deletions are those of the chain's own alignment.

    Args:
        structure: N tokens.
        tokens: Its tokens.
        alignments: By chain id; each serves all chains of its entity.
        to_pair: What to pair rows from, where that is another search than the main one.

    Raises:
        DataError: See ``featurize``.
    """
    own = alignments_of_entities(structure, alignments)
    pairable = own | alignments_of_entities(structure, to_pair)
    columns = _columns(structure, tokens)
    blocks = _blocks(structure, own, pairable)
    depth = max([1, *(1 + len(msa) for msa, _, _ in blocks.values())])
    n = len(tokens)
    msa = np.full((depth, n), _GAP, dtype=np.uint8)
    mask = np.zeros((depth, n), dtype=bool)
    deletions = np.zeros((depth, n), dtype=np.uint8)
    profile = np.zeros((n, NUM_RESTYPES), dtype=np.float32)
    deletion_mean = np.zeros(n, dtype=np.float32)
    msa[0], mask[0] = tokens.restype, True
    profile[np.arange(n), tokens.restype] = 1.0
    for chain in structure.chains:
        here, residues = columns[chain.chain_id]
        if chain.entity_id in blocks:
            rows, counts, there = blocks[chain.entity_id]
            below = np.ix_(np.arange(1, len(rows) + 1), here)
            msa[below] = rows[:, residues]
            deletions[below] = counts[:, residues]
            mask[below] = there[:, None]
        if chain.entity_id in own:
            alignment = own[chain.entity_id]
            profile[here] = alignment.profile[residues]
            deletion_mean[here] = alignment.deletion_mean[residues]
    return {
        "msa": msa,
        "msa_mask": mask,
        "deletions": deletions,
        "profile": profile,
        "deletion_mean": deletion_mean,
    }


def alignments_of_entities(
    structure: Structure, alignments: Mapping[str, Alignment]
) -> dict[int, Alignment]:
    """The alignment of each entity that has one, checked against its chain.

    Raises:
        DataError: An alignment is for a chain that is not there or no polymer, or its query is
            not the chain's sequence.
    """
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
    return of_entity


def _columns(structure: Structure, tokens: Tokens) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """chain -> its tokens, and the place in its sequence of each."""
    columns = {}
    for asym, chain in enumerate(structure.chains, start=1):
        here = np.flatnonzero(tokens.asym_id == asym)
        numbers = np.array(chain.residue_numbers)
        columns[chain.chain_id] = here, np.searchsorted(numbers, tokens.residue_index[here])
    return columns


def _blocks(
    structure: Structure, own: Mapping[int, Alignment], pairable: Mapping[int, Alignment]
) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """entity -> its rows below the query: msa, deletions, and whether there is a row [R]."""
    proteins = {c.entity_id for c in structure.chains if c.chain_type == PROTEIN}
    entities = [entity for entity in pairable if entity in proteins]
    paired = pair_rows([pairable[e] for e in entities], MAX_PAIRED_ROWS)
    blocks = {}
    for entity in {**own, **pairable}:
        alignment = own.get(entity)
        rows = np.empty(0, dtype=np.int64)
        if entity in entities:
            rows = paired[:, entities.index(entity)]
        parts = [_take(pairable[entity], rows)]
        if alignment is not None:
            dense = _not_paired_yet(alignment, pairable[entity], rows)
            parts.append(_take(alignment, dense[: MAX_ROWS - 1 - len(rows)]))
        blocks[entity] = tuple(np.concatenate(part) for part in zip(*parts, strict=True))
    return blocks


def _take(alignment: Alignment, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    there = rows >= 0
    msa = np.where(there[:, None], alignment.msa[rows], np.uint8(_GAP))
    return msa, np.where(there[:, None], alignment.deletions[rows], np.uint8(0)), there


def _not_paired_yet(alignment: Alignment, source: Alignment, rows: np.ndarray) -> np.ndarray:
    """Rows of a chain's own alignment below the query that no paired row repeats."""
    used = {source.msa[row].tobytes() for row in rows.tolist() if row >= 0}
    if not used:
        return np.arange(1, len(alignment))
    kept = [row for row in range(1, len(alignment)) if alignment.msa[row].tobytes() not in used]
    return np.array(kept, dtype=np.int64)
