"""lDDT: how well local distances are reproduced, without superposition.

Mariani et al. (2013), with the radii AlphaFold 3 uses (supplement, section 6.2).
"""

from __future__ import annotations

import torch

RADIUS, RADIUS_NUCLEIC = 15.0, 30.0  # angstrom
THRESHOLDS = (0.5, 1.0, 2.0, 4.0)  # angstrom


def lddt_per_atom(
    predicted: torch.Tensor,
    true: torch.Tensor,
    mask: torch.Tensor,
    *,
    nucleic: torch.Tensor | None = None,
) -> torch.Tensor:
    """lDDT of each atom, from 0 to 1; NaN where an atom is masked or has no neighbour.

    Args:
        predicted: ``[..., A, 3]`` angstrom.
        true: ``[A, 3]`` angstrom.
        mask: ``[A]`` bool, the atoms whose true position is known.
        nucleic: ``[A]`` bool, atoms of nucleic acids, which look 30 instead of 15 angstrom far.

    Returns:
        ``[..., A]``.
    """
    _check(predicted, true, mask)
    true_distance = torch.cdist(true, true)
    radius = torch.full(mask.shape, RADIUS, device=mask.device)
    if nucleic is not None:
        radius = torch.where(nucleic, RADIUS_NUCLEIC, radius)
    near = (true_distance < radius[:, None]) & mask[:, None] & mask[None, :]
    near.fill_diagonal_(False)
    error = (torch.cdist(predicted, predicted) - true_distance).abs()
    score = sum((error < threshold).to(true.dtype) for threshold in THRESHOLDS) / len(THRESHOLDS)
    return (score * near).sum(-1) / near.sum(-1)  # 0 / 0 is NaN: nothing to judge by


def lddt(
    predicted: torch.Tensor,
    true: torch.Tensor,
    mask: torch.Tensor,
    *,
    nucleic: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean lDDT over the atoms that have one, ``[...]``. Arguments as ``lddt_per_atom``."""
    return lddt_per_atom(predicted, true, mask, nucleic=nucleic).nanmean(-1)


def _check(predicted: torch.Tensor, true: torch.Tensor, mask: torch.Tensor) -> None:
    if true.dim() != 2 or true.shape[-1] != 3 or predicted.shape[-2:] != true.shape:
        raise ValueError(
            f"predicted must be [..., A, 3] and true [A, 3], got "
            f"{tuple(predicted.shape)} and {tuple(true.shape)}"
        )
    if mask.shape != true.shape[:1] or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool [{true.shape[0]}], got {mask.dtype} {tuple(mask.shape)}"
        )
