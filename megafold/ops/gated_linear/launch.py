"""A gated linear layer on the host: block sizes, memory, and launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from megafold.ops.gated_linear import hopper
from megafold.ops.gated_linear.function import dtype_of
from megafold.ops.gated_linear.kernels import backward_kernel, forward_kernel
from megafold.ops.gated_linear.rows import Rows, as_rows, expanded, with_neighbours
from megafold.ops.hopper import in_words, readable
from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.layer_norm.launch import padded
from megafold.ops.precision import bits_of, precision_of
from megafold.ops.sizes import cdiv, multiprocessors, power_of_two
from megafold.ops.sums import add_sums
from megafold.ops.tuning import Config, Found, lookup

FORWARD = "gated_linear.forward"
BACKWARD = "gated_linear.backward"
KERNELS = (FORWARD, BACKWARD)

SMALLEST_BLOCK = 16  # the least that tensor cores multiply


class Problem(NamedTuple):
    """The sizes of one call."""

    rows: int
    channels: int
    outs: int

    @classmethod
    def of(cls, x: torch.Tensor, weight: torch.Tensor) -> Problem:
        outs, channels = weight.shape
        return cls(x.numel() // channels, channels, outs)


def config_of(kernel: str, problem: Problem, weight: torch.Tensor) -> Found:
    """The block sizes a kernel runs with for a problem, and where they are from."""
    sizes = (("C", padded(problem.channels)), ("O", problem.outs), ("M", problem.rows))
    return lookup(kernel, weight.device, bits_of(weight.dtype, weight.device), sizes)


def described(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    dropout: torch.Tensor | None,
) -> tuple[str, ...]:
    """What both passes of a call run, with block sizes and where those are from."""
    problem = Problem.of(x, weight)
    found = {kernel: config_of(kernel, problem, weight) for kernel in KERNELS}
    lines = [f"{kernel}: {f.config} ({f.source})" for kernel, f in found.items()]
    if hopper.is_hopper(x.device):
        why_not = hopper.why_not(problem, weight, dtype_of(weight, residual), dropout, BACKWARD)
        lines.append(f"gated_linear.hopper: gradients {in_words(why_not)}")
    return tuple(lines)


def forward(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    dropout: torch.Tensor | None,
) -> torch.Tensor:
    """The output ``[..., O]``, contiguous."""
    lead = x.shape[:-1]
    shape = (*lead, weight.shape[0])
    out = torch.empty(shape, dtype=dtype_of(weight, residual), device=x.device)
    if out.numel():
        inner, operands = as_rows(lead, x, gate, residual, expanded(dropout, shape))
        launch_forward(Problem.of(x, weight), inner, *operands, with_neighbours(weight), out)
    return out


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    dropout: torch.Tensor | None,
    asked: Sequence[bool],
    into_gate: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The gradients asked for of x, which lies in memory as x does, of gate and of weight.

    Args:
        into_gate: memory for that of gate, any strides; None: its own, contiguous.
    """
    for_x, for_gate, for_weight = asked
    grad_x = torch.empty_like(x) if for_x else None
    grad_gate, grad_weight = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if one else None
        for t, one in ((gate, for_gate and into_gate is None), (weight, for_weight))
    )
    grad_gate = grad_gate if into_gate is None else into_gate
    found = [t for t in (grad_x, grad_gate, grad_weight) if t is not None]
    if not grad.numel():
        return [t.zero_() for t in found]
    lead, weight, problem = x.shape[:-1], with_neighbours(weight), Problem.of(x, weight)
    tensors = (grad, x, gate, expanded(dropout, grad.shape), grad_x, grad_gate)
    inner, rows = as_rows(lead, *tensors)
    sums = None
    if all(asked) and not hopper.why_not(problem, weight, grad.dtype, dropout, BACKWARD):
        sums = _on_hopper(problem, inner, rows, weight)
    if sums is None:
        plan = plan_of(problem, weight, grad.dtype)
        if for_weight:
            sums = torch.empty((plan.groups, *weight.shape), dtype=torch.float32, device=x.device)
        launch_backward(plan, problem, inner, *rows, weight, sums)
    for own, given in zip(rows[-2:], (grad_x, grad_gate), strict=True):
        if own.tensor is not given:  # it lies in memory in a way that two strides do not reach
            given.copy_(own.tensor)
    if for_weight:
        add_sums(sums, grad_weight)
    return found


def _on_hopper(
    problem: Problem, inner: int, rows: Sequence[Rows], weight: torch.Tensor
) -> torch.Tensor | None:
    """Fill the gradients of x and gate; what sums to that of weight. None: TMA cannot read them."""
    grad, x, gate, dropout, grad_x, grad_gate = rows
    pairs = hopper.as_pairs(problem, inner, (grad, x, gate, grad_x, grad_gate))
    if not readable(weight, *pairs):
        return None
    plan = hopper.plan_of(*pairs[0].shape[:2], weight.device)
    sums = torch.empty((plan.programs, *weight.shape), dtype=torch.float32, device=weight.device)
    hopper.launch(plan, *pairs[:3], dropout, *pairs[3:], weight, sums)
    return sums


def launch_forward(
    problem: Problem, inner: int, x: Rows, gate: Rows, residual: Rows, dropout: Rows,
    weight: torch.Tensor, out: torch.Tensor,
) -> Any:  # fmt: skip
    """Fill ``out``; J is ``inner``, the other arguments as those of the kernel."""
    tensors = (x.tensor, gate.tensor, weight, residual.tensor, dropout.tensor, out)
    strides = (*x[1:], *gate[1:], *residual[1:], *dropout[1:], weight.stride(0))
    launcher = _forward(
        forward_kernel, config_of(FORWARD, problem, weight).config, problem, inner, strides,
        precision_of(weight.dtype, weight.device), weight.device, *(layout(t) for t in tensors),
    )  # fmt: skip
    with on(weight.device):
        return launcher(*tensors)


class Plan(NamedTuple):
    """How the backward kernel shares out its work."""

    config: Config
    slices: int  # blocks of channels, each with a program
    groups: int  # of rows
    per_group: int  # blocks of rows


def plan_of(problem: Problem, weight: torch.Tensor, grad: torch.dtype) -> Plan:
    """The shares of a call.

    Programs have half the channels of the table where the gradient of the output is wider than
    operands are (that of an fp32 residual): its rows take twice the registers.
    """
    config = config_of(BACKWARD, problem, weight).config
    channels = config.blocks.get("BLOCK_C", problem.channels)
    if grad.itemsize > weight.dtype.itemsize and channels > SMALLEST_BLOCK:
        config = replace(config, blocks={**config.blocks, "BLOCK_C": channels // 2})
    return _plan(config, problem, weight.device)


def launch_backward(
    plan: Plan, problem: Problem, inner: int, grad: Rows, x: Rows, gate: Rows, dropout: Rows,
    grad_x: Rows, grad_gate: Rows, weight: torch.Tensor, sums: torch.Tensor | None,
) -> Any:  # fmt: skip
    """Fill what is not None of ``grad_x``, ``grad_gate`` and ``sums``."""
    tensors = (
        grad.tensor, x.tensor, gate.tensor, weight, dropout.tensor, grad_x.tensor,
        grad_gate.tensor, sums,
    )  # fmt: skip
    strides = (*grad[1:], *x[1:], *gate[1:], *dropout[1:], *grad_x[1:], *grad_gate[1:])
    strides = (*strides, weight.stride(0))
    launcher = _backward(
        backward_kernel, plan, problem, inner, strides,
        precision_of(weight.dtype, weight.device), weight.device, *(layout(t) for t in tensors),
    )  # fmt: skip
    with on(weight.device):
        return launcher(*tensors)


@lru_cache(maxsize=4096)
def _plan(config: Config, problem: Problem, device: torch.device) -> Plan:
    blocks = _fitted(config, problem)
    slices = cdiv(problem.channels, blocks["BLOCK_C"])
    of_rows = cdiv(problem.rows, blocks["BLOCK_M"])
    wanted = max(1, blocks["WAVES"] * multiprocessors(device) // slices)
    per_group = cdiv(of_rows, min(of_rows, wanted))
    return Plan(config, slices, cdiv(of_rows, per_group), per_group)


@lru_cache(maxsize=4096)
def _forward(
    kernel: Any, config: Config, problem: Problem, inner: int, strides: tuple[int, ...],
    precision: str, device: torch.device, *alike: Layout | None,
) -> Launcher:  # fmt: skip
    blocks = _fitted(config, problem)
    of_rows = cdiv(problem.rows, blocks["BLOCK_M"])
    programs = min(of_rows, blocks.pop("WAVES") * multiprocessors(device))
    numbers = (*strides, problem.rows, inner, of_rows)
    constants = {**_constants(problem, blocks), "PRECISION": precision}
    return Launcher(kernel, programs, numbers, constants, config.options)


@lru_cache(maxsize=4096)
def _backward(
    kernel: Any, plan: Plan, problem: Problem, inner: int, strides: tuple[int, ...],
    precision: str, device: torch.device, *alike: Layout | None,
) -> Launcher:  # fmt: skip
    blocks = _fitted(plan.config, problem)
    del blocks["WAVES"]  # which the plan has counted
    of_rows = cdiv(problem.rows, blocks["BLOCK_M"])
    numbers = (*strides, problem.rows, inner, of_rows, plan.per_group)
    constants = {"SLICES": plan.slices, **_constants(problem, blocks), "PRECISION": precision}
    return Launcher(kernel, plan.groups * plan.slices, numbers, constants, plan.config.options)


def _fitted(config: Config, problem: Problem) -> dict[str, int]:
    """The block sizes of a table, no larger than the problem; all of what a table leaves out."""
    sizes = {"BLOCK_M": problem.rows, "BLOCK_C": problem.channels, "BLOCK_O": problem.outs}
    whole = {name: max(SMALLEST_BLOCK, power_of_two(size)) for name, size in sizes.items()}
    return {n: min(size, whole.get(n, size)) for n, size in {**whole, **config.blocks}.items()}


def _constants(problem: Problem, blocks: dict[str, int]) -> dict[str, Any]:
    return {
        "C": problem.channels,
        "OUTS": problem.outs,
        "EVEN_C": problem.channels % blocks["BLOCK_C"] == 0,
        "EVEN_O": problem.outs % blocks["BLOCK_O"] == 0,
        **blocks,
    }
