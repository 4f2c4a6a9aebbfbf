"""Frames: errors seen from them are zero for the truth, and move with nothing."""

from __future__ import annotations

import dataclasses

import torch

from megafold.geometry import random_rotations
from megafold.model.frames import alignment_error, express_in_frames, resolved_frames
from tests.model.seeds import seeded


def moved(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    rotation = random_rotations(1, seeded(seed))[0].to(x)
    return x @ rotation.T + torch.tensor([5.0, -30.0, 8.0]).to(x)


def test_points_are_expressed_in_the_frame_of_algorithm_29():
    # a on x, b at the origin, c on y: the first axis halves the angle, the second goes to c.
    x = torch.tensor([[2.0, 0, 0], [0, 0, 0], [0, 3.0, 0]])
    points = torch.tensor([[1.0, 1, 0], [-1.0, 1, 0], [0, 0, 1.0]])
    got = express_in_frames(x, torch.tensor([[0, 1, 2]]), points)[0]
    root = 2**0.5
    torch.testing.assert_close(got, torch.tensor([[root, 0, 0], [0, root, 0], [0, 0, 1.0]]))


def test_what_a_frame_sees_does_not_depend_on_where_the_structure_stands(batch):
    frames = batch.frame_atoms[batch.frame_mask]
    x = batch.positions.double()
    one = express_in_frames(x, frames, x)
    two = express_in_frames(moved(x), frames, moved(x))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)  # the rotation is float32


def test_the_alignment_error_of_a_structure_with_itself_is_zero_wherever_it_stands(batch):
    x = batch.positions.double()
    frames = batch.frame_atoms[batch.frame_mask]
    for other in (x, moved(x)):
        error = alignment_error(other, x, frames, batch.center_atom)
        torch.testing.assert_close(error, torch.zeros_like(error), atol=1e-5, rtol=0)


def test_the_alignment_error_of_a_mirror_image_is_not_zero(batch):
    x = batch.positions.double()
    frames = batch.frame_atoms[batch.frame_mask]
    assert alignment_error(-x, x, frames, batch.center_atom).mean() > 1.0


def test_the_alignment_error_of_a_point_moved_alone_is_how_far_it_moved(batch):
    true = batch.positions.double()
    x = true.clone()
    atom = int(batch.center_atom[20])
    x[atom] += torch.tensor([3.0, 4.0, 0.0])
    untouched = batch.frame_mask & (batch.frame_atoms != atom).all(-1)
    error = alignment_error(x, true, batch.frame_atoms[untouched], torch.tensor([atom]))
    torch.testing.assert_close(error, torch.full_like(error, 5.0))


def test_a_frame_needs_all_its_atoms_resolved(batch):
    assert torch.equal(resolved_frames(batch), batch.frame_mask)
    atom = int(batch.frame_atoms[batch.frame_mask][0, 2])
    resolved = batch.resolved.clone()
    resolved[atom] = False
    lost = resolved_frames(dataclasses.replace(batch, resolved=resolved)) != batch.frame_mask
    assert torch.equal(lost, batch.frame_mask & (batch.frame_atoms == atom).any(-1))
