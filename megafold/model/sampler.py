"""Drawing structures from noise (Algorithm 18)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, overload

import torch

from megafold.geometry import centred_and_placed, random_rotations, sent
from megafold.model.alphafold3 import AlphaFold3
from megafold.model.checks import check_batch, check_generator
from megafold.model.diffusion import SIGMA_DATA, DiffusionConditioning, Trunk
from megafold.model.memory import check_memory
from megafold.model.replay import replayed

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
    trunk: Trunk | None = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def sample(
    model: AlphaFold3, batch: Batch, *, generator: torch.Generator,
    steps: int = ..., samples: int = ..., trajectory: Literal[True],
    trunk: Trunk | None = ...,
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
    trunk: Trunk | None = None,
) -> torch.Tensor | Trajectory:
    """Coordinates ``[samples, A, 3]`` float32 in angstrom, or the whole ``Trajectory``.

    ``generator`` (on the CPU) is the only source of randomness. The model is put into
    evaluation mode for the duration. ``trunk`` is what ``model(batch, ...)`` gave for this
    batch, if it has been run already.

    Raises:
        TypeError: ``generator`` is no generator.
        ValueError: ``steps`` or ``samples`` is below 1, or the model cannot model the batch.
        BatchTooLargeError: The device has not enough memory left.
    """
    check_generator(generator)
    check_batch(model.config, batch)
    check_memory(model, batch, samples=samples, training=False)
    if steps < 1 or samples < 1:
        raise ValueError(f"steps and samples must be at least 1, got {steps} and {samples}")
    training = model.training
    model.eval()
    try:
        if trunk is None:
            trunk = model(batch, generator=generator, cycles=model.config.cycles)
        condition = model.diffusion.condition(batch, trunk)
        denoise = _denoiser(model, batch, trunk, condition)
        return integrate(denoise, batch, generator, steps, samples, trajectory)
    finally:
        model.train(training)


def rollout(
    model: AlphaFold3,
    batch: Batch,
    trunk: Trunk,
    condition: DiffusionConditioning,
    generator: torch.Generator,
) -> torch.Tensor:
    """One structure ``[A, 3]`` in few steps and without gradient, as training needs it."""
    steps, scale = model.config.rollout_steps, model.config.rollout_step_scale
    with torch.no_grad():
        denoise = _denoiser(model, batch, trunk, condition)
        return integrate(denoise, batch, generator, steps, step_scale=scale)[0]


def _denoiser(
    model: AlphaFold3, batch: Batch, trunk: Trunk, condition: DiffusionConditioning
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The model as :func:`integrate` calls it: coordinates ``[S, A, 3]`` and one noise level."""
    condition = model.diffusion.before_steps(condition)
    denoise = replayed(model.diffusion, batch.ref_pos, batch, trunk.windows, condition)
    return lambda x, t: denoise(x, t.expand(len(x)).contiguous())


def integrate(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batch: Batch,
    generator: torch.Generator,
    steps: int,
    samples: int = 1,
    trajectory: bool = False,
    step_scale: float = STEP_SCALE,
) -> torch.Tensor | Trajectory:
    """Follow the noise levels down, adding a little fresh noise while they are high.

    ``denoise`` takes coordinates ``[samples, A, 3]`` in angstrom and a noise level. Each step
    goes ``step_scale`` times the way to the next level.
    """
    device = batch.ref_pos.device
    levels = noise_schedule(steps)
    gamma = torch.where(levels[1:] > GAMMA_MIN, GAMMA_0, 0.0)
    times = levels[:-1] * (gamma + 1.0)
    extra = NOISE_SCALE * (times.square() - levels[:-1].square()).clamp(min=0.0).sqrt()
    way = step_scale * (times - levels[1:]) / times
    shape = (samples, batch.num_atoms, 3)

    there = sent(times, device)
    x = levels[0] * sent(torch.randn(shape, generator=generator), device)
    # At once: each of them costs the host more than the GPU.
    rotations = sent(random_rotations(steps * samples, generator), device)
    rotations = rotations.unflatten(0, (steps, samples))
    shifts = sent(torch.randn(steps, samples, 1, 3, generator=generator), device)
    guesses = []
    for i, (noise, part) in enumerate(zip(extra.tolist(), way.tolist(), strict=True)):
        x = centred_and_placed(x, batch.atom_mask, rotations[i], shifts[i])
        if noise > 0.0:
            x = x + noise * sent(torch.randn(shape, generator=generator), device)
        guess = denoise(x, there[i])
        x = torch.lerp(x, guess, part)
        if trajectory:
            guesses.append(guess)
    if trajectory:
        return Trajectory(x, torch.stack(guesses), levels[:-1])
    return x
