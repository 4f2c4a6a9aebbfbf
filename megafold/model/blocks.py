"""A stack of blocks and its activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Blocks(nn.ModuleList):
    """A ``ModuleList`` whose blocks can be recomputed in the backward pass.

    With ``checkpointing`` only a block's inputs are kept for the backward pass, and the
    activations of one block live at a time, at the cost of a second forward.
    """

    def __init__(self, blocks: Iterable[nn.Module], *, checkpointing: bool) -> None:
        super().__init__(blocks)
        self.checkpointing = checkpointing

    def run(self, block: nn.Module, *args):
        """Call one of the blocks."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)
