"""How good a structure is. Each metric is checked against an independent implementation."""

from megafold.metrics.contacts import contact_precision
from megafold.metrics.lddt import lddt, lddt_per_atom
from megafold.metrics.scores import Scores, score
from megafold.metrics.superposition import rmsd, superpose, tm_score

__all__ = [
    "Scores",
    "contact_precision",
    "lddt",
    "lddt_per_atom",
    "rmsd",
    "score",
    "superpose",
    "tm_score",
]
