"""lDDT: how well local distances are reproduced, without superposition.

Mariani et al. (2013), with the radii AlphaFold 3 uses (supplement, section 6.2).

Shape letters: A atoms, R rows of them.
"""

from __future__ import annotations

from typing import Literal

import torch

from megafold.geometry import distances

RADIUS, RADIUS_NUCLEIC = 15.0, 30.0  # angstrom
THRESHOLDS = (0.5, 1.0, 2.0, 4.0)  # angstrom
_ROWS = 1024  # distances of so many atoms to all others at a time: linear memory in the atoms

# Which pairs of atoms count: all, those of one chain, or those of two chains.
Pairs = Literal["all", "within", "between"]


def lddt_per_atom(
    predicted: torch.Tensor,
    true: torch.Tensor,
    mask: torch.Tensor,
    *,
    nucleic: torch.Tensor | None = None,
    chain: torch.Tensor | None = None,
    pairs: Pairs = "all",
) -> torch.Tensor:
    """lDDT of each atom, from 0 to 1; NaN where an atom is masked or has no neighbour.

    Args:
        predicted: ``[..., A, 3]`` angstrom.
        true: ``[A, 3]`` angstrom.
        mask: ``[A]`` bool, the atoms whose true position is known. With only the alpha carbons
            in it, this is the lDDT of alpha carbons.
        nucleic: ``[A]`` bool, atoms of nucleic acids, which look 30 instead of 15 angstrom far.
        chain: ``[A]`` integer, the chain of each atom; needed unless ``pairs`` is ``all``.
        pairs: ``all``; ``within``, distances within a chain; ``between``, those from one chain
            to another, as interfaces are judged.

    Returns:
        ``[..., A]``.
    """
    _check(predicted, true, mask, nucleic, chain, pairs)
    radius = torch.full(mask.shape, RADIUS, device=mask.device, dtype=true.dtype)
    if nucleic is not None:
        radius = radius.masked_fill(nucleic, RADIUS_NUCLEIC)
    index = torch.arange(len(mask), device=mask.device)
    rows = []
    for part in index.split(_ROWS):
        true_distance = distances(true[part], true)
        near = (true_distance < radius[part, None]) & mask[part, None] & mask
        near &= index[part, None] != index
        if pairs != "all":
            near &= (chain[part, None] == chain) == (pairs == "within")
        error = (distances(predicted[..., part, :], predicted) - true_distance).abs()
        score = sum((error < limit).to(true.dtype) for limit in THRESHOLDS) / len(THRESHOLDS)
        rows.append((score * near).sum(-1) / near.sum(-1))  # 0 / 0 is NaN: nothing to judge by
    if not rows:
        return predicted.new_zeros(predicted.shape[:-1])
    return torch.cat(rows, dim=-1)


def lddt(
    predicted: torch.Tensor,
    true: torch.Tensor,
    mask: torch.Tensor,
    *,
    nucleic: torch.Tensor | None = None,
    chain: torch.Tensor | None = None,
    pairs: Pairs = "all",
) -> torch.Tensor:
    """Mean lDDT over the atoms that have one, ``[...]``. Arguments as ``lddt_per_atom``."""
    scores = lddt_per_atom(predicted, true, mask, nucleic=nucleic, chain=chain, pairs=pairs)
    return scores.nanmean(-1)


def _check(
    predicted: torch.Tensor,
    true: torch.Tensor,
    mask: torch.Tensor,
    nucleic: torch.Tensor | None,
    chain: torch.Tensor | None,
    pairs: str,
) -> None:
    check_points(predicted, true, mask)
    if nucleic is not None and (nucleic.shape != mask.shape or nucleic.dtype != torch.bool):
        raise ValueError(
            f"nucleic must be bool [{len(mask)}], got {nucleic.dtype} {tuple(nucleic.shape)}"
        )
    if pairs not in ("all", "within", "between"):
        raise ValueError(f"pairs must be all, within or between, got {pairs!r}")
    if pairs != "all" and (chain is None or chain.shape != mask.shape):
        found = "none" if chain is None else str(tuple(chain.shape))
        raise ValueError(f"pairs={pairs!r} needs chain [{len(mask)}], got {found}")


def check_points(predicted: torch.Tensor, true: torch.Tensor, mask: torch.Tensor) -> None:
    """Raises ``ValueError`` unless the shapes are ``[..., A, 3]``, ``[A, 3]`` and bool ``[A]``."""
    if true.dim() != 2 or true.shape[-1] != 3 or predicted.shape[-2:] != true.shape:
        raise ValueError(
            f"predicted must be [..., A, 3] and true [A, 3], got "
            f"{tuple(predicted.shape)} and {tuple(true.shape)}"
        )
    if mask.shape != true.shape[:1] or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool [{true.shape[0]}], got {mask.dtype} {tuple(mask.shape)}"
        )
