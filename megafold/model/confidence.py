"""How sure the model is of a structure it drew: what ``predict_confidence`` returns.

Shape letters: K samples, N tokens, A atoms, C chains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megafold.model.alphafold3 import AlphaFold3

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


def predict_confidence(model: AlphaFold3, batch: Batch, coordinates: torch.Tensor) -> Confidence:
    """Confidence of ``coordinates`` ``[K, A, 3]`` angstrom that ``sample`` drew for ``batch``.

    Not built yet: raises ``NotImplementedError``.
    """
    raise NotImplementedError("the confidence head is not built yet")
