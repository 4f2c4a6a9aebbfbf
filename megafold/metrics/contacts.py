"""How many of the contacts that a distogram is surest of are there."""

from __future__ import annotations

import torch

from megafold.geometry import distances

CONTACT = 8.0  # angstrom, between representative atoms
LONG_RANGE = 24  # residues apart along the chain, at least


def contact_precision(
    probability: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor,
    residue_index: torch.Tensor,
    chain: torch.Tensor,
    *,
    separation: int = LONG_RANGE,
    per_token: float = 1.0,
) -> float:
    """Share of true contacts among the likeliest ``per_token * N`` pairs, 0 to 1.

    A pair counts if its tokens are ``separation`` or more residues apart, or in two chains.

    Args:
        probability: Of a contact, ``[N, N]``, as ``Confidence.contact_probs``; only pairs
            with i < j are looked at.
        positions: Of the tokens' representative atoms, ``[N, 3]`` angstrom.
        mask: ``[N]`` bool, tokens whose true position is known.
        residue_index: ``[N]`` integer.
        chain: ``[N]`` integer, the chain of each token.
        separation: At least so many residues.
        per_token: Pairs to look at for each known token; 0.2 gives the usual "L/5".

    Returns:
        NaN if no pair counts.
    """
    n = len(mask)
    if probability.shape != (n, n) or positions.shape != (n, 3):
        raise ValueError(
            f"probability must be [{n}, {n}] and positions [{n}, 3] for a mask of {n} tokens, "
            f"got {tuple(probability.shape)} and {tuple(positions.shape)}"
        )
    if per_token <= 0:
        raise ValueError(f"per_token must be above 0, got {per_token}")
    apart = (residue_index[:, None] - residue_index).abs() >= separation
    counts = (apart | (chain[:, None] != chain)) & mask[:, None] & mask
    first, second = counts.triu(1).nonzero(as_tuple=True)
    if len(first) == 0:
        return float("nan")
    chosen = min(len(first), max(1, round(per_token * int(mask.sum()))))
    likeliest = probability[first, second].topk(chosen).indices
    close = distances(positions, positions)[first[likeliest], second[likeliest]] < CONTACT
    return float(close.double().mean())
