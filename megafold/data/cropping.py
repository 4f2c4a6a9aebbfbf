"""Crops: which tokens of a structure one training example sees (supplement, section 2.7).

Each method returns rows of tokens in increasing order; tokens are never split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megafold.data.features import Features

INTERFACE_DISTANCE = 15.0  # angstrom, between centre atoms of different chains
MAX_CHAINS = 20
# Supplement, table 4: how often each method is drawn for PDB entries.
WEIGHTS = {"contiguous": 0.2, "spatial": 0.4, "interface": 0.4}


def crop(features: Features, size: int, *, generator: np.random.Generator) -> Features:
    """At most ``size`` tokens of a structure, by a method drawn as AlphaFold 3 draws it.

    Of an assembly of more than 20 chains the 20 nearest to a random interface token are kept
    first. What then fits is returned as it is. A spatial crop never has a token whose centre
    atom is unresolved, so it may be smaller than ``size``.

    Raises:
        ValueError: ``size`` is not positive.
    """
    if size >= features.num_tokens:
        return features
    return features.select(crop_tokens(features, size, generator=generator))


def crop_tokens(
    features: Features,
    size: int,
    *,
    generator: np.random.Generator,
    chains: Sequence[int] | None = None,
) -> np.ndarray:
    """The tokens that ``crop`` would keep, in increasing order. [n] int.

    Args:
        features: N tokens; what fits is taken whole.
        size: At most so many tokens.
        generator: Every random draw comes from it.
        chains: ``asym_id`` of the chain, or the two chains of an interface, that the example
            was drawn for: crops in space are around one of their tokens.

    Raises:
        ValueError: ``size`` is not positive, or a chain is not there.
    """
    if size < 1:
        raise ValueError(f"size is {size}; a crop has at least 1 token")
    wanted = None
    if chains is not None:
        if missing := set(chains) - set(features.asym_id.tolist()):
            raise ValueError(f"chains {sorted(missing)} are not there")
        wanted = np.isin(features.asym_id, chains)
    if features.num_tokens <= size:
        return np.arange(features.num_tokens)
    tokens = nearest_chains(features, generator, wanted)
    if len(tokens) > size:
        method = generator.choice(list(WEIGHTS), p=list(WEIGHTS.values()))
        tokens = METHODS[method](features, size, generator, tokens, wanted)
    return tokens


def nearest_chains(
    features: Features, generator: np.random.Generator, wanted: np.ndarray | None = None
) -> np.ndarray:
    """Tokens of the 20 chains nearest to a random interface token (supplement, section 2.5.4).

    Near by the closest resolved centre atom. All tokens where there are no more than 20 chains,
    or no chain is near another. The random token is one of ``wanted`` ([N] bool), if any is at
    an interface.
    """
    chains, index = np.unique(features.asym_id, return_inverse=True)
    candidates = np.flatnonzero(_interface(features, wanted))
    if len(candidates) == 0:
        candidates = np.flatnonzero(features.is_interface)
    if len(chains) <= MAX_CHAINS or len(candidates) == 0:
        return np.arange(features.num_tokens)
    centres = features.positions[features.center_atom]
    distance = np.linalg.norm(centres - centres[generator.choice(candidates)], axis=-1)
    nearest = np.full(len(chains), np.inf)
    np.minimum.at(nearest, index, np.where(_resolved(features), distance, np.inf))
    kept = np.argsort(nearest, kind="stable")[:MAX_CHAINS]
    return np.flatnonzero(np.isin(index, kept))


def contiguous_crop(
    features: Features,
    size: int,
    generator: np.random.Generator,
    tokens: np.ndarray | None = None,
    wanted: np.ndarray | None = None,
) -> np.ndarray:
    """One run of consecutive tokens from each chain, in random order of chains.

    AlphaFold-Multimer, algorithm 1: each run is as long as chance has it, but long enough
    that the chains left can fill the crop.

    Args:
        features: N tokens.
        size: How many of them.
        generator: Every random draw comes from it.
        tokens: Rows to choose among, whole chains; all if None.
        wanted: [N] bool, what a crop in space is to be around; it has no say in this one.
    """
    tokens = _all_or(tokens, features)
    chain = features.asym_id[tokens]
    _, starts, lengths = np.unique(chain, return_index=True, return_counts=True)
    added, remaining, rows = 0, int(lengths.sum()), []
    for i in generator.permutation(len(starts)):
        length = int(lengths[i])
        remaining -= length
        longest = min(size - added, length)
        shortest = min(length, max(0, size - added - remaining))
        run = int(generator.integers(shortest, longest + 1))
        first = int(starts[i]) + int(generator.integers(0, length - run + 1))
        rows.append(np.arange(first, first + run))
        added += run
    return tokens[np.sort(np.concatenate(rows))]


def spatial_crop(
    features: Features,
    size: int,
    generator: np.random.Generator,
    tokens: np.ndarray | None = None,
    wanted: np.ndarray | None = None,
) -> np.ndarray:
    """The tokens around a random one (AlphaFold-Multimer, algorithm 2). Arguments as above."""
    tokens = _all_or(tokens, features)
    candidates = resolved = tokens[_resolved(features)[tokens]]
    if wanted is not None:
        candidates = resolved[wanted[resolved]]
        if len(candidates) == 0:  # nothing of what is wanted was seen
            candidates = resolved
    return _around(features, size, generator, tokens, candidates)


def interface_crop(
    features: Features,
    size: int,
    generator: np.random.Generator,
    tokens: np.ndarray | None = None,
    wanted: np.ndarray | None = None,
) -> np.ndarray:
    """The tokens around a random one that is near another chain. Arguments as above.

    Where two chains are wanted it is one near the other of them. A structure without such an
    interface has the spatial crop, as in AlphaFold 3.
    """
    tokens = _all_or(tokens, features)
    candidates = tokens[_interface(features, wanted)[tokens]]
    if len(candidates) == 0:
        return spatial_crop(features, size, generator, tokens, wanted)
    return _around(features, size, generator, tokens, candidates)


METHODS = {"contiguous": contiguous_crop, "spatial": spatial_crop, "interface": interface_crop}


def _all_or(tokens: np.ndarray | None, features: Features) -> np.ndarray:
    return np.arange(features.num_tokens) if tokens is None else tokens


def _resolved(features: Features) -> np.ndarray:
    """Tokens whose centre atom is resolved. [N] bool."""
    return features.resolved[features.center_atom]


def _interface(features: Features, wanted: np.ndarray | None) -> np.ndarray:
    """Tokens near another chain; of two wanted chains, those near the other one. [N] bool."""
    if wanted is None:
        return features.is_interface
    near = wanted & features.is_interface
    chains = np.unique(features.asym_id[wanted])
    if len(chains) != 2:
        return near
    one, other = (np.flatnonzero(near & (features.asym_id == chain)) for chain in chains)
    between = np.zeros_like(near)
    a, b = (features.positions[features.center_atom[rows]] for rows in (one, other))
    square = (a * a).sum(-1)[:, None] + (b * b).sum(-1) - 2 * a @ b.T
    close = square < INTERFACE_DISTANCE**2
    between[one], between[other] = close.any(axis=1), close.any(axis=0)
    return between


def _around(
    features: Features,
    size: int,
    generator: np.random.Generator,
    tokens: np.ndarray,
    candidates: np.ndarray,
) -> np.ndarray:
    """Of ``tokens`` the nearest to a random one of ``candidates``."""
    if len(candidates) == 0:  # no centre atom is resolved: space says nothing
        return contiguous_crop(features, size, generator, tokens)
    resolved = tokens[_resolved(features)[tokens]]
    centres = features.positions[features.center_atom[resolved]]
    middle = features.positions[features.center_atom[generator.choice(candidates)]]
    distance = np.linalg.norm(centres - middle, axis=-1)
    nearest = np.argsort(distance, kind="stable")[:size]
    return np.sort(resolved[nearest])
