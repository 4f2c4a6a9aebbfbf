"""Predictions: AlphaFold 3's input JSON to ranked structures with their confidence, and files.

Public names are imported on first use, so that the command line starts without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megafold.predict.files import job_folder_name, write_predictions
    from megafold.predict.run import Prediction, predict

_HOMES = {
    "Prediction": "run",
    "job_folder_name": "files",
    "predict": "run",
    "write_predictions": "files",
}

__all__ = ["Prediction", "job_folder_name", "predict", "write_predictions"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
