"""A stack of blocks and its activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from megafold import ops
from megafold.model.dropout import repeating


class Bound(nn.Module):
    """A function that uses a module as a module itself, which is what ``functional_call`` takes."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        # In a function of its own: as an attribute a module would be a second submodule.
        self.call = lambda *inputs: function(*inputs)

    def forward(self, *inputs: Any) -> Any:
        return self.call(*inputs)


def recomputed(function: Callable[..., Any], *args: Any, of: nn.Module | None = None) -> Any:
    """Call ``function``, and again in the backward pass: its activations are not kept.

    ``of`` is the module whose parameters it uses, where it is none itself.

    The second call has the operators' implementation of the first one, wherever the backward
    pass begins, and dropout's masks. Other draws of it are the same, too, but where a CUDA graph
    is recorded, which has no way to draw numbers twice.
    """
    backend, masks = ops.backend(), []
    recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    module = function if isinstance(function, nn.Module) else of
    there = {} if module is None else _standing_in(module)

    def call(*args: Any) -> Any:
        with ops.use(backend), repeating(masks):
            return (
                functional_call(Bound(module, function), there, args) if there else function(*args)
            )

    return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=not recording)


def _standing_in(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a module, where others stand in for them now: in the second call, too."""
    if all(isinstance(p, nn.Parameter) for p in module.parameters()):
        return {}
    return {f"module.{name}": p for name, p in module.named_parameters()}


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
