"""Training on one structure until it is known by heart.

Memorisation says nothing about prediction. It says that the whole chain works: features,
model, losses, optimiser, sampler.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import megafold
from megafold import data
from megafold.atomic import atomic_create
from megafold.data.batch import Batch
from megafold.metrics import score
from megafold.model import AlphaFold3, sample
from megafold.model.checkpoints import load_model, save_model
from megafold.model.config import config_from_name
from megafold.model.permutation import permute_truth
from megafold.train.trainer import StepRecord, TrainConfig, Trainer

Progress = Callable[..., Iterable[int]]


# A few hundred steps instead of a hundred thousand: a short warm-up, a fast average, a higher
# rate; the noise weighting under which the handedness of the fold is learned early; and the
# stage in which every loss counts, that of PAE included.
MEMORISING = TrainConfig(
    learning_rate=3.6e-3,
    warmup_steps=50,
    ema_decay=0.98,
    noise_weighting="printed",
    stage="fine_tuning_3",
)

# For a run of `tiny` of some 500 steps, and for one of `small` of 4,000, which learns nothing at
# that rate.
BRIEFLY = replace(MEMORISING, decay=0.5, decay_steps=200)
AT_LENGTH = replace(MEMORISING, learning_rate=1e-3, decay=0.5, decay_steps=1000)


@dataclass(frozen=True)
class Recipe:
    """What is memorised, by which model, for how long.

    Confidence is learned from structures of known resolution only. What is memorised is the
    file, however exact the experiment was, so an entry that has no resolution (NMR) counts as
    one of ``resolution``.
    """

    entry: str = "1AS5"  # a bundled sample
    resolution: float = 1.0  # angstrom, of an entry that has none
    model: str = "tiny"
    steps: int = 560
    evaluate_every: int = 80  # steps between sampled structures
    sampler_steps: int = 30
    train: TrainConfig = BRIEFLY


@dataclass(frozen=True)
class Evaluation:
    """How well a structure sampled after ``step`` steps agrees with the truth."""

    step: int
    lddt: float  # all atoms, 0 to 1
    lddt_centre: float  # centre atoms (CA) only


@dataclass(frozen=True)
class Memorised:
    """A finished run: the averaged model and how it got there."""

    recipe: Recipe
    model: AlphaFold3
    history: list[StepRecord]
    evaluations: list[Evaluation]


def memorise(
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = lambda steps, **_: steps,
    target: float | None = None,
    seconds: float | None = None,
    state: str | Path | None = None,
) -> Memorised:
    """Train a fresh model on one bundled sample, without dropout.

    Args:
        recipe: What, how, how long.
        device: To train on.
        progress: Wraps the iterable of steps, as ``notebook.progress`` does.
        target: Stop at the first evaluation with this lDDT of all atoms.
        seconds: Stop, with an evaluation, at the first step after so long.
        state: A file that all the run has come to is written to at each evaluation. Where it
            is there the run goes on from it, as if it had not stopped.

    Raises:
        ValueError: ``state`` is of another recipe, or no such file.
    """
    begin = time.perf_counter()
    batch = data.example_batch(recipe.entry, seed=recipe.train.seed).to(device)
    if math.isnan(batch.resolution):
        batch = replace(batch, resolution=recipe.resolution)
    torch.manual_seed(recipe.train.seed)
    # Dropout is against learning by heart: without it the same steps lead from an lDDT of 0.92 to
    # one of 0.99 (tiny, 1AS5).
    config = replace(config_from_name(recipe.model), pair_dropout=0.0, msa_dropout=0.0)
    if recipe.train.captured:
        config = replace(config, checkpointing=False)
    trainer = Trainer(AlphaFold3(config).to(device), recipe.train)
    evaluations = []
    if state is not None and Path(state).exists():
        evaluations = _restore(state, trainer, recipe)

    def done() -> bool:
        return target is not None and bool(evaluations) and evaluations[-1].lddt >= target

    left = range(recipe.steps if done() else len(trainer.history), recipe.steps)
    for step in progress(left, desc=f"memorising {recipe.entry}"):
        trainer.step(batch)
        late = seconds is not None and time.perf_counter() - begin > seconds
        if (step + 1) % recipe.evaluate_every == 0 or step + 1 == recipe.steps or late:
            evaluations.append(evaluate(trainer.averaged, batch, recipe, step + 1))
            if state is not None:
                _keep(state, trainer, recipe, evaluations)
            if late or done():
                break
    return Memorised(recipe, trainer.averaged, trainer.history, evaluations)


def _keep(
    path: str | Path, trainer: Trainer, recipe: Recipe, evaluations: list[Evaluation]
) -> None:
    tensors, rest = trainer.state()
    rest |= {"entry": recipe.entry, "evaluations": [asdict(one) for one in evaluations]}
    apart = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"state": json.dumps(rest)}
    atomic_create(path, lambda temporary: save_file(apart, temporary, metadata))


def _restore(path: str | Path, trainer: Trainer, recipe: Recipe) -> list[Evaluation]:
    """Let the trainer go on from a file that :func:`_keep` wrote; returns the evaluations."""
    try:
        with safe_open(path, framework="pt") as file:
            rest = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        entry, evaluations = rest["entry"], [Evaluation(**one) for one in rest["evaluations"]]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no state of memorising: {error}") from error
    if entry != recipe.entry:
        raise ValueError(f"{path} is the state of memorising {entry}, not {recipe.entry}")
    try:
        trainer.restore(tensors, rest)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return evaluations


def evaluate(model: AlphaFold3, batch: Batch, recipe: Recipe, step: int) -> Evaluation:
    """Sample one structure and score it against the truth, named as fits it best."""
    x = sample_memorised(model, batch, recipe)
    scores = score(permute_truth(batch, x), x)
    return Evaluation(step, scores.lddt, scores.lddt_centre)


def sample_memorised(model: AlphaFold3, batch: Batch, recipe: Recipe) -> torch.Tensor:
    """The structure ``[A, 3]`` that an evaluation looks at: always from the same noise."""
    generator = torch.Generator().manual_seed(recipe.train.seed)
    return sample(model, batch, generator=generator, steps=recipe.sampler_steps)[0]


def load_or_memorise(
    recipe: Recipe,
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = lambda steps, **_: steps,
) -> Memorised:
    """The run of ``recipe`` kept in ``folder``, or a new one, which is then kept there.

    A kept run counts only if recipe and source code are what they were: it can be stale in
    no other way than by being deleted.
    """
    path = run_path(recipe, folder)
    if not path.exists():
        run = memorise(recipe, device=device, progress=progress)
        save_run(run, folder)
        return run
    model, note = load_model(path, device)
    history = [StepRecord(**record) for record in note["history"]]
    return Memorised(recipe, model, history, [Evaluation(**e) for e in note["evaluations"]])


def save_run(run: Memorised, folder: str | Path) -> Path:
    """Keep a run where ``load_or_memorise`` finds it; returns the file."""
    path = run_path(run.recipe, folder)
    note = {
        "recipe": asdict(run.recipe),
        "history": [asdict(record) for record in run.history],
        "evaluations": [asdict(evaluation) for evaluation in run.evaluations],
    }
    save_model(path, run.model, note)
    return path


def run_path(recipe: Recipe, folder: str | Path) -> Path:
    """Where a run is kept: its name carries a digest of the recipe and of the source code."""
    digest = hashlib.sha256(repr(recipe).encode())
    package = Path(megafold.__file__).parent
    for part in ("geometry.py", "data", "metrics", "model", "ops", "train"):
        root = package / part
        for source in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            digest.update(source.read_bytes())
    return Path(folder) / f"{recipe.model}-{recipe.entry}-{digest.hexdigest()[:12]}.safetensors"
