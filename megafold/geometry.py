"""Rigid motions of point sets: random placement and weighted superposition.

Shape letters: S copies, A atoms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch

P = ParamSpec("P")


def without_autocast(function: Callable[P, torch.Tensor]) -> Callable[P, torch.Tensor]:
    """Coordinates are multiplied in their own precision, whatever the model's autocast says.

    A rotation in bfloat16 would move an atom 100 angstrom from the origin by half an angstrom.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> torch.Tensor:
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def sent(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Numbers drawn on the CPU, on the device; without a wait for what a GPU is at."""
    if device.type == "cuda":
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)


def random_rotations(count: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform rotations ``[count, 3, 3]`` float32 on the CPU, from random unit quaternions."""
    q = torch.randn(count, 4, generator=generator)
    w, x, y, z = torch.nn.functional.normalize(q, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


@without_autocast
def centre_random_augmentation(
    x: torch.Tensor, mask: torch.Tensor, generator: torch.Generator, *, spread: float = 1.0
) -> torch.Tensor:
    """Algorithm 19: centre each copy, rotate it at random, shift it by ``spread`` angstrom.

    x ``[S, A, 3]``, mask ``[A]`` bool (the atoms that define the centre).
    """
    rotation = sent(random_rotations(x.shape[0], generator), x.device).to(x.dtype)
    shift = spread * sent(torch.randn(x.shape[0], 1, 3, generator=generator), x.device).to(x.dtype)
    return centred_and_placed(x, mask, rotation, shift)


@without_autocast
def centred_and_placed(
    x: torch.Tensor, mask: torch.Tensor, rotation: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """Each copy of x ``[S, A, 3]`` centred, then rotated ``[S, 3, 3]`` and shifted ``[S, 1, 3]``.

    mask ``[A]`` bool: the atoms that define the centre.
    """
    weight = mask.to(x.dtype)[:, None]
    centre = (x * weight).sum(-2, keepdim=True) / weight.sum().clamp(min=1.0)
    return (x - centre) @ rotation.transpose(-1, -2) + shift


@torch.no_grad()
@without_autocast
def weighted_rigid_align(
    mobile: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Algorithm 28: ``mobile`` moved rigidly onto ``target``; mirror images are not allowed.

    mobile and target ``[S, A, 3]``, weight ``[A]`` or ``[S, A]``, zero where an atom does not
    count. Carries no gradient. Float32 whatever the input. Raises ``FloatingPointError`` for
    coordinates that are not finite.
    """
    mobile, target, weight = mobile.float(), target.float(), weight.float()[..., None]
    total = weight.sum(-2, keepdim=True).clamp(min=1e-8)
    mean_m = (mobile * weight).sum(-2, keepdim=True) / total
    mean_t = (target * weight).sum(-2, keepdim=True) / total
    covariance = ((target - mean_t) * weight).transpose(-1, -2) @ (mobile - mean_m)
    try:
        u, _, vh = torch.linalg.svd(covariance)
    except torch.linalg.LinAlgError as error:
        raise FloatingPointError("cannot superpose coordinates that are not finite") from error
    # A reflection would fit better than any rotation: flip the least important axis.
    flip = torch.ones_like(u[..., 0])
    flip[..., 2] = torch.linalg.det(u @ vh).sign()
    rotation = (u * flip[..., None, :]) @ vh
    return (mobile - mean_m) @ rotation.transpose(-1, -2) + mean_t


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distances ``[..., M, N]`` of points a ``[..., M, 3]`` to b ``[..., N, 3]``.

    From differences of coordinates: by the product of the two, which ``torch.cdist`` takes by
    default, points far from the origin lose digits.
    """
    if a.is_cuda:  # there cdist has a block of threads for each pair: 1.6 ms for 3,088 by 384
        return torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), dim=-1)
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
