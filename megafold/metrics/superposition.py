"""Rigid superposition of structures, and the deviation that is left.

Shape letters: A atoms, L residues, S trial superpositions.
"""

from __future__ import annotations

import torch

from megafold.geometry import weighted_rigid_align
from megafold.metrics.lddt import check_points

# The search of Zhang and Skolnick (2004): superpositions of fragments, then of what comes close.
_SHORTEST_FRAGMENT = 4
_STARTS = 64  # trial fragments of one length, at most
_ITERATIONS = 20


def superpose(mobile: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``mobile`` moved rigidly onto ``target`` by the atoms in ``mask``; no mirror images.

    mobile ``[..., A, 3]``, target ``[A, 3]`` (angstrom), mask ``[A]`` bool; returns as mobile.
    Raises ``FloatingPointError`` for coordinates that are not finite.
    """
    check_points(mobile, target, mask)
    check_finite(mobile, target)
    flat = mobile.reshape(-1, *mobile.shape[-2:])
    moved = weighted_rigid_align(flat, target.expand_as(flat), mask.float())
    return moved.reshape(mobile.shape)


def check_finite(*coordinates: torch.Tensor) -> None:
    """Raise ``FloatingPointError`` unless all coordinates are numbers."""
    if not all(bool(torch.isfinite(x).all()) for x in coordinates):
        raise FloatingPointError("cannot superpose coordinates that are not finite")


def rmsd(mobile: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Root-mean-square deviation in angstrom after superposition, ``[...]``; NaN of no atom."""
    moved = superpose(mobile, target, mask)
    squared = (moved - target).square().sum(-1)[..., mask]
    return squared.mean(-1).sqrt()


def tm_score(
    predicted: torch.Tensor, true: torch.Tensor, mask: torch.Tensor, *, length: int | None = None
) -> torch.Tensor:
    """TM-score of residues whose correspondence is known, ``[...]``, 0 to 1.

    Zhang and Skolnick (2004): ``1 / length * sum 1 / (1 + (d / d0)^2)`` under the superposition
    that makes it largest. That is searched for: fragments are superposed, then the residues
    that came close, until those stay the same; so it is a lower bound, as in every program.

    Args:
        predicted: One atom of each residue (alpha carbons of proteins), ``[..., L, 3]`` angstrom.
        true: ``[L, 3]`` angstrom.
        mask: ``[L]`` bool, residues whose true position is known.
        length: Residues to normalise by, which also sets d0; those in ``mask`` by default.

    Returns:
        NaN where fewer than 3 residues are known, of which no superposition is defined.
    """
    check_points(predicted, true, mask)
    check_finite(predicted, true)
    flat = predicted.reshape(-1, *predicted.shape[-2:])
    known = int(mask.sum())
    length = known if length is None else length
    if length < known:
        raise ValueError(f"length is {length}, but {known} residues are known")
    if known < 3:
        return predicted.new_full(predicted.shape[:-2], float("nan"))
    scores = [_best_tm(x[mask].float(), true[mask].float(), length) for x in flat]
    return torch.stack(scores).reshape(predicted.shape[:-2]).to(predicted.dtype)


def tm_distance(length: int) -> float:
    """d0 in angstrom, by which the TM-score of proteins is scaled; 0.5 at least."""
    return max(0.5, 1.24 * (length - 15) ** (1 / 3) - 1.8) if length > 21 else 0.5


def _best_tm(x: torch.Tensor, target: torch.Tensor, length: int) -> torch.Tensor:
    d0 = tm_distance(length)
    close = min(max(d0, 4.5), 8.0)  # angstrom, within which a residue takes part
    selected = _fragments(len(x), x.device)
    best = x.new_zeros(())
    for iteration in range(_ITERATIONS):
        distance = _superposed(x, target, selected)
        score = (1.0 / (1.0 + (distance / d0).square())).sum(-1) / length
        best = torch.maximum(best, score.max())
        # At least three residues, however far apart: fewer have no superposition.
        limit = distance.kthvalue(3, dim=-1, keepdim=True).values.clamp(
            min=close + (1.0 if iteration else -1.0)
        )
        following = distance <= limit
        changed = (following != selected).any(-1)
        if not bool(changed.any()):
            break
        selected = following[changed]
    return best


def _fragments(length: int, device: torch.device) -> torch.Tensor:
    """Which residues the trial superpositions start from. [S, L] bool."""
    index = torch.arange(length, device=device)
    rows, size = [], length
    while True:
        last = length - size
        number = min(_STARTS, last + 1)
        starts = torch.linspace(0, last, number, device=device).round().long()
        rows.append((index >= starts[:, None]) & (index < starts[:, None] + size))
        if size <= _SHORTEST_FRAGMENT:
            return torch.cat(rows)
        size = max(size // 2, _SHORTEST_FRAGMENT)


def _superposed(x: torch.Tensor, target: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """Distances ``[S, L]`` after superposing x on target by the ``selected`` residues."""
    shape = (len(selected), *x.shape)
    moved = weighted_rigid_align(x.expand(shape), target.expand(shape), selected.float())
    return (moved - target).norm(dim=-1)
