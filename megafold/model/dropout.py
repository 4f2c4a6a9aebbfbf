"""Dropout whose masks are shared along one dimension, and drawn once where a call is repeated.

Shape letters: N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

Draw = Callable[[], torch.Tensor]

_draw: ContextVar[Callable[[Draw], torch.Tensor]] = ContextVar(
    "megafold_dropout_draw", default=lambda draw: draw()
)


@contextmanager
def repeating(masks: list[torch.Tensor]) -> Iterator[None]:
    """Dropout inside keeps its masks in ``masks``, or takes them from there if there are any.

    For a call that is made again in the backward pass. A mask is small, being shared; and where a
    CUDA graph is recorded, torch's generator cannot be set back to draw the same numbers again.
    """
    outer, kept = _draw.get(), iter(masks) if masks else None

    def draw(new: Draw) -> torch.Tensor:
        if kept is not None:
            return next(kept)
        masks.append(outer(new))
        return masks[-1]

    token = _draw.set(draw)
    try:
        yield
    finally:
        _draw.reset(token)


def shared_mask(x: torch.Tensor, rate: float, dim: int) -> torch.Tensor:
    """What dropout multiplies x by, 1 along ``dim``; drawn by torch's own generator."""
    shape = list(x.shape)
    shape[dim] = 1

    def draw() -> torch.Tensor:
        keep = torch.rand(shape, device=x.device) >= rate
        return keep.to(x.dtype) / (1.0 - rate)

    return _draw.get()(draw)


def dropout_mask(x: torch.Tensor, rate: float, dim: int, training: bool) -> torch.Tensor | None:
    """What dropout that is the same all along ``dim`` multiplies x by; None where it is off."""
    return shared_mask(x, rate, dim) if training and rate > 0.0 else None
