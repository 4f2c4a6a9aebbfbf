"""How good a structure is. Each metric is checked against an independent implementation."""

from megafold.metrics.lddt import lddt, lddt_per_atom
from megafold.metrics.superposition import rmsd, superpose

__all__ = ["lddt", "lddt_per_atom", "rmsd", "superpose"]
