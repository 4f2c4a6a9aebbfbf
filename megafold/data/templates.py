"""Pair features of templates, worked out after the crop (supplement, table 5)."""

from __future__ import annotations

import numpy as np

from megafold.data.constants import GAP, RESTYPE_INDEX
from megafold.data.features import Features

DISTOGRAM_EDGES = np.linspace(3.25, 50.75, 39, dtype=np.float32)  # 38 bins and one beyond
MAX_TEMPLATES = 4


def template_features(features: Features, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The template arrays of a ``Batch`` by name.

    Args:
        features: Any crop.
        rows: Which templates to use, at most 4; None takes the first 4.

    Returns:
        Arrays with the shapes of ``Batch``; one empty slot where there is no template.
    """
    if rows is None:
        rows = np.arange(min(len(features.template_restype), MAX_TEMPLATES))
    n = features.num_tokens
    if len(rows) == 0:
        return {
            "template_mask": np.zeros(1, dtype=bool),
            "template_restype": np.full((1, n), RESTYPE_INDEX[GAP], dtype=np.int64),
            "template_pseudo_beta_mask": np.zeros((1, n), dtype=bool),
            "template_backbone_frame_mask": np.zeros((1, n), dtype=bool),
            "template_distogram": np.zeros((1, n, n), dtype=np.int64),
            "template_unit_vector": np.zeros((1, n, n, 3), dtype=np.float32),
        }
    beta = features.template_pseudo_beta[rows]
    distance = np.linalg.norm(beta[:, :, None] - beta[:, None, :], axis=-1)
    bins = np.clip(np.digitize(distance, DISTOGRAM_EDGES) - 1, 0, 38)
    return {
        "template_mask": np.ones(len(rows), dtype=bool),
        "template_restype": features.template_restype[rows].astype(np.int64),
        "template_pseudo_beta_mask": features.template_pseudo_beta_mask[rows],
        "template_backbone_frame_mask": features.template_backbone_mask[rows],
        "template_distogram": bins.astype(np.int64),
        "template_unit_vector": _unit_vectors(features.template_backbone[rows]),
    }


def _unit_vectors(backbone: np.ndarray) -> np.ndarray:
    """Direction from each residue's CA to each other's, in the residue's own frame.

    Frames as in AlphaFold 2, algorithm 21: origin CA, first axis towards C.

    Args:
        backbone: [T, N, 3, 3], N, CA and C.

    Returns:
        [T, N, N, 3] float32; zero for a residue with itself.
    """
    nitrogen, alpha, carbon = (backbone[..., i, :] for i in range(3))
    first = _normalise(carbon - alpha)
    towards_n = nitrogen - alpha
    second = _normalise(towards_n - (towards_n * first).sum(-1, keepdims=True) * first)
    rotation = np.stack([first, second, np.cross(first, second)], axis=-2)
    offset = alpha[:, None, :, :] - alpha[:, :, None, :]
    local = np.einsum("tiab,tijb->tija", rotation, offset)
    return _normalise(local).astype(np.float32)


def _normalise(vector: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    return np.divide(vector, length, out=np.zeros_like(vector), where=length > 1e-6)
