"""How sure the model is of a structure it drew: what ``predict_confidence`` returns.

Shape letters: K samples, N tokens, A atoms, C chains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megafold.model.accessibility import fraction_disordered
from megafold.model.alphafold3 import AlphaFold3
from megafold.model.checks import check_batch
from megafold.model.diffusion import Trunk
from megafold.model.heads import ERROR_BIN, distance_breaks
from megafold.model.pair_loss import row_chunks
from megafold.model.ranking import (
    CONTACT,
    chain_pair_tm,
    global_pde,
    has_clash,
    interface_tokens,
    predicted_tm,
    ranking_score,
    tm_scale,
)

if TYPE_CHECKING:
    from megafold.data.batch import Batch


@dataclass(frozen=True)
class Confidence:
    """Confidence of K samples of one input (supplement, section 5.9). Float32 unless noted.

    Padding tokens and atoms are left in place and NaN. Chains are in the order of their
    ``asym_id``, ``chain_ids`` says which they are.
    """

    chain_ids: torch.Tensor  # [C] int64, asym_id of each chain
    plddt: torch.Tensor  # [K, A], 0 to 100: expected lDDT of each atom
    pae: torch.Tensor  # [K, N, N] angstrom: error of token j in the frame of token i
    pde: torch.Tensor  # [K, N, N] angstrom: error of the distance between tokens, symmetric
    resolved: torch.Tensor  # [K, A] probability that an experiment would see the atom
    ptm: torch.Tensor  # [K], 0 to 1; NaN without any valid frame
    iptm: torch.Tensor  # [K], 0 to 1; NaN for a single chain, or without any valid frame
    chain_ptm: torch.Tensor  # [K, C], 0 to 1; NaN for a chain without a valid frame
    chain_pair_iptm: torch.Tensor  # [K, C, C], 0 to 1, symmetric; NaN where neither has a frame;
    # the diagonal is chain_ptm
    gpde: torch.Tensor  # [K] angstrom: pde averaged by the predicted contact probability
    has_clash: torch.Tensor  # [K] bool
    fraction_disordered: torch.Tensor  # [K], share of protein residues; 0 without protein
    ranking_score: torch.Tensor  # [K], -100 to 1.5: 0.8 ipTM + 0.2 pTM + 0.5 disordered - 100 clash
    contact_probs: torch.Tensor  # [N, N], probability of a distance below 8 angstrom (distogram)


@torch.no_grad()
def predict_confidence(
    model: AlphaFold3, batch: Batch, coordinates: torch.Tensor, *, trunk: Trunk | None = None
) -> Confidence:
    """How sure the model is of structures that ``sample`` drew for ``batch``.

    Args:
        model: Put into evaluation mode for the duration.
        batch: What the structures are of.
        coordinates: ``[K, A, 3]`` angstrom.
        trunk: What ``model(batch, ...)`` gave for this batch; without it the trunk is run
            again, with alignment rows drawn from a generator of seed 0.

    Raises:
        ValueError: ``coordinates`` is not ``[K, A, 3]`` of this batch, or not finite.
    """
    expected = (batch.num_atoms, 3)
    if coordinates.dim() != 3 or tuple(coordinates.shape[1:]) != expected:
        raise ValueError(
            f"coordinates must be [samples, {batch.num_atoms}, 3] for this batch, "
            f"got {tuple(coordinates.shape)}"
        )
    if len(coordinates) == 0:
        raise ValueError("coordinates holds no sample")
    if not bool(torch.isfinite(coordinates).all()):
        raise ValueError("coordinates are not all finite")
    check_batch(model.config, batch)
    training = model.training
    model.eval()
    try:
        if trunk is None:
            generator = torch.Generator().manual_seed(0)
            trunk = model(batch, generator=generator, cycles=model.config.cycles)
        contacts = contact_probabilities(model, batch, trunk)
        results = [_one_sample(model, batch, trunk, contacts, x) for x in coordinates]
    finally:
        model.train(training)
    stacked = {
        name: torch.stack(
            [torch.as_tensor(result[name], device=batch.positions.device) for result in results]
        )
        for name in results[0]
    }
    chains = torch.unique(batch.asym_id[batch.token_mask])
    return Confidence(chain_ids=chains, contact_probs=contacts, **stacked)


@torch.no_grad()
def contact_probabilities(model: AlphaFold3, batch: Batch, trunk: Trunk) -> torch.Tensor:
    """Probability that representative atoms are within 8 angstrom, ``[N, N]``; padding NaN."""
    bins = model.config.distogram_bins
    upper = distance_breaks(bins, trunk.z.device)  # of all bins but the last, which is open
    close = torch.cat([upper <= CONTACT, upper.new_zeros(1, dtype=torch.bool)])
    rows = [
        model.distogram_head.rows(z, zt).float().softmax(-1)[..., close].sum(-1)
        for z, zt in row_chunks(bins, trunk.z, trunk.z.transpose(0, 1))
    ]
    return _without_padding(torch.cat(rows), batch)


def _one_sample(
    model: AlphaFold3, batch: Batch, trunk: Trunk, contacts: torch.Tensor, x: torch.Tensor
) -> dict[str, torch.Tensor | float]:
    """The fields of ``Confidence`` that belong to one structure x ``[A, 3]``."""
    head, config = model.confidence_head, model.config
    seen = head(batch, trunk.s_inputs, trunk.s, trunk.z, x)
    both, flipped = seen.z, seen.z.transpose(0, 1)

    # Expected errors and TM terms, a few rows of probabilities at a time.
    error = (torch.arange(config.pae_bins, device=x.device) + 0.5) * ERROR_BIN
    whole = tm_scale(batch.token_mask.sum())
    scale = tm_scale(interface_tokens(batch.asym_id, batch.token_mask)).float()
    pae, tm, tm_interface = [], [], []
    for z, zt, d0 in row_chunks(config.pae_bins, both, flipped, scale):
        probability = head.pae_rows(z, zt).float().softmax(-1)
        pae.append(_expected(probability, error))
        tm.append(_expected(probability, 1.0 / (1.0 + (error / whole).square())))
        term = 1.0 / (1.0 + (error / d0[..., None]).square())
        tm_interface.append(_expected(probability, term))
    error = (torch.arange(config.pde_bins, device=x.device) + 0.5) * ERROR_BIN
    pde = torch.cat(
        [
            _expected(head.pde_rows(z, zt).float().softmax(-1), error)
            for z, zt in row_chunks(config.pde_bins, both, flipped)
        ]
    )
    tm, tm_interface = torch.cat(tm), torch.cat(tm_interface)

    bins = config.plddt_bins
    centre = (torch.arange(bins, device=x.device) + 0.5) * (100.0 / bins)
    plddt = _expected(head.plddt(seen.s, batch.atom_to_token).float().softmax(-1), centre)
    resolved = head.resolved(seen.s, batch.atom_to_token).float().softmax(-1)[:, 1]

    frames = batch.frame_mask & batch.token_mask
    pairs = frames[:, None] & batch.token_mask
    other = batch.asym_id[:, None] != batch.asym_id
    ptm = predicted_tm(tm, pairs)
    iptm = predicted_tm(tm_interface, pairs & other)
    chain_pairs = chain_pair_tm(tm_interface, frames, batch.asym_id, batch.token_mask)
    disordered, clash = fraction_disordered(batch, x), has_clash(batch, x)
    real = batch.token_mask[:, None] & batch.token_mask
    return {
        "plddt": plddt.masked_fill(~batch.atom_mask, torch.nan),
        "pae": _without_padding(torch.cat(pae), batch),
        "pde": _without_padding(pde, batch),
        "resolved": resolved.masked_fill(~batch.atom_mask, torch.nan),
        "ptm": ptm,
        "iptm": iptm,
        "chain_ptm": chain_pairs.diagonal(),
        "chain_pair_iptm": chain_pairs,
        "gpde": global_pde(pde[real], contacts[real]),
        "has_clash": clash,
        "fraction_disordered": disordered,
        "ranking_score": ranking_score(ptm, iptm, disordered, clash),
    }


def _expected(probability: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Mean of ``value`` under probabilities ``[..., bins]``; a sum, as autocast rounds products."""
    return (probability * value.float()).sum(-1)


def _without_padding(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    return x.masked_fill(~(batch.token_mask[:, None] & batch.token_mask), torch.nan)
