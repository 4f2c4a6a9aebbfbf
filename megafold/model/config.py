"""The sizes of the model, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """Widths and depths. The defaults are AlphaFold 3's own (supplement, sections 2 and 3).

    Smaller configurations shrink depth and width only; the algorithm is always the same.
    """

    name: str = "af3"

    # Trunk.
    c_s: int = 384  # single representation
    c_z: int = 128  # pair representation
    pairformer_blocks: int = 48
    pairformer_heads: int = 16
    triangle_heads: int = 4
    pair_dropout: float = 0.25
    cycles: int = 4  # most recycling iterations

    # MSA module.
    c_m: int = 64
    msa_blocks: int = 4
    msa_heads: int = 8
    c_msa_head: int = 8
    c_outer_product: int = 32
    msa_dropout: float = 0.15
    msa_rows: int = 1024  # rows drawn anew in each cycle

    # Template embedder.
    c_template: int = 64
    template_blocks: int = 2
    template_heads: int = 4

    # Atoms.
    c_atom: int = 128
    c_atompair: int = 16
    atom_blocks: int = 3
    atom_heads: int = 4

    # Diffusion.
    c_token: int = 768
    c_fourier: int = 256
    diffusion_blocks: int = 24
    diffusion_heads: int = 16
    diffusion_samples: int = 48  # noised copies of one trunk pass in training

    # Heads.
    distogram_bins: int = 64  # 2 to 22 angstrom
    confidence_blocks: int = 4
    plddt_bins: int = 50  # 0 to 1
    pae_bins: int = 64  # of 0.5 angstrom
    pde_bins: int = 64  # of 0.5 angstrom
    atoms_per_token: int = 24  # at most; the largest standard nucleotide has 23
    rollout_steps: int = 20  # of the sampler, in training: for confidence and the truth's names
    rollout_step_scale: float = 1.5  # as the sampler's; with few steps it would overshoot

    checkpointing: bool = True  # recompute blocks in the backward pass

    @property
    def c_s_inputs(self) -> int:
        """Width of the input embedding: atoms, restype, profile, mean deletion (449 in full)."""
        return self.c_s + 32 + 32 + 1


CONFIGS = {
    "af3": ModelConfig(),
    # Trains on real crops on one GPU within minutes.
    "small": ModelConfig(
        name="small",
        c_s=256, c_z=64, pairformer_blocks=8, pairformer_heads=8, triangle_heads=2, cycles=2,
        c_m=32, msa_blocks=2, msa_heads=4, c_outer_product=16, msa_rows=256,
        c_template=32, template_blocks=1, template_heads=2,
        c_atom=64, atom_blocks=2,
        c_token=384, c_fourier=128, diffusion_blocks=8, diffusion_heads=8,
        confidence_blocks=2,
    ),
    # Trains on a peptide on two CPU cores within minutes.
    "tiny": ModelConfig(
        name="tiny",
        c_s=64, c_z=32, pairformer_blocks=2, pairformer_heads=4, triangle_heads=2, cycles=1,
        c_m=16, msa_blocks=2, msa_heads=2, c_outer_product=8, msa_rows=64,
        c_template=16, template_blocks=1, template_heads=2,
        c_atom=64, c_atompair=8, atom_blocks=1, atom_heads=4,
        c_token=96, c_fourier=64, diffusion_blocks=3, diffusion_heads=4, diffusion_samples=16,
        confidence_blocks=1, rollout_steps=4, rollout_step_scale=1.0, checkpointing=False,
    ),
}  # fmt: skip


def config_from_name(name: str) -> ModelConfig:
    """The configuration called ``name``; ``ValueError`` lists the known names otherwise."""
    if name not in CONFIGS:
        raise ValueError(f"unknown model configuration {name!r}; known: {', '.join(CONFIGS)}")
    return CONFIGS[name]
