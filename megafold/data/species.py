"""Which organism a sequence is of, as its description says."""

from __future__ import annotations

import re

# The forms in which databases name the organism: UniProt's mnemonic, its OX and UniRef's TaxID
# with a number from NCBI's taxonomy, and names that end in that number.
_SPECIES = tuple(
    re.compile(pattern)
    for pattern in (
        r"^(?:tr|sp)\|[A-Z0-9]{6,10}(?:_\d+)?\|[A-Z0-9]{1,10}_([A-Z0-9]{1,5})(?:[/\s]|$)",
        r"\b(?:OX|TaxID)=(\d+)\b",
        r"^UniRef\d+_[A-Z0-9-]+_(\d+)(?:[/\s]|$)",
    )
)


def species_of(description: str) -> str:
    """Which organism a row is of, from its description; empty where it does not say."""
    for pattern in _SPECIES:
        if found := pattern.search(description):
            return found[1]
    return ""
