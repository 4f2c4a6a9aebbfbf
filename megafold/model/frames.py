"""Frames of tokens and errors measured in them (Algorithms 29 and 30).

Shape letters: N tokens, A atoms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

from megafold.geometry import without_autocast

if TYPE_CHECKING:
    from megafold.data.batch import Batch


@without_autocast
def express_in_frames(
    x: torch.Tensor, frame_atoms: torch.Tensor, points: torch.Tensor
) -> torch.Tensor:
    """Points as seen from each frame (Algorithm 29).

    Args:
        x: Coordinates ``[A, 3]`` angstrom.
        frame_atoms: ``[N, 3]`` int64, atoms a, b and c of each frame; b is its origin.
        points: ``[M, 3]`` angstrom.

    Returns:
        ``[N, M, 3]`` angstrom; zero axes where the three atoms are in line.
    """
    a, b, c = x[frame_atoms].unbind(1)
    to_a, to_c = normalize(a - b, dim=-1), normalize(c - b, dim=-1)
    first = normalize(to_a + to_c, dim=-1)
    second = normalize(to_c - to_a, dim=-1)
    axes = torch.stack([first, second, torch.linalg.cross(first, second)], dim=-1)  # columns
    return (points[None] - b[:, None]) @ axes


def alignment_error(
    x: torch.Tensor, true: torch.Tensor, frame_atoms: torch.Tensor, point_atoms: torch.Tensor
) -> torch.Tensor:
    """How far each point is off once each frame is superposed, ``[N, M]`` (Algorithm 30).

    Args:
        x: Predicted ``[A, 3]`` angstrom.
        true: ``[A, 3]`` angstrom.
        frame_atoms: ``[N, 3]`` int64.
        point_atoms: ``[M]`` int64, the atom that is each point.
    """
    seen = express_in_frames(x, frame_atoms, x[point_atoms])
    seen -= express_in_frames(true, frame_atoms, true[point_atoms])
    return torch.linalg.vector_norm(seen, dim=-1)


def resolved_frames(batch: Batch) -> torch.Tensor:
    """Tokens with a frame whose three atoms are resolved, ``[N]`` bool."""
    return batch.frame_mask & batch.token_mask & batch.resolved[batch.frame_atoms].all(-1)
