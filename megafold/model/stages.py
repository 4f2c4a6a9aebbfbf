"""The four stages of AlphaFold 3's training (supplement, table 6)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """What changes from stage to stage."""

    name: str
    crop_size: int  # tokens
    diffusion_samples: int  # at most; a small configuration may have fewer
    bond_weight: float  # of the bond loss within the diffusion loss
    pae_weight: float  # of the PAE loss within the confidence loss


STAGES = {
    stage.name: stage
    for stage in (
        Stage("initial", crop_size=384, diffusion_samples=48, bond_weight=0.0, pae_weight=0.0),
        Stage(
            "fine_tuning_1", crop_size=640, diffusion_samples=32, bond_weight=1.0, pae_weight=0.0
        ),
        Stage(
            "fine_tuning_2", crop_size=768, diffusion_samples=32, bond_weight=1.0, pae_weight=0.0
        ),
        Stage(
            "fine_tuning_3", crop_size=768, diffusion_samples=32, bond_weight=1.0, pae_weight=1.0
        ),
    )
}


def stage_from_name(name: str) -> Stage:
    """The stage called ``name``; ``ValueError`` lists the known names otherwise."""
    if name not in STAGES:
        raise ValueError(f"unknown training stage {name!r}; known: {', '.join(STAGES)}")
    return STAGES[name]
