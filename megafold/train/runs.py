"""Memorised runs as files: every step, every evaluation, and a structure beside the experiment.

``ENTRY_MODEL_curve.csv`` has a row for each step, ``ENTRY_MODEL_lddt.csv`` for each evaluation,
and ``ENTRY_MODEL.cif`` is what the averaged model draws at the end, laid on the experiment, with
pLDDT as B-factors; of it the atoms that the experiment shows.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megafold import data
from megafold.atomic import atomic_write
from megafold.metrics import superpose
from megafold.model import predict_confidence
from megafold.model.permutation import permute_truth
from megafold.train.memorising import Evaluation, Memorised, sample_memorised
from megafold.train.trainer import StepRecord

OF_A_STEP = ("step", "gradient_norm", "learning_rate", "seconds")  # the others are losses


@dataclass(frozen=True)
class RecordedRun:
    """A run as its files tell it."""

    entry: str
    model: str
    history: list[StepRecord]
    evaluations: list[Evaluation]
    structure: Path

    @property
    def seconds(self) -> float:
        """What all steps took, without the evaluations."""
        return sum(record.seconds for record in self.history)


def write_run(run: Memorised, device: torch.device, folder: str | Path) -> list[Path]:
    """Write the three files of a run; returns their paths."""
    recipe, folder = run.recipe, Path(folder)
    batch = data.example_batch(recipe.entry, seed=recipe.train.seed).to(device)
    x = sample_memorised(run.model, batch, recipe)
    plddt = predict_confidence(run.model, batch, x[None]).plddt[0].cpu().numpy()
    truth = permute_truth(batch, x)
    placed = superpose(x[None], truth.positions, truth.resolved)[0].cpu()
    structure = data.predicted_structure(batch.layout, placed, name=f"{recipe.entry} memorised")
    # What the experiment does not show has not been learnt, and lies anywhere.
    structure = replace(structure, resolved=truth.resolved.cpu().numpy())
    curve = [
        {
            "step": record.step + 1,
            **record.losses,
            "gradient_norm": record.gradient_norm,
            "learning_rate": record.learning_rate,
            "seconds": record.seconds,
        }
        for record in run.history
    ]
    paths = _paths(folder, recipe.entry, recipe.model)
    atomic_write(paths["curve"], _table(curve).encode())
    atomic_write(paths["lddt"], _table([vars(one) for one in run.evaluations]).encode())
    data.write_mmcif(structure, paths["structure"], b_factors=plddt)
    return list(paths.values())


def read_run(folder: str | Path, entry: str, model: str) -> RecordedRun:
    """The run whose files lie in a folder; ``FileNotFoundError`` where there is none."""
    paths = _paths(Path(folder), entry, model)
    history = [
        StepRecord(
            int(row["step"]) - 1,
            {name: float(value) for name, value in row.items() if name not in OF_A_STEP and value},
            float(row["gradient_norm"]),
            float(row["learning_rate"]),
            float(row["seconds"]),
        )
        for row in _rows(paths["curve"])
    ]
    evaluations = [
        Evaluation(int(row["step"]), float(row["lddt"]), float(row["lddt_centre"]))
        for row in _rows(paths["lddt"])
    ]
    return RecordedRun(entry, model, history, evaluations, paths["structure"])


def read_runs(folder: str | Path) -> list[RecordedRun]:
    """Every run in a folder, by entry; none where there is no such folder."""
    names = sorted(path.name.removesuffix("_curve.csv").split("_", 1)
                   for path in Path(folder).glob("*_curve.csv"))  # fmt: skip
    return [read_run(folder, entry, model) for entry, model in names]


def _paths(folder: Path, entry: str, model: str) -> dict[str, Path]:
    stem = f"{entry}_{model}"
    return {
        "curve": folder / f"{stem}_curve.csv",
        "lddt": folder / f"{stem}_lddt.csv",
        "structure": folder / f"{stem}.cif",
    }


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """CSV with the columns of all rows; a loss that a step did not have is left empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()
