"""What the model cannot work with, said before it fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megafold.model.config import ModelConfig

if TYPE_CHECKING:
    from megafold.data.batch import Batch

NUM_ELEMENTS = 128


def check_generator(generator: torch.Generator) -> None:
    """Raises ``TypeError`` for anything but a generator on the CPU."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator, got {type(generator).__name__}; "
            "for example torch.Generator().manual_seed(0)"
        )
    if generator.device.type != "cpu":
        raise TypeError(
            f"generator must be on the CPU, so that every device draws the same numbers; "
            f"it is on {generator.device}"
        )


def check_batch(config: ModelConfig, batch: Batch) -> None:
    """Raises ``ValueError`` naming the first entity that the model cannot model."""
    if batch.num_tokens == 0 or batch.num_atoms == 0:
        raise ValueError(
            f"the batch has {batch.num_tokens} tokens and {batch.num_atoms} atoms; "
            "it needs one of each"
        )
    kinds = batch.is_protein | batch.is_rna | batch.is_dna | batch.is_ligand
    strange = batch.token_mask & ~kinds
    count = torch.zeros(batch.num_tokens, dtype=torch.long, device=batch.token_mask.device)
    count.index_add_(0, batch.atom_to_token, batch.atom_mask.long())
    large = count > config.atoms_per_token
    empty = batch.token_mask & (count == 0)
    element = batch.atom_mask & ((batch.ref_element < 0) | (batch.ref_element >= NUM_ELEMENTS))
    # One look at the device while all is well.
    if not bool((strange | large | empty).any() | element.any() | ~batch.token_mask.any()):
        return
    if not bool(batch.token_mask.any()):
        raise ValueError("every token of the batch is masked")
    if bool(strange.any()):
        raise ValueError(
            f"{_name(batch, strange)} is neither protein, RNA, DNA nor ligand: "
            "the model knows no other entities"
        )
    if bool(large.any()):
        raise ValueError(
            f"{_name(batch, large)} has {int(count[large][0])} atoms, but a token has at most "
            f"{config.atoms_per_token}: make it one token per atom, as ligands are"
        )
    if bool(empty.any()):
        raise ValueError(f"{_name(batch, empty)} has no atom")
    token = torch.zeros_like(batch.token_mask)
    token[batch.atom_to_token[element]] = True
    raise ValueError(
        f"{_name(batch, token)} has an atom of atomic number "
        f"{int(batch.ref_element[element][0])}; known are 0 to {NUM_ELEMENTS - 1}"
    )


def _name(batch: Batch, tokens: torch.Tensor) -> str:
    """What the first of the chosen tokens is called."""
    token = int(tokens.nonzero()[0])
    atom = int(batch.center_atom[token])
    layout = batch.layout
    if atom >= len(layout):
        return f"token {token}"
    return (
        f"token {token} ({layout.residue_name[atom]} {layout.residue_number[atom]} of chain "
        f"{layout.chain_id[atom]})"
    )
