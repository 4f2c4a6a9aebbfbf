"""The sampler with a perfect denoiser, and its schedule."""

from __future__ import annotations

import pytest
import torch

from megafold.geometry import weighted_rigid_align
from megafold.metrics import rmsd
from megafold.model import CONFIGS, sampler
from tests.model.seeds import seeded


def test_a_perfect_denoiser_leads_to_the_truth(batch):
    x_true = batch.positions[None]

    def denoise(x, t):
        return weighted_rigid_align(x_true, x, batch.resolved.float())

    x = sampler.integrate(denoise, batch, seeded(), steps=20)
    assert rmsd(x, batch.positions, batch.resolved) < 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_the_rollout_of_every_configuration_leads_there_too(name, batch):
    config = CONFIGS[name]

    def denoise(x, t):
        return weighted_rigid_align(batch.positions[None], x, batch.resolved.float())

    steps, scale = config.rollout_steps, config.rollout_step_scale
    x = sampler.integrate(denoise, batch, seeded(), steps, step_scale=scale)
    assert rmsd(x, batch.positions, batch.resolved) < 0.1


def test_the_schedule_falls_from_2560_to_almost_nothing():
    levels = sampler.noise_schedule(200)
    assert len(levels) == 201
    torch.testing.assert_close(levels[0], torch.tensor(2560.0))
    torch.testing.assert_close(levels[-1], torch.tensor(16 * 0.0004), atol=1e-4, rtol=0.05)
    assert (levels.diff() < 0).all()
