"""Predictions: AlphaFold 3's input JSON to ranked structures with their confidence, and files."""

from megafold.predict.files import job_folder_name, write_predictions
from megafold.predict.run import Prediction, predict

__all__ = ["Prediction", "job_folder_name", "predict", "write_predictions"]
