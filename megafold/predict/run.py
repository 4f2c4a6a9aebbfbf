"""From a job to ranked structures.

Shape letters: N tokens, A atoms, C chains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from megafold.data.alignment import MAX_ROWS, Alignment
from megafold.data.alphafold_input import AlphaFoldInput
from megafold.data.batch import Batch, make_batch
from megafold.data.jobs import input_features, input_structure
from megafold.data.structure import Structure
from megafold.model import AlphaFold3, Confidence, predict_confidence, sample
from megafold.model.checks import check_batch
from megafold.model.memory import check_memory

Progress = Callable[..., Iterable[int]]


@dataclass(frozen=True)
class Prediction:
    """One sampled structure and how sure the model is of it. NaN where a score has no meaning."""

    seed: int
    sample: int  # from 0, of this seed
    structure: Structure  # every atom, with the job's bonds
    atom_plddt: np.ndarray  # [A], 0 to 100
    pae: np.ndarray  # [N, N] angstrom: error of token j in the frame of token i
    contact_probs: np.ndarray  # [N, N], 0 to 1; of the seed, the same for its samples
    token_chain_ids: tuple[str, ...]  # [N]
    token_res_ids: tuple[int, ...]  # [N], from 1
    chain_ids: tuple[str, ...]  # [C]
    chain_ptm: np.ndarray  # [C], 0 to 1
    chain_pair_iptm: np.ndarray  # [C, C], 0 to 1
    ptm: float
    iptm: float  # NaN of a single chain
    has_clash: bool
    fraction_disordered: float
    ranking_score: float  # -100 to 1.5

    @property
    def name(self) -> str:
        """As AlphaFold 3 names it: ``seed-1_sample-0``."""
        return f"seed-{self.seed}_sample-{self.sample}"

    @property
    def chain_pair_pae_min(self) -> np.ndarray:
        """Least PAE from tokens of one chain to those of another, [C, C] angstrom."""
        chain = np.array(self.token_chain_ids)
        rows = [chain == chain_id for chain_id in self.chain_ids]
        return np.array([[self.pae[np.ix_(i, j)].min() for j in rows] for i in rows])


def predict(
    model: AlphaFold3,
    job: AlphaFoldInput,
    *,
    samples: int = 5,
    steps: int = 200,
    alignments: Mapping[str, Alignment] | None = None,
    progress: Progress = lambda seeds, **_: seeds,
) -> list[Prediction]:
    """Draw ``samples`` structures for each of the job's seeds, the surest first.

    The trunk runs once for each seed; what is random (alignment rows, placement of conformers,
    noise) depends on the seed only. A job that is predicted again gives the same structures.

    Args:
        model: On any device; put into evaluation mode for the duration.
        job: As ``megafold.data.read_alphafold_input`` gives it.
        samples: Of each seed.
        steps: Of the sampler.
        alignments: By chain id, for chains of which the job gives none.
        progress: Wraps the iterable of seeds.

    Raises:
        DataError: The job cannot be built; see ``input_features``.
        ValueError: The model cannot model it, or ``samples`` or ``steps`` is below 1.
        BatchTooLargeError: The device has not enough memory left.
    """
    if samples < 1 or steps < 1:
        raise ValueError(f"samples and steps must be at least 1, got {samples} and {steps}")
    structure = input_structure(job)
    features = input_features(job, alignments)
    device = next(model.parameters()).device
    predictions: list[Prediction] = []
    training = model.training
    model.eval()
    try:
        for seed in progress(job.seeds, desc=f"predicting {job.name}"):
            rng = np.random.default_rng(seed)
            batch = make_batch(features, generator=rng, msa_rows=MAX_ROWS).to(device)
            predictions += _predict_seed(model, batch, structure, seed, samples, steps)
    finally:
        model.train(training)
    return sorted(predictions, key=_rank)


def _rank(prediction: Prediction) -> tuple[bool, float]:
    """Highest score first, what has none (NaN) last."""
    score = prediction.ranking_score
    return np.isnan(score), -score


@torch.no_grad()
def _predict_seed(
    model: AlphaFold3, batch: Batch, structure: Structure, seed: int, samples: int, steps: int
) -> list[Prediction]:
    check_batch(model.config, batch)
    check_memory(model, batch, samples=samples, training=False)  # before the trunk takes it
    generator = torch.Generator().manual_seed(seed)
    trunk = model(batch, generator=generator, cycles=model.config.cycles)
    x = sample(model, batch, generator=generator, steps=steps, samples=samples, trunk=trunk)
    confidence = predict_confidence(model, batch, x, trunk=trunk)
    return [_prediction(confidence, structure, batch, x, seed, k) for k in range(samples)]


def _prediction(
    confidence: Confidence, structure: Structure, batch: Batch, x: torch.Tensor, seed: int, k: int
) -> Prediction:
    layout, centre = structure.layout, batch.center_atom.cpu().numpy()

    def array(value: torch.Tensor) -> np.ndarray:
        return value.float().cpu().numpy()

    return Prediction(
        seed=seed,
        sample=k,
        structure=replace(
            structure,
            positions=array(x[k]),
            resolved=np.ones(len(layout), dtype=bool),
        ),
        atom_plddt=array(confidence.plddt[k]),
        pae=array(confidence.pae[k]),
        contact_probs=array(confidence.contact_probs),
        token_chain_ids=tuple(layout.chain_id[centre].tolist()),
        token_res_ids=tuple(layout.residue_number[centre].tolist()),
        chain_ids=tuple(chain.chain_id for chain in structure.chains),
        chain_ptm=array(confidence.chain_ptm[k]),
        chain_pair_iptm=array(confidence.chain_pair_iptm[k]),
        ptm=float(confidence.ptm[k]),
        iptm=float(confidence.iptm[k]),
        has_clash=bool(confidence.has_clash[k]),
        fraction_disordered=float(confidence.fraction_disordered[k]),
        ranking_score=float(confidence.ranking_score[k]),
    )
