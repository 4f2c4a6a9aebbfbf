"""Training losses (supplement, sections 3.7.1 and 4.4).

Shape letters: S noised copies, A atoms, N tokens, P atom pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from megafold.geometry import centre_random_augmentation, weighted_rigid_align
from megafold.model.alphafold3 import AlphaFold3
from megafold.model.diffusion import SIGMA_DATA
from megafold.model.gather import take
from megafold.model.heads import distance_breaks

if TYPE_CHECKING:
    from megafold.data.batch import Batch

WEIGHT_DIFFUSION, WEIGHT_DISTOGRAM = 4.0, 0.03
LDDT_RADIUS, LDDT_RADIUS_NUCLEIC = 15.0, 30.0  # angstrom
# Pairs times copies held at once by the smooth lDDT.
LDDT_CHUNK = 1 << 24

NoiseWeighting = Literal["karras", "printed"]


@dataclass(frozen=True)
class Losses:
    """Each a scalar tensor. ``mse`` and ``smooth_lddt`` are averages over the copies."""

    total: torch.Tensor
    mse: torch.Tensor  # weighted by noise level
    smooth_lddt: torch.Tensor
    distogram: torch.Tensor

    def as_floats(self) -> dict[str, float]:
        """Plain numbers by name, for logs."""
        return {name: float(value.detach()) for name, value in vars(self).items()}


def training_loss(
    model: AlphaFold3,
    batch: Batch,
    *,
    generator: torch.Generator,
    noise_weighting: NoiseWeighting = "karras",
) -> Losses:
    """One trunk pass, many noised copies, and the losses.

    ``generator`` (on the CPU) is the only source of randomness: cycles, alignment rows,
    dropout, placement and noise. Raises ``ValueError`` if no atom is resolved.
    """
    if not bool(batch.resolved.any()):
        raise ValueError("the batch has no resolved atom to learn from")
    device = batch.positions.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # Dropout draws from torch's own generator, which checkpointing replays.
        torch.manual_seed(_draw_seed(generator))
        cycles = int(torch.randint(1, model.config.cycles + 1, (), generator=generator))
        trunk = model(batch, generator=generator, cycles=cycles)
        condition = model.diffusion.condition(batch, trunk)
        x_true, x_noisy, t = _noised_copies(batch, model.config.diffusion_samples, generator)
        x = model.diffusion(x_noisy, t, batch, trunk, condition)
    weight = noise_weight(t, noise_weighting)
    mse = (weight * aligned_mse(x, x_true, batch)).mean()
    lddt = smooth_lddt_loss(x, batch).mean()
    distogram = distogram_loss(model.distogram_head(trunk.z), batch)
    total = WEIGHT_DIFFUSION * (mse + lddt) + WEIGHT_DISTOGRAM * distogram
    return Losses(total, mse, lddt, distogram)


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


def aligned_mse(x: torch.Tensor, x_true: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean squared error after moving the truth onto the prediction, ``[S]`` (equations 2, 3).

    Nucleic acids weigh 6, ligands 11, proteins 1; unresolved atoms do not count.
    """
    token = batch.atom_to_token
    weight = 1.0 + 5.0 * (batch.is_dna | batch.is_rna)[token] + 10.0 * batch.is_ligand[token]
    weight = weight * batch.resolved
    aligned = weighted_rigid_align(x_true, x.detach(), weight)
    squared = (x - aligned).square().sum(-1)
    return (squared * weight).sum(-1) / (3.0 * batch.resolved.sum().clamp(min=1))


def smooth_lddt_loss(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Algorithm 27: one minus a smooth lDDT over all atom pairs near in the truth, ``[S]``.

    Works on the list of near pairs, so that S x A x A is never held; large lists are
    taken in groups of copies and recomputed in the backward pass.
    """
    first, second, weight = near_pairs(batch)
    if len(first) == 0:
        return x.sum(dim=(1, 2)) * 0.0
    true = torch.linalg.vector_norm(batch.positions[first] - batch.positions[second], dim=-1)

    def score(copies: torch.Tensor) -> torch.Tensor:
        difference = take(copies, first, dim=1) - take(copies, second, dim=1)
        error = (difference.square().sum(-1).add(1e-10).sqrt() - true).abs()
        close = sum(torch.sigmoid(threshold - error) for threshold in (0.5, 1.0, 2.0, 4.0)) / 4
        return (close * weight).sum(-1) / weight.sum()

    size = max(1, LDDT_CHUNK // len(first))
    if size >= x.shape[0]:
        return 1.0 - score(x)
    parts = [checkpoint(score, part, use_reentrant=False) for part in x.split(size)]
    return 1.0 - torch.cat(parts)


@torch.no_grad()
def near_pairs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Resolved atom pairs that lDDT looks at: indices ``[P]``, ``[P]`` and weights ``[P]``.

    A pair l < m counts once for l and once for m; each asks whether the other lies within
    its own radius, 30 angstrom around nucleotides and 15 around all else.
    """
    nucleic = (batch.is_dna | batch.is_rna)[batch.atom_to_token]
    radius = torch.where(nucleic, LDDT_RADIUS_NUCLEIC, LDDT_RADIUS)
    distance = torch.cdist(batch.positions, batch.positions)
    near = distance < radius[:, None]
    near = near & batch.resolved[:, None] & batch.resolved[None, :]
    count = near.to(torch.uint8) + near.T.to(torch.uint8)
    first, second = torch.triu(count, diagonal=1).nonzero(as_tuple=True)
    return first, second, count[first, second].to(batch.positions.dtype)


def distogram_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy of the binned distances between representative atoms (section 4.4)."""
    position = batch.positions[batch.representative_atom]
    known = batch.resolved[batch.representative_atom] & batch.token_mask
    target = torch.bucketize(
        torch.cdist(position, position), distance_breaks(logits.shape[-1], logits.device)
    )
    loss = cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
    pair = (known[:, None] & known[None, :]).flatten()
    return (loss * pair).sum() / pair.sum().clamp(min=1)


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
    t = SIGMA_DATA * torch.exp(-1.2 + 1.5 * torch.randn(samples, generator=generator)).to(device)
    noise = torch.randn(x.shape, generator=generator).to(device)
    return x, x + t[:, None, None] * noise, t


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(0, 2**62, (), generator=generator))
