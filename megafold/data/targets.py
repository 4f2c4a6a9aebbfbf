"""Which structures AlphaFold 3 trains on (supplement, section 2.5.1)."""

from __future__ import annotations

from megafold.data.structure import POLYMERS, Structure

MAX_RESOLUTION = 9.0  # angstrom
MAX_POLYMER_CHAINS = 300
TRAINING_CUTOFF = "2021-09-30"  # the last day of release


def target_fault(structure: Structure, released_by: str | None = TRAINING_CUTOFF) -> str | None:
    """Why a structure is no target for training, or None.

    Args:
        structure: Cleaned.
        released_by: The last day of release, ISO 8601; None allows all.
    """
    if structure.resolution is not None and structure.resolution > MAX_RESOLUTION:
        return f"resolution of {structure.resolution:g} angstrom, at most {MAX_RESOLUTION:g}"
    polymers = sum(chain.chain_type in POLYMERS for chain in structure.chains)
    if polymers > MAX_POLYMER_CHAINS:
        return f"{polymers} polymer chains, at most {MAX_POLYMER_CHAINS}"
    if released_by is not None and structure.release_date > released_by:
        return f"released {structure.release_date}, after {released_by}"
    return None
