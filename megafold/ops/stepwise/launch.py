"""The kernels of :mod:`megafold.ops.stepwise` on the host: block sizes and launches."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.layer_norm.launch import as_rows
from megafold.ops.sizes import cdiv, power_of_two
from megafold.ops.stepwise.kernels import gate_kernel, modulate_kernel
from megafold.ops.transition import launch as transition
from megafold.ops.transition.elementwise import swiglu_forward_kernel

KERNELS = ()  # with block sizes in tables: bandwidth is all they need, whatever the device
ELEMENTS = 1024  # of a program, or one row
WIDEST = 512  # channels of a program that adds up no row
OPTIONS = {"num_warps": 4, "num_stages": 1}


def modulate(a: torch.Tensor, gate: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """See :func:`megafold.ops.stepwise.modulated`."""
    out = torch.empty(a.shape, dtype=gate.dtype, device=a.device)
    tensors = (as_rows(a), as_rows(gate), as_rows(shift))
    if out.numel():
        launcher = _whole_rows(
            modulate_kernel, tensors[0].shape, len(tensors[1]), eps, a.device, out.dtype,
            *(layout(t) for t in tensors),
        )  # fmt: skip
        with on(a.device):
            launcher(*tensors, out)
    return out


def gate(x: torch.Tensor, logits: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
    """See :func:`megafold.ops.stepwise.gated`."""
    dtype = x.dtype if added is None else added.dtype
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    tensors = (as_rows(x), as_rows(logits), None if added is None else as_rows(added))
    if out.numel():
        launcher = _elements(
            gate_kernel, tensors[0].shape, len(tensors[1]), x.device, dtype,
            *(layout(t) for t in tensors),
        )  # fmt: skip
        with on(x.device):
            launcher(*tensors, out)
    return out


def swiglu(pairs: torch.Tensor) -> torch.Tensor:
    """See :func:`megafold.ops.stepwise.swiglu`; by the transition's kernel."""
    out = pairs.new_empty((*pairs.shape[:-1], pairs.shape[-1] // 2))
    if out.numel():
        rows = as_rows(pairs.contiguous())
        transition.launch_swiglu(swiglu_forward_kernel, rows, as_rows(out))
    return out


@lru_cache(maxsize=1024)
def _whole_rows(
    kernel: Any, shape: torch.Size, conditions: int, eps: float, device: torch.device,
    dtype: torch.dtype, *tensors: Layout,
) -> Launcher:  # fmt: skip
    rows, channels = shape
    block = power_of_two(channels)
    of_program = max(1, ELEMENTS // block)
    constants = {"ROWS": of_program, "BLOCK_C": block}
    numbers = (*(strides[0] for strides, *_ in tensors), eps, rows, conditions, channels)
    return Launcher(kernel, cdiv(rows, of_program), numbers, constants, OPTIONS)


@lru_cache(maxsize=1024)
def _elements(
    kernel: Any, shape: torch.Size, conditions: int, device: torch.device,
    dtype: torch.dtype, *tensors: Layout | None,
) -> Launcher:  # fmt: skip
    rows, channels = shape
    block = min(WIDEST, power_of_two(channels))
    of_program = ELEMENTS // block
    constants = {"ROWS": of_program, "BLOCK_C": block}
    strides = (0 if one is None else one[0][0] for one in tensors)
    programs = cdiv(rows, of_program) * cdiv(channels, block)
    return Launcher(kernel, programs, (*strides, rows, conditions, channels), constants, OPTIONS)
