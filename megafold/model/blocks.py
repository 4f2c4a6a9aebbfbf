"""A stack of blocks and its activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megafold import ops


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function``, and again in the backward pass: its activations are not kept.

    The second call has the operators' implementation of the first one, wherever the backward
    pass begins.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a captured training step keeps its activations: "
            "set checkpointing=False in the model's configuration"
        )
    backend = ops.backend()

    def call(*args: Any) -> Any:
        with ops.use(backend):
            return function(*args)

    return checkpoint(call, *args, use_reentrant=False)


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
            return recomputed(block, *args)
        return block(*args)
