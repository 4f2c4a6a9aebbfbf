"""Drawing structures from noise (Algorithm 18)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, overload

import torch

from megafold.geometry import centre_random_augmentation
from megafold.model.alphafold3 import AlphaFold3
from megafold.model.diffusion import SIGMA_DATA

if TYPE_CHECKING:
    from megafold.data.batch import Batch

SIGMA_MAX, SIGMA_MIN, RHO = 160.0, 0.0004, 7.0
GAMMA_0, GAMMA_MIN = 0.8, 1.0
NOISE_SCALE, STEP_SCALE = 1.003, 1.5


@dataclass(frozen=True)
class Trajectory:
    """What the sampler went through. Each step is the denoised guess at that noise level."""

    coordinates: torch.Tensor  # [samples, A, 3], the result
    denoised: torch.Tensor  # [steps, samples, A, 3]
    noise_levels: torch.Tensor  # [steps], angstrom


def noise_schedule(steps: int) -> torch.Tensor:
    """Noise levels ``[steps + 1]`` in angstrom, from large to small (equation 7)."""
    u = torch.linspace(0.0, 1.0, steps + 1)
    top, bottom = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return SIGMA_DATA * (top + u * (bottom - top)) ** RHO


@overload
def sample(
    model: AlphaFold3, batch: Batch, *, generator: torch.Generator,
    steps: int = ..., samples: int = ..., trajectory: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def sample(
    model: AlphaFold3, batch: Batch, *, generator: torch.Generator,
    steps: int = ..., samples: int = ..., trajectory: Literal[True],
) -> Trajectory: ...  # fmt: skip
@torch.no_grad()
def sample(
    model: AlphaFold3,
    batch: Batch,
    *,
    generator: torch.Generator,
    steps: int = 200,
    samples: int = 1,
    trajectory: bool = False,
) -> torch.Tensor | Trajectory:
    """Coordinates ``[samples, A, 3]`` float32 in angstrom, or the whole ``Trajectory``.

    ``generator`` (on the CPU) is the only source of randomness. The model is put into
    evaluation mode for the duration.
    """
    if steps < 1 or samples < 1:
        raise ValueError(f"steps and samples must be at least 1, got {steps} and {samples}")
    training = model.training
    model.eval()
    try:
        trunk = model(batch, generator=generator, cycles=model.config.cycles)
        condition = model.diffusion.condition(batch, trunk)

        def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return model.diffusion(x, t.expand(samples), batch, trunk, condition)

        return _integrate(denoise, batch, generator, steps, samples, trajectory)
    finally:
        model.train(training)


def _integrate(denoise, batch: Batch, generator, steps, samples, trajectory):
    """Follow the noise levels down, adding a little fresh noise while they are high."""
    device = batch.ref_pos.device
    levels = noise_schedule(steps)
    shape = (samples, batch.num_atoms, 3)
    x = levels[0] * torch.randn(shape, generator=generator).to(device)
    guesses = []
    for previous, level in itertools.pairwise(levels):
        x = centre_random_augmentation(x, batch.atom_mask, generator)
        gamma = GAMMA_0 if level > GAMMA_MIN else 0.0
        t = previous * (gamma + 1.0)
        extra = NOISE_SCALE * (t.square() - previous.square()).clamp(min=0.0).sqrt()
        x = x + extra.to(device) * torch.randn(shape, generator=generator).to(device)
        guess = denoise(x, t.to(device))
        x = x + STEP_SCALE * (level - t).to(device) * (x - guess) / t.to(device)
        guesses.append(guess)
    if trajectory:
        return Trajectory(x, torch.stack(guesses), levels[:-1])
    return x
