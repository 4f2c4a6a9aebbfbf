"""Rigid superposition of structures and the deviation that is left."""

from __future__ import annotations

import torch

from megafold.geometry import weighted_rigid_align


def superpose(mobile: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``mobile`` moved rigidly onto ``target`` by the atoms in ``mask``; no mirror images.

    mobile ``[..., A, 3]``, target ``[A, 3]`` (angstrom), mask ``[A]`` bool; returns as mobile.
    """
    flat = mobile.reshape(-1, *mobile.shape[-2:])
    moved = weighted_rigid_align(flat, target.expand_as(flat), mask.float())
    return moved.reshape(mobile.shape)


def rmsd(mobile: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Root-mean-square deviation in angstrom after superposition, ``[...]``."""
    moved = superpose(mobile, target, mask)
    squared = (moved - target).square().sum(-1)[..., mask]
    return squared.mean(-1).sqrt()
