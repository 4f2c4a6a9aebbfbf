"""Scores of a whole structure and of its chains from what the confidence head says.

Supplement, section 5.9. Shape letters: N tokens, A atoms, C chains.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from megafold.geometry import distances

if TYPE_CHECKING:
    from megafold.data.batch import Batch

CLASH_DISTANCE = 1.1  # angstrom
CLASH_ATOMS, CLASH_SHARE = 100, 0.5  # more than so many, or so large a share, of a chain
WEIGHT_IPTM, WEIGHT_PTM = 0.8, 0.2
WEIGHT_DISORDERED, WEIGHT_CLASH = 0.5, 100.0
CONTACT = 8.0  # angstrom
_BLOCK = 512


def tm_scale(tokens: torch.Tensor) -> torch.Tensor:
    """The distance d0 in angstrom at which the TM-score of ``tokens`` residues falls to half."""
    return 1.24 * (tokens.clamp(min=19).double() - 15.0) ** (1.0 / 3.0) - 1.8


def interface_tokens(asym_id: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
    """Tokens in the chains of i and of j together, ``[N, N]`` int64; once if they are one."""
    same = asym_id[:, None] == asym_id
    size = (same & token_mask).sum(-1)
    return torch.where(same, size[:, None].expand_as(same), size[:, None] + size)


def predicted_tm(tm: torch.Tensor, pairs: torch.Tensor) -> float:
    """Best row's mean of the expected TM terms ``[N, N]`` over ``pairs`` ``[N, N]`` bool.

    NaN if there is no pair: chains without a frame, such as ions, have no score.
    """
    if not bool(pairs.any()):
        return float("nan")
    return float(((tm * pairs).sum(-1) / pairs.sum(-1).clamp(min=1)).max())


def chain_pair_tm(
    tm: torch.Tensor, frames: torch.Tensor, asym_id: torch.Tensor, token_mask: torch.Tensor
) -> torch.Tensor:
    """ipTM of each two chains, and on the diagonal pTM of each; ``[C, C]``, symmetric.

    Args:
        tm: Expected TM terms ``[N, N]`` at the scale of the two chains of a pair.
        frames: Tokens with a frame, ``[N]`` bool.
        asym_id: ``[N]``.
        token_mask: ``[N]`` bool.
    """
    chains = torch.unique(asym_id[token_mask])
    table = tm.new_full((len(chains), len(chains)), float("nan"))
    members = [(asym_id == chain) & token_mask for chain in chains]
    for i, first in enumerate(members):
        for j, second in enumerate(members[: i + 1]):
            pairs = (frames & first)[:, None] & second
            pairs = pairs | ((frames & second)[:, None] & first)
            table[i, j] = table[j, i] = predicted_tm(tm, pairs)
    return table


def global_pde(pde: torch.Tensor, contact_probs: torch.Tensor) -> float:
    """Mean predicted distance error ``[N, N]`` weighted by contact probability, angstrom."""
    return float((pde * contact_probs).sum() / contact_probs.sum().clamp(min=1e-6))


def has_clash(batch: Batch, x: torch.Tensor) -> bool:
    """Whether a polymer chain of x ``[A, 3]`` angstrom runs through another or through itself.

    An atom clashes if another of a polymer is within 1.1 angstrom, neighbouring residues
    aside. A chain clashes if more than 100, or more than half, of its atoms do.
    """
    token = batch.atom_to_token
    rows = (batch.atom_mask & ~batch.is_ligand[token]).nonzero().squeeze(1)
    x, token = x[rows].float(), token[rows]
    chain, residue = batch.asym_id[token], batch.residue_index[token]
    clashing = torch.zeros(len(rows), dtype=torch.bool, device=x.device)
    for begin in range(0, len(rows), _BLOCK):
        part = slice(begin, begin + _BLOCK)
        apart = (chain[part, None] != chain) | ((residue[part, None] - residue).abs() > 1)
        clashing[part] = ((distances(x[part], x) < CLASH_DISTANCE) & apart).any(-1)
    for asym_id in torch.unique(chain).tolist():
        mine = chain == asym_id
        number, atoms = int((clashing & mine).sum()), int(mine.sum())
        if number > CLASH_ATOMS or number > CLASH_SHARE * atoms:
            return True
    return False


def ranking_score(ptm: float, iptm: float, disordered: float, clash: bool) -> float:
    """By which samples are ordered, the highest first: -100 to 1.5.

    Of a single chain, which has no ipTM (NaN), pTM counts in full; NaN without either.
    """
    fold = ptm if math.isnan(iptm) else WEIGHT_IPTM * iptm + WEIGHT_PTM * ptm
    return fold + WEIGHT_DISORDERED * disordered - WEIGHT_CLASH * clash
