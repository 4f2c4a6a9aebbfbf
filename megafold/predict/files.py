"""Predictions as files, in the layout and under the names of AlphaFold 3's own output."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megafold.atomic import atomic_write
from megafold.data.errors import DataError
from megafold.data.write import write_mmcif
from megafold.predict.run import Prediction

_DECIMALS = 2
_KINDS = ("model.cif", "summary_confidences.json", "confidences.json")


def job_folder_name(name: str) -> str:
    """A job's name as a folder's: ``My fold (TEST)`` is ``My_fold_TEST``."""
    return re.sub(r"[^A-Za-z0-9_.-]", "", name.replace(" ", "_")).strip(".")


def write_predictions(predictions: Sequence[Prediction], out: str | Path) -> Path:
    """Write ranked predictions, the best first, to a new folder in ``out``.

    The folder has the job's name. In it: ``seed-S_sample-K/`` for each prediction, with
    ``*_model.cif`` (pLDDT as B-factors), ``*_summary_confidences.json`` and
    ``*_confidences.json``; the same three files of the best prediction; and
    ``ranking_scores.csv``. It is filled under another name and then renamed: all of it is there,
    or none.

    Returns:
        The folder.

    Raises:
        ValueError: There is no prediction.
        DataError: The folder is there already.
    """
    if not predictions:
        raise ValueError("there is no prediction to write")
    out, name = Path(out), job_folder_name(predictions[0].structure.name)
    folder = out / name
    if folder.exists():
        raise DataError(f"{folder} exists already; remove it, or write to another folder")
    out.mkdir(parents=True, exist_ok=True)
    filling = Path(tempfile.mkdtemp(dir=out, prefix=f".{name}.", suffix=".tmp"))
    try:
        for prediction in predictions:
            _write_one(prediction, filling / prediction.name, f"{name}_{prediction.name}")
        best = predictions[0].name
        for kind in _KINDS:
            shutil.copy(filling / best / f"{name}_{best}_{kind}", filling / f"{name}_{kind}")
        atomic_write(filling / "ranking_scores.csv", _ranking_scores(predictions).encode())
        filling.chmod(0o755)
        filling.rename(folder)
    except BaseException:
        shutil.rmtree(filling, ignore_errors=True)
        raise
    return folder


def summary_confidences(prediction: Prediction) -> dict[str, object]:
    """Scores of the structure and of its chains, under AlphaFold 3's names."""
    pairs = prediction.chain_pair_iptm
    others = np.where(np.eye(len(pairs), dtype=bool), np.nan, pairs)
    counts = np.isfinite(others).sum(axis=1)
    sums = np.nansum(others, axis=1)
    chain_iptm = np.divide(sums, counts, out=np.full(len(pairs), np.nan), where=counts > 0)
    return {
        "chain_iptm": _plain(chain_iptm),
        "chain_pair_iptm": _plain(pairs),
        "chain_pair_pae_min": _plain(prediction.chain_pair_pae_min),
        "chain_ptm": _plain(prediction.chain_ptm),
        "fraction_disordered": _plain(prediction.fraction_disordered),
        "has_clash": float(prediction.has_clash),
        "iptm": _plain(prediction.iptm),
        "ptm": _plain(prediction.ptm),
        "ranking_score": _plain(prediction.ranking_score),
    }


def confidences(prediction: Prediction) -> dict[str, object]:
    """Confidence atom by atom and token by token, under AlphaFold 3's names."""
    return {
        "atom_chain_ids": prediction.structure.layout.chain_id.tolist(),
        "atom_plddts": _plain(prediction.atom_plddt),
        "contact_probs": _plain(prediction.contact_probs),
        "pae": _plain(prediction.pae),
        "token_chain_ids": list(prediction.token_chain_ids),
        "token_res_ids": list(prediction.token_res_ids),
    }


def _write_one(prediction: Prediction, folder: Path, stem: str) -> None:
    model, summary, full = (folder / f"{stem}_{kind}" for kind in _KINDS)
    write_mmcif(prediction.structure, model, b_factors=prediction.atom_plddt)
    atomic_write(summary, json.dumps(summary_confidences(prediction), indent=1).encode())
    atomic_write(full, json.dumps(confidences(prediction), separators=(",", ":")).encode())


def _ranking_scores(predictions: Sequence[Prediction]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["seed", "sample", "ranking_score"])
    for one in sorted(predictions, key=lambda p: (p.seed, p.sample)):
        writer.writerow([one.seed, one.sample, one.ranking_score])
    return text.getvalue()


def _plain(value: np.ndarray | float) -> object:
    """Rounded numbers and lists of them; null for NaN, which JSON does not have."""
    if not isinstance(value, np.ndarray):
        return None if math.isnan(value) else round(float(value), _DECIMALS)
    rounded = value.astype(np.float64).round(_DECIMALS)
    missing = np.isnan(rounded)
    return (np.where(missing, None, rounded) if missing.any() else rounded).tolist()
