"""Hopper GPUs: which they are, and tensors as their TMA unit reads them.

Operators have kernels of their own for this chip, in Gluon, Triton's language of layouts and warps
with roles; when those run, and what they do, says each operator's ``hopper`` module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

DEVICES = ("nvidia-h100-80gb-hbm3", "nvidia-h200")  # as tables of block sizes name them
HALVES = (torch.float16, torch.bfloat16)  # what tensor cores multiply in 16 bits
L2_OF_AN_H100 = 50 * 2**20
ALIGNED = 16  # bytes: what a tensor's address, and all steps in it, are multiples of
_recording = False


@contextmanager
def recording() -> Iterator[None]:
    """Let the device ``meta`` stand for a Hopper GPU, to record what calls launch there."""
    global _recording
    _recording = True
    try:
        yield
    finally:
        _recording = False


def is_hopper(device: torch.device) -> bool:
    return (_recording and device.type == "meta") or _is_hopper(device)


@cache
def _is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


@cache
def cache_of(device: torch.device) -> int:
    """Bytes of L2; those of an H100 for tensors without memory."""
    if device.type == "meta":
        return L2_OF_AN_H100
    return torch.cuda.get_device_properties(device).L2_cache_size


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether neighbours in memory lie along the last dimension, and the rest is aligned."""
    return tensor.data_ptr() % ALIGNED == 0 and _steps_are_aligned(
        tensor.shape, tensor.stride(), tensor.element_size()
    )


@lru_cache(maxsize=4096)
def _steps_are_aligned(shape: torch.Size, strides: tuple[int, ...], bytes_each: int) -> bool:
    steps = [s for n, s in zip(shape[:-1], strides[:-1], strict=True) if n > 1]
    return strides[-1] == 1 and all(s > 0 and s * bytes_each % ALIGNED == 0 for s in steps)


def readable(*tensors: torch.Tensor) -> bool:
    """Whether TMA reads tensors, all of one dtype."""
    return all(t.dtype == tensors[0].dtype and is_aligned(t) for t in tensors)


def in_words(why_not: str) -> str:
    """Which kernels a pass takes, for `explain`; empty: those of its own."""
    if why_not:
        return f"by the kernels above: {why_not}"
    return "by Hopper's own kernels, where TMA reads the operands as they lie in memory"


@dataclass(frozen=True, eq=False)  # one of each kind: compared by identity
class Box:
    """What TMA moves at once, and how it then lies in shared memory."""

    shape: tuple[int, ...]
    layout: Any


def box(shape: tuple[int, ...], element: Any) -> Box:
    """A box with the layout that Gluon has for it."""
    from triton.experimental.gluon import language as gl

    return Box(shape, gl.NVMMASharedLayout.get_default_for(list(shape), element))


# What describes tensors that lie alike, without a tensor: to describe one anew takes ten times as
# long, which a call does a dozen times.
_described_before: dict[tuple[Any, ...], Any] = {}
_MOST_KEPT = 4096  # sizes change from step to step where crops are not padded


def described(tensor: torch.Tensor, in_boxes: Box) -> Any:
    """A tensor as TMA reads it; those of more dimensions than the box with the first two joined."""
    key = (tensor.shape, tensor.stride(), tensor.dtype, in_boxes)
    alike = _described_before.get(key)
    if alike is None:
        if len(_described_before) >= _MOST_KEPT:
            _described_before.clear()
        alike = _described_before[key] = _describe(tensor, in_boxes)
        alike.base = None
    made = object.__new__(type(alike))  # a third of the time of `copy`
    made.__dict__.update(alike.__dict__, base=tensor)
    return made


def _describe(tensor: torch.Tensor, in_boxes: Box) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    shape, strides = list(tensor.shape), list(tensor.stride())
    if tensor.dim() > len(in_boxes.shape):
        outer = strides[1] if shape[1] > 1 else strides[0]
        shape, strides = [shape[0] * shape[1], *shape[2:]], [outer, *strides[2:]]
    aligned = ALIGNED // tensor.element_size()
    strides = [s if n > 1 else aligned for n, s in zip(shape[:-1], strides[:-1], strict=True)]
    return TensorDescriptor(tensor, shape, [*strides, 1], list(in_boxes.shape), in_boxes.layout)
