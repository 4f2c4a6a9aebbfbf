"""Residue classes and names, as AlphaFold 3 numbers them (supplement, section 2.8)."""

from __future__ import annotations

AMINO_ACIDS = (
    "ALA", "ARG", "ASN", "ASP", "CYS", "GLN", "GLU", "GLY", "HIS", "ILE",
    "LEU", "LYS", "MET", "PHE", "PRO", "SER", "THR", "TRP", "TYR", "VAL",
)  # fmt: skip
RNA_NUCLEOTIDES = ("A", "G", "C", "U")
DNA_NUCLEOTIDES = ("DA", "DG", "DC", "DT")

UNKNOWN_PROTEIN, UNKNOWN_RNA, UNKNOWN_DNA, GAP = "UNK", "N", "DN", "GAP"

RESTYPES = (
    *AMINO_ACIDS, UNKNOWN_PROTEIN,
    *RNA_NUCLEOTIDES, UNKNOWN_RNA,
    *DNA_NUCLEOTIDES, UNKNOWN_DNA,
    GAP,
)  # fmt: skip
RESTYPE_INDEX = {name: i for i, name in enumerate(RESTYPES)}
NUM_RESTYPES = len(RESTYPES)  # 32

PURINES = ("A", "G", "DA", "DG")
PYRIMIDINES = ("C", "U", "DC", "DT")
