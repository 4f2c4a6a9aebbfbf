"""How many parameters each block has: ``python -m megafold.model.parameters [NAME ...]``."""

from __future__ import annotations

import sys

import torch

from megafold.model.alphafold3 import AlphaFold3
from megafold.model.config import CONFIGS

# Blocks of the paper, by the beginning of their parameters' names; the first match counts.
BLOCKS = (
    ("Input embedder (Algorithm 2)", "input_embedder."),
    ("Recycling", "recycle_"),
    ("Template embedder (16)", "template_embedder."),
    ("MSA module (8)", "msa_module."),
    ("Pairformer (17)", "pairformer."),
    ("Diffusion: atom encoder (5)", "diffusion.atom_encoder."),
    ("Diffusion: transformer (23)", "diffusion.blocks."),
    ("Diffusion: atom decoder (6)", "diffusion.atom_decoder."),
    ("Diffusion: conditioning and the rest (20, 21)", "diffusion."),
    ("Distogram head", "distogram_head."),
    ("Confidence head (31)", "confidence_head."),
)


def count_parameters(name: str) -> dict[str, int]:
    """Trainable numbers of each block of the configuration called ``name``, and ``total``.

    The model is built without memory for its weights.
    """
    with torch.device("meta"):
        model = AlphaFold3.from_name(name)
    counts = dict.fromkeys((label for label, _ in BLOCKS), 0)
    for parameter_name, parameter in model.named_parameters():
        label = next(label for label, start in BLOCKS if parameter_name.startswith(start))
        counts[label] += parameter.numel()
    counts["total"] = sum(counts.values())
    return counts


def parameter_table(names: tuple[str, ...] = tuple(CONFIGS)) -> str:
    """A table in Markdown: a row for each block, a column for each configuration."""
    columns = [count_parameters(name) for name in names]
    lines = [
        "| block | " + " | ".join(f"`{name}`" for name in names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for label in columns[0]:
        cells = " | ".join(f"{column[label]:,}" for column in columns)
        lines.append(f"| {label} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(parameter_table(tuple(sys.argv[1:]) or tuple(CONFIGS)))
