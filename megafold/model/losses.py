"""The training loss: one trunk pass and everything that is learned from it.

As in AlphaFold 3 (supplement, sections 3.7.1, 4.3 and 4.4; equation 15).

Shape letters: S noised copies, A atoms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from megafold.geometry import centre_random_augmentation, sent
from megafold.model.alphafold3 import AlphaFold3
from megafold.model.capture import captured
from megafold.model.checks import check_batch, check_generator
from megafold.model.confidence_losses import (
    ConfidenceLosses,
    confidence_losses,
    distogram_loss,
    has_confidence_target,
)
from megafold.model.diffusion import SIGMA_DATA, Trunk
from megafold.model.diffusion_losses import aligned_mse, bond_loss, smooth_lddt_loss
from megafold.model.memory import check_memory
from megafold.model.permutation import permute_truth
from megafold.model.sampler import rollout
from megafold.model.stages import STAGES, Stage

if TYPE_CHECKING:
    from megafold.data.batch import Batch
    from megafold.model.heads import ConfidenceRepresentation, DistogramHead

WEIGHT_DIFFUSION, WEIGHT_DISTOGRAM, WEIGHT_CONFIDENCE = 4.0, 0.03, 1e-4

NoiseWeighting = Literal["karras", "printed"]


@dataclass(frozen=True)
class Losses:
    """Each a scalar tensor; ``mse``, ``bond`` and ``smooth_lddt`` are averages over the copies.

    The last four are 0 for a structure that is not good enough to learn confidence from
    (resolution outside 0.1 to 4 angstrom, or none).
    """

    total: torch.Tensor
    mse: torch.Tensor  # weighted by noise level
    bond: torch.Tensor  # weighted by noise level; counts in fine-tuning only
    smooth_lddt: torch.Tensor
    distogram: torch.Tensor
    plddt: torch.Tensor
    pde: torch.Tensor
    resolved: torch.Tensor
    pae: torch.Tensor  # counts in the last stage only

    def as_tensor(self) -> torch.Tensor:
        """All of them, fp32, in their order; without gradient."""
        return torch.stack([value.detach().float() for value in vars(self).values()])


def training_loss(
    model: AlphaFold3,
    batch: Batch,
    *,
    generator: torch.Generator,
    noise_weighting: NoiseWeighting = "karras",
    stage: Stage = STAGES["initial"],
) -> Losses:
    """One trunk pass, a rolled-out structure, many noised copies, and the losses.

    The truth is permuted to the rolled-out structure before any loss: identical chains and
    ligands, and equivalent atoms.

    Args:
        model: In training mode, if there is to be dropout.
        batch: With at least one resolved atom.
        generator: On the CPU, the only source of randomness: cycles, alignment rows, dropout,
            rollout, placement and noise.
        noise_weighting: See ``noise_weight``.
        stage: Decides which losses count, and how many copies there are at most.

    Raises:
        TypeError: ``generator`` is no generator on the CPU.
        ValueError: No atom is resolved, or the model cannot model the batch.
        BatchTooLargeError: The device has not enough memory left.
    """
    check_generator(generator)
    check_batch(model.config, batch)
    if not bool(batch.resolved.any()):
        raise ValueError("the batch has no resolved atom to learn from")
    device = batch.positions.device
    devices = [device] if device.type == "cuda" else []
    samples = min(model.config.diffusion_samples, stage.diffusion_samples)
    check_memory(model, batch, samples=samples, training=torch.is_grad_enabled())
    with torch.random.fork_rng(devices=devices):
        # Dropout draws from torch's own generator, which checkpointing replays.
        torch.manual_seed(_draw_seed(generator))
        cycles = int(torch.randint(1, model.config.cycles + 1, (), generator=generator))
        read = batch.for_model()
        trunk = model(read, generator=generator, cycles=cycles)
        condition = captured(model.diffusion.condition, read, trunk)
        x_rollout = rollout(model, read, trunk, condition, generator)
        seen = _seen(model, batch, trunk, x_rollout)  # while the CPU permutes, the GPU has work
        batch = permute_truth(batch, x_rollout)
        x_true, x_noisy, t = _noised_copies(batch, samples, generator)
        x = captured(model.diffusion, x_noisy, t, read, trunk.windows, condition)
        weight = noise_weight(t, noise_weighting)
        truth = batch.for_losses()
        mse, bond = captured(_of_atoms, x, x_true, weight, truth)
        lddt = smooth_lddt_loss(x, truth).mean()  # not captured: PyTorch's operators wait in it
        distogram = captured(_distogram, model.distogram_head, trunk.z, truth)
        confidence = _confidence(model, seen, truth, x_rollout)
    judged = confidence.plddt + confidence.pde + confidence.resolved
    total = (
        WEIGHT_DIFFUSION * (mse + stage.bond_weight * bond + lddt)
        + WEIGHT_DISTOGRAM * distogram
        + WEIGHT_CONFIDENCE * (judged + stage.pae_weight * confidence.pae)
    )
    return Losses(total, mse, bond, lddt, distogram, **vars(confidence))


def _seen(
    model: AlphaFold3, batch: Batch, trunk: Trunk, x: torch.Tensor
) -> ConfidenceRepresentation | None:
    if not has_confidence_target(batch):
        return None
    known = (trunk.s_inputs.detach(), trunk.s.detach(), trunk.z.detach())
    return captured(model.confidence_head, batch.for_losses(), *known, x)


def _confidence(
    model: AlphaFold3, seen: ConfidenceRepresentation | None, batch: Batch, x: torch.Tensor
) -> ConfidenceLosses:
    if seen is None:
        nothing = x.new_zeros(())
        return ConfidenceLosses(nothing, nothing, nothing, nothing)
    return captured(confidence_losses, model.confidence_head, seen, x, batch)


def _of_atoms(
    x: torch.Tensor, x_true: torch.Tensor, weight: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted errors of positions and bonds, averages over the copies."""
    mse = (weight * aligned_mse(x, x_true, batch)).mean()
    return mse, (weight * bond_loss(x, batch)).mean()


def _distogram(head: DistogramHead, z: torch.Tensor, batch: Batch) -> torch.Tensor:
    return distogram_loss(head.rows, z, batch, head.linear.out_features)


def noise_weight(t: torch.Tensor, weighting: NoiseWeighting = "karras") -> torch.Tensor:
    """Weight of the squared error at each noise level, ``[S]`` -> ``[S]``.

    ``karras`` is (t^2 + 16^2) / (16 t)^2, the weight of Karras et al. (2022), which makes
    the loss uniform in the network's own output. ``printed`` is what the supplement prints,
    (t^2 + 16^2) / (t + 16)^2, known as a misprint; it weighs high noise far more, where the
    fold as a whole and its handedness are decided.
    """
    if weighting not in get_args(NoiseWeighting):
        raise ValueError(
            f"unknown noise weighting {weighting!r}; known: {', '.join(get_args(NoiseWeighting))}"
        )
    scale = t * SIGMA_DATA if weighting == "karras" else t + SIGMA_DATA
    return (t.square() + SIGMA_DATA**2) / scale.square()


def _noised_copies(
    batch: Batch, samples: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Truth randomly placed, with and without noise, ``[S, A, 3]``, and levels ``[S]``."""
    device = batch.positions.device
    # An unresolved atom stands at the centre: its zero would be a point of the crystal's frame.
    resolved = batch.resolved[:, None]
    centre = (batch.positions * resolved).sum(0) / resolved.sum()
    x = torch.where(resolved, batch.positions, centre).expand(samples, -1, -1)
    x = centre_random_augmentation(x, batch.resolved, generator)
    t = SIGMA_DATA * torch.exp(-1.2 + 1.5 * torch.randn(samples, generator=generator))
    t = sent(t, device)
    noise = sent(torch.randn(x.shape, generator=generator), device)
    return x, x + t[:, None, None] * noise, t


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(0, 2**62, (), generator=generator))
