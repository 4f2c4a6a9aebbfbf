"""Pair features of templates, worked out after the crop (supplement, table 5)."""

from __future__ import annotations

import numpy as np

from megafold.data.constants import GAP, RESTYPE_INDEX
from megafold.data.features import Features

DISTOGRAM_EDGES = np.linspace(3.25, 50.75, 39, dtype=np.float32)  # 38 bins and one beyond
MAX_TEMPLATES = 4

_GAP = RESTYPE_INDEX[GAP]


def draw_templates(features: Features, generator: np.random.Generator) -> np.ndarray:
    """Which templates a training example sees (supplement, section 2.4).

    Of the n of each chain k are drawn, in random order, with k the smaller of 4 and a number drawn
    evenly from 0 to n. Only templates that reach into the crop count.

    Returns:
        [S, N] int64: the template of each token in each slot, -1 where it has none; S is at most 4.
    """
    chosen = np.full((MAX_TEMPLATES, features.num_tokens), -1, dtype=np.int64)
    for asym in np.unique(features.asym_id):
        here = features.asym_id == asym
        found = np.flatnonzero(_reaches(features, here))
        count = min(int(generator.integers(0, len(found) + 1)), MAX_TEMPLATES)
        drawn = generator.choice(found, size=count, replace=False) if count else found[:0]
        chosen[:count, here] = drawn[:, None]
    return chosen[(chosen >= 0).any(axis=1)]


def first_templates(features: Features) -> np.ndarray:
    """The first 4 of each chain, for inference. [S, N] int64, as ``draw_templates`` gives them."""
    chosen = np.full((MAX_TEMPLATES, features.num_tokens), -1, dtype=np.int64)
    for asym in np.unique(features.asym_id):
        here = features.asym_id == asym
        found = np.flatnonzero(_reaches(features, here))[:MAX_TEMPLATES]
        chosen[: len(found), here] = found[:, None]
    return chosen[(chosen >= 0).any(axis=1)]


def _reaches(features: Features, here: np.ndarray) -> np.ndarray:
    """Templates that have a residue among the tokens ``here``. [T] bool."""
    return (features.template_restype[:, here] != _GAP).any(axis=1)


def template_features(
    features: Features, chosen: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The template arrays of a ``Batch`` by name.

    Args:
        features: Any crop.
        chosen: [S, N] which template each token has in each slot, -1 for none; None takes
            ``first_templates``.

    Returns:
        Arrays with the shapes of ``Batch``; one empty slot where there is no template.
    """
    if chosen is None:
        chosen = first_templates(features)
    n = features.num_tokens
    if len(chosen) == 0:
        return {
            "template_mask": np.zeros(1, dtype=bool),
            "template_restype": np.full((1, n), _GAP, dtype=np.int64),
            "template_pseudo_beta_mask": np.zeros((1, n), dtype=bool),
            "template_backbone_frame_mask": np.zeros((1, n), dtype=bool),
            "template_distogram": np.zeros((1, n, n), dtype=np.int64),
            "template_unit_vector": np.zeros((1, n, n, 3), dtype=np.float32),
        }
    there, tokens = chosen >= 0, np.arange(n)
    beta = features.template_pseudo_beta[chosen, tokens]
    distance = np.linalg.norm(beta[:, :, None] - beta[:, None, :], axis=-1)
    bins = np.clip(np.digitize(distance, DISTOGRAM_EDGES) - 1, 0, 38)
    restype = np.where(there, features.template_restype[chosen, tokens], _GAP)
    return {
        "template_mask": np.ones(len(chosen), dtype=bool),
        "template_restype": restype.astype(np.int64),
        "template_pseudo_beta_mask": there & features.template_pseudo_beta_mask[chosen, tokens],
        "template_backbone_frame_mask": there & features.template_backbone_mask[chosen, tokens],
        "template_distogram": bins.astype(np.int64),
        "template_unit_vector": _unit_vectors(features.template_backbone[chosen, tokens]),
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
