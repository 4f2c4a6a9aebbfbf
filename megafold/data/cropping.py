"""Crops: which tokens of a structure one training example sees (supplement, section 2.7)."""

from __future__ import annotations

import numpy as np

from megafold.data.features import Features


def crop(features: Features, size: int, *, generator: np.random.Generator) -> Features:
    """At most ``size`` tokens."""
    if features.num_tokens <= size:
        return features
    return features.select(contiguous_crop(features, size, generator))


def contiguous_crop(features: Features, size: int, generator: np.random.Generator) -> np.ndarray:
    """Runs of consecutive tokens, chain by chain in random order (AlphaFold 2 multimer,
    algorithm 1). Rows of tokens, increasing."""
    chains = np.unique(features.asym_id)
    generator.shuffle(chains)
    lengths = [int((features.asym_id == chain).sum()) for chain in chains]
    added, remaining, rows = 0, sum(lengths), []
    for chain, length in zip(chains, lengths, strict=True):
        remaining -= length
        longest = min(size - added, length)
        shortest = min(length, max(0, size - added - remaining))
        run = int(generator.integers(shortest, longest + 1))
        start = int(generator.integers(0, length - run + 1))
        added += run
        rows.append(np.flatnonzero(features.asym_id == chain)[start : start + run])
    return np.sort(np.concatenate(rows))
