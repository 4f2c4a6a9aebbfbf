"""Rigid motions of point sets: random placement and weighted superposition.

Shape letters: S copies, A atoms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch

P = ParamSpec("P")

# Of eigenvalues that differ by less than a part in 10^8 several are left, each as good as the other
# to within that part.
_SQUARES = 28


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
    return _rotations(torch.nn.functional.normalize(q, dim=-1))


def _rotations(quaternions: torch.Tensor) -> torch.Tensor:
    """``[..., 3, 3]`` of unit quaternions ``[..., 4]``, the real part first."""
    w, x, y, z = quaternions.unbind(-1)
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
    count. Carries no gradient. Float32 whatever the input. NaN where coordinates are not finite.
    """
    mobile, target, weight = mobile.float(), target.float(), weight.float()[..., None]
    total = weight.sum(-2, keepdim=True).clamp(min=1e-8)
    mean_m = (mobile * weight).sum(-2, keepdim=True) / total
    mean_t = (target * weight).sum(-2, keepdim=True) / total
    covariance = ((target - mean_t) * weight).transpose(-1, -2) @ (mobile - mean_m)
    return (mobile - mean_m) @ best_rotations(covariance).transpose(-1, -2) + mean_t


@without_autocast
def best_rotations(covariance: torch.Tensor) -> torch.Tensor:
    """The rotation R for which ``trace(R^T C)`` is largest, of each C ``[..., 3, 3]``.

    By Horn (1987): its quaternion is the eigenvector of the largest eigenvalue of a symmetric 4 by
    4 matrix. That is squared over and over, in float64, until nothing else is left of it: the
    decompositions of ``torch.linalg`` have the host wait for the GPU, to ask if they converged,
    and cannot be recorded in a CUDA graph. The dtype is that of C; of no C but zero R is identity.
    """
    (xx, yx, zx), (xy, yy, zy), (xz, yz, zz) = (
        row.unbind(-1) for row in covariance.double().unbind(-2)
    )
    rows = [
        xx + yy + zz, yz - zy, zx - xz, xy - yx,
        yz - zy, xx - yy - zz, xy + yx, zx + xz,
        zx - xz, xy + yx, yy - xx - zz, yz + zy,
        xy - yx, zx + xz, yz + zy, zz - xx - yy,
    ]  # fmt: skip
    matrix = torch.stack(rows, dim=-1).unflatten(-1, (4, 4))
    size = torch.linalg.matrix_norm(matrix, keepdim=True).clamp(min=1e-300)
    # No eigenvalue is negative any more; the largest is 1 to 2.
    matrix = matrix / size + torch.eye(4, dtype=torch.float64, device=matrix.device)
    for i in range(_SQUARES):
        matrix = matrix @ matrix
        if i % 4 == 3:
            matrix = matrix / matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    # Its columns are multiples of the eigenvector, the longest that with the largest diagonal.
    longest = matrix.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    quaternion = torch.take_along_dim(matrix, longest, dim=-1).squeeze(-1)
    return _rotations(torch.nn.functional.normalize(quaternion, dim=-1)).to(covariance.dtype)


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distances ``[..., M, N]`` of points a ``[..., M, 3]`` to b ``[..., N, 3]``.

    From differences of coordinates: by the product of the two, which ``torch.cdist`` takes by
    default, points far from the origin lose digits.
    """
    if a.is_cuda:  # there cdist has a block of threads for each pair: 1.6 ms for 3,088 by 384
        return torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), dim=-1)
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
