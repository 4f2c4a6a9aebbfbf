"""Adaptive LayerNorm on the host: the projections of the condition, and the launches.

The condition is normalised by a kernel and projected through torch, by the very products that
PyTorch has, so that they are as exact; as often as there are conditions. What is kept for the
backward pass is statistics: it normalises the condition and projects for the gate once more. But
where every row has a condition of its own, in 16 bits, a call with gradients keeps the normalised
condition and the gate, less than eager, and gradients of both projections are multiplied as one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from megafold.ops.adaptive_layer_norm.kernels import (
    finish_kernel,
    gradient_kernel,
    gradient_rows_kernel,
    modulate_kernel,
)
from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.layer_norm import launch as by_rows
from megafold.ops.layer_norm.launch import (
    WIDEST,
    as_operand,
    as_rows,
    fitted,
    packed,
    padded,
)
from megafold.ops.sizes import cdiv, multiprocessors
from megafold.ops.tuning import Config, Found, lookup

MODULATE = "adaptive_layer_norm.modulate"
GRADIENT = "adaptive_layer_norm.gradient"
GRADIENT_ROWS = "adaptive_layer_norm.gradient_rows"  # every row with a condition of its own
KERNELS = (MODULATE, GRADIENT, GRADIENT_ROWS)

FINISH = {"BLOCK": 4096, "BLOCK_P": 256, "BLOCK_S": 16}
FINISH_OPTIONS = {"num_warps": 4, "num_stages": 1}


class Problem(NamedTuple):
    """The sizes of one call; row m of a has the condition ``(m // inner) % conditions``."""

    rows: int
    conditions: int
    inner: int
    channels: int

    @property
    def sharing(self) -> int:
        """Rows that share one condition."""
        return self.rows // self.conditions if self.conditions else 0

    @classmethod
    def of(cls, a: torch.Tensor, s: torch.Tensor) -> Problem:
        """For an s that :func:`shared` returned."""
        rows, conditions = a.numel() // a.shape[-1], s.numel() // s.shape[-1]
        lead, own = a.shape[:-1], s.shape[:-1]
        inner = 1
        for size, of_s in zip(reversed(lead), reversed(own), strict=False):
            if of_s != 1 and of_s == size:
                break
            inner *= size
        # One condition for all of them, and no dimension to tell which way it is repeated.
        return cls(rows, conditions, 1 if conditions == 1 else inner, a.shape[-1])


def shared(a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """s as the kernels take it: repeated over leading and over trailing dimensions of a alone.

    Where a dimension between two of its own is repeated, it is written out.
    """
    lead = a.shape[:-1]
    own = (1,) * (len(lead) - s.dim() + 1) + tuple(s.shape[:-1])
    there = [i for i, size in enumerate(own) if size != 1]
    if not there:
        return s
    first, last = there[0], there[-1]
    between = [i for i in range(first, last) if own[i] == 1 and lead[i] != 1]
    if not between:
        return s
    shape = [lead[i] if first <= i <= last else own[i] for i in range(len(lead))]
    return s.expand(*shape, s.shape[-1])


def config_of(kernel: str, a: torch.Tensor, problem: Problem) -> Found:
    """The block sizes a kernel runs with for a problem, and where they are from."""
    sizes = (("C", min(padded(problem.channels), WIDEST)), ("M", problem.rows))
    return lookup(kernel, a.device, 8 * a.dtype.itemsize, sizes)


def keeps(a: torch.Tensor, s: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a call with gradients keeps the gate, for an s that :func:`shared` gave."""
    own = a.numel() * s.shape[-1] == s.numel() * a.shape[-1]  # as many conditions as rows
    return own and weight.dtype.itemsize == 2


def described(a: torch.Tensor, s: torch.Tensor, weight: torch.Tensor) -> tuple[str, ...]:
    """What both passes of a call run, with block sizes and where those are from."""
    s = shared(a, s)
    problem = Problem.of(a, s)
    kept = keeps(a, s, weight)
    kernels = (MODULATE, GRADIENT_ROWS if kept else GRADIENT)
    own = (f"{k}: {(f := config_of(k, a, problem)).config} ({f.source})" for k in kernels)
    wide = s.shape[-1]
    of_s = {k: by_rows.config_of(k, s, problem.conditions, wide) for k in by_rows.KERNELS}
    lines = (f"  {kernel}: {f.config} ({f.source})" for kernel, f in of_s.items())
    once = f"{problem.conditions} conditions projected once, each for {problem.sharing} rows of a"
    if kept:
        once += " (gate and normalised condition are kept where there are gradients)"
    return (*own, f"{once}, products by torch, between", *lines)


def forward(
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    weight_gate: torch.Tensor,
    bias_gate: torch.Tensor | None,
    weight_shift: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, contiguous, in ``dtype``; statistics fp32 ``[2, M]`` of a, ``[2, K]`` of s."""
    problem = Problem.of(a, s)
    rows_s = s.numel() // s.shape[-1]
    out = torch.empty(a.shape, dtype=dtype, device=a.device)
    stats_a = torch.empty((2, problem.rows), dtype=torch.float32, device=a.device)
    stats_s = torch.empty((2, rows_s), dtype=torch.float32, device=a.device)
    if out.numel():
        normal = by_rows.normalise(
            as_rows(s), packed(norm_weight_s), None, stats_s, eps, weight_gate.dtype, given=False
        )
        gate, shift = F.linear(normal, weight_gate, bias_gate), F.linear(normal, weight_shift)
        del normal
        launch_modulate(problem, as_rows(a), gate, shift, out, stats_a, eps)
    return out, stats_a, stats_s


def forward_keeping(
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    weight_gate: torch.Tensor,
    bias_gate: torch.Tensor | None,
    weight_shift: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """As :func:`forward`, where every row has a condition of its own.

    Returns:
        Its three results; the normalised condition ``[M, Cs]``; the gate of each row before its
        sigmoid, ``[M, Ca]``; the weights of gate and shift as one, ``[2 Ca, Cs]``.
    """
    problem = Problem.of(a, s)
    out = torch.empty(a.shape, dtype=dtype, device=a.device)
    stats_a = torch.empty((2, problem.rows), dtype=torch.float32, device=a.device)
    stats_s = torch.empty_like(stats_a)
    normal = by_rows.normalise(
        as_rows(s), packed(norm_weight_s), None, stats_s, eps, weight_gate.dtype, given=False
    )
    gate = F.linear(normal, weight_gate, bias_gate)
    if out.numel():
        shift = F.linear(normal, weight_shift)
        launch_modulate(problem, as_rows(a), gate, shift, out, stats_a, eps)
    return out, stats_a, stats_s, normal, gate, torch.cat([weight_gate, weight_shift])


def backward(
    grad: torch.Tensor,
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    weight_gate: torch.Tensor,
    bias_gate: torch.Tensor | None,
    weight_shift: torch.Tensor,
    stats_a: torch.Tensor,
    stats_s: torch.Tensor,
    asked: Sequence[bool],
    *,
    added: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The gradients asked for of a, s, norm_weight_s, weight_gate, bias_gate and weight_shift.

    Args:
        added: to the gradient of a, ``[..., Ca]``; or None.
    """
    operands = (a, s, norm_weight_s, weight_gate, bias_gate, weight_shift)
    if not grad.numel():
        return [
            torch.zeros(t.shape, dtype=t.dtype, device=t.device)
            for t, one in zip(operands, asked, strict=True)
            if one
        ]
    problem = Problem.of(a, s)
    for_a, for_s, for_norm, for_gate, for_bias, for_shift = asked
    flat, norm_weight = as_rows(s), packed(norm_weight_s)
    normal = by_rows.normalise(
        flat, norm_weight, None, stats_s, 0.0, weight_gate.dtype, given=True
    )  # fmt: skip
    gate = F.linear(normal, weight_gate, bias_gate)
    grad_a = torch.empty(a.shape, dtype=a.dtype, device=a.device) if for_a else None
    projected = launch_gradient(
        problem, as_rows(grad), as_rows(a), gate, stats_a, _rows_added(added, for_a), grad_a,
        any(asked[1:]),
    )  # fmt: skip
    del gate
    of_s = of_norms = of_gate = of_bias = of_shift = None
    if projected is not None:
        grad_gate, grad_shift = projected
        of_gate = grad_gate.t() @ normal if for_gate else None
        of_shift = grad_shift.t() @ normal if for_shift else None
        of_bias = grad_gate.sum(dim=0) if for_bias else None
        del normal
        if for_s or for_norm:
            of_normal = (grad_gate @ weight_gate).addmm_(grad_shift, weight_shift)
            of_s, of_norms = by_rows.gradient(
                of_normal, flat, norm_weight, stats_s, for_x=for_s, for_parameters=for_norm
            )
    of_norm = None if of_norms is None else of_norms[0]
    results = (grad_a, of_s, of_norm, of_gate, of_bias, of_shift)
    return [
        as_operand(value, t) for t, value, one in zip(operands, results, asked, strict=True) if one
    ]


def backward_from_kept(
    grad: torch.Tensor,
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    weight_gate: torch.Tensor,
    bias_gate: torch.Tensor | None,
    weight_shift: torch.Tensor,
    stats_a: torch.Tensor,
    stats_s: torch.Tensor,
    normal: torch.Tensor,
    gate: torch.Tensor,
    both: torch.Tensor,
    asked: Sequence[bool],
    *,
    added: torch.Tensor | None = None,
    room: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """What :func:`backward` returns, from what :func:`forward_keeping` did.

    Args:
        room: what nobody needs any more: gradients of the projections may be written over it.
    """
    operands = (a, s, norm_weight_s, weight_gate, bias_gate, weight_shift)
    if not grad.numel():
        return [
            torch.zeros(t.shape, dtype=t.dtype, device=t.device)
            for t, one in zip(operands, asked, strict=True)
            if one
        ]
    for_a, for_s, for_norm, for_gate, for_bias, for_shift = asked
    grad_a = torch.empty(a.shape, dtype=a.dtype, device=a.device) if for_a else None
    of_projected = None
    if any((for_s, for_norm, for_gate, for_shift)):
        of_projected = _within(room, gate, gate.shape[0], 2 * gate.shape[1])
    of_bias = launch_gradient_rows(
        as_rows(grad), as_rows(a), gate, stats_a, _rows_added(added, for_a), grad_a, of_projected,
        for_bias,
    )  # fmt: skip
    of_both = of_s = of_norm = None
    if for_gate or for_shift:
        of_both = of_projected.t() @ normal
    if for_s or for_norm:
        of_s, of_norm = by_rows.gradient_with_sums(
            of_projected @ both, as_rows(s), packed(norm_weight_s), stats_s, for_x=for_s,
            for_parameters=for_norm,
        )  # fmt: skip
    of_parameters = _finished(operands[2:], of_both, of_bias, of_norm, asked[2:])
    found = (grad_a, None if of_s is None else as_operand(of_s, s), *of_parameters)
    return [gradient for gradient, one in zip(found, asked, strict=True) if one]


def _rows_added(added: torch.Tensor | None, for_a: bool) -> torch.Tensor | None:
    return as_rows(added) if added is not None and for_a else None


def _within(room: torch.Tensor | None, like: torch.Tensor, *shape: int) -> torch.Tensor:
    """A tensor of the dtype of ``like``, in memory that is there if it is enough."""
    size = math.prod(shape)
    if room is None or room.dtype != like.dtype or room.numel() < size:
        return like.new_empty(shape)
    return room.view(-1)[:size].view(shape)


def _finished(
    parameters: Sequence[torch.Tensor | None],
    of_both: torch.Tensor | None,
    of_bias: torch.Tensor | None,
    of_norm: torch.Tensor | None,
    asked: Sequence[bool],
) -> list[torch.Tensor | None]:
    """The gradients asked for of the norm's weight, the gate's weight and bias, the shift's."""
    norm, gate, bias, shift = found = [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if one else None
        for t, one in zip(parameters, asked, strict=True)
    ]
    if any(asked):
        channels, channels_s = parameters[1].shape
        tensors = (of_both, of_bias, of_norm, gate, shift, bias, norm)
        launcher = _finish(
            finish_kernel, parameters[1].device, channels, channels_s,
            0 if of_bias is None else of_bias.shape[0],
            0 if of_norm is None else of_norm.shape[1],
            *(None if t is None else t.dtype for t in tensors),
        )  # fmt: skip
        with on(parameters[1].device):
            launcher(*tensors)
    return found


def launch_modulate(problem, a, gate, shift, out, stats, eps) -> Any:
    """Fill ``out`` and ``stats``; arguments as those of the kernel."""
    config = config_of(MODULATE, a, problem).config
    launcher = _modulate(
        modulate_kernel, config, problem, a.device, eps, layout(a), layout(gate), out.dtype
    )
    with on(a.device):
        return launcher(a, gate, shift, out, stats)


def launch_gradient(
    problem, grad, a, gate, stats, added, grad_a, for_projected
) -> torch.Tensor | None:
    """Fill ``grad_a`` where it is not None; the gradient of the projections where asked for.

    Args:
        added: to ``grad_a``; or None.

    Returns:
        Those of gate and shift, ``[2, K, C]`` in the dtype of ``gate``, or None.
    """
    config = config_of(GRADIENT, a, problem).config
    blocks = cdiv(problem.conditions, fitted(config, problem.channels)["ROWS"])
    wanted = cdiv(config.blocks["WAVES"] * multiprocessors(a.device), blocks)
    per_group = cdiv(problem.sharing, min(wanted, problem.sharing))
    groups = cdiv(problem.sharing, per_group)
    sums = None
    if for_projected:
        dtype = gate.dtype if groups == 1 else torch.float32
        shape = (groups, 2, problem.conditions, problem.channels)
        sums = torch.empty(shape, dtype=dtype, device=a.device)
    launcher = _gradient(
        gradient_kernel, config, problem, blocks * groups, per_group, a.device,
        layout(grad), layout(a), layout(added), gate.dtype, grad_a is not None,
        None if sums is None else sums.dtype,
    )  # fmt: skip
    with on(a.device):
        launcher(grad, a, gate, stats, added, grad_a, sums)
    if sums is None:
        return None
    return sums[0] if groups == 1 else sums.sum(dim=0).to(gate.dtype)


def launch_gradient_rows(
    grad, a, gate, stats, added, grad_a, grad_projected, for_bias
) -> torch.Tensor | None:
    """Fill ``grad_a`` and ``grad_projected`` where they are not None.

    Args:
        added: to ``grad_a``; or None.

    Returns:
        Where it is asked for, the programs' shares of the gradient of the gate's bias, fp32
        ``[programs, C]``.
    """
    rows, channels = a.shape
    config = config_of(GRADIENT_ROWS, a, Problem(rows, rows, 1, channels)).config
    launcher = _gradient_rows(
        gradient_rows_kernel, config, rows, channels, a.device, layout(grad), layout(a),
        layout(added), gate.dtype, grad_a is not None, grad_projected is not None, for_bias,
    )  # fmt: skip
    sums = None
    if for_bias:
        shape = (launcher.grid[0], channels)
        sums = torch.empty(shape, dtype=torch.float32, device=a.device)
    with on(a.device):
        launcher(grad, a, gate, stats, added, grad_a, grad_projected, sums)
    return sums


@lru_cache(maxsize=4096)
def _modulate(
    kernel: Any, config: Config, problem: Problem, device: torch.device, eps: float, a: Layout,
    gate: Layout, out: torch.dtype,
) -> Launcher:  # fmt: skip
    constants = fitted(config, problem.channels)
    programs = cdiv(problem.rows, constants["ROWS"])
    return Launcher(kernel, programs, (a[0][0], eps, *problem), constants, config.options)


@lru_cache(maxsize=4096)
def _gradient_rows(
    kernel: Any, config: Config, rows: int, channels: int, device: torch.device, grad: Layout,
    a: Layout, added: Layout | None, gate: torch.dtype, *wanted: bool,
) -> Launcher:  # fmt: skip
    constants = fitted(config, channels)
    blocks = cdiv(rows, constants["ROWS"])
    programs = config.blocks["WAVES"] * multiprocessors(device)
    per_program = cdiv(blocks, min(blocks, programs))
    strides = grad[0][0], a[0][0], added[0][0] if added else 0
    numbers = (*strides, rows, channels, per_program)
    return Launcher(kernel, cdiv(blocks, per_program), numbers, constants, config.options)


@lru_cache(maxsize=4096)
def _finish(
    kernel: Any, device: torch.device, channels: int, channels_s: int, programs: int,
    programs_s: int, *dtypes: torch.dtype | None,
) -> Launcher:  # fmt: skip
    half = channels * channels_s if dtypes[0] is not None else 0
    blocks = cdiv(half, FINISH["BLOCK"])
    blocks += cdiv(channels, FINISH["BLOCK_S"]) if programs else 0
    blocks += cdiv(channels_s, FINISH["BLOCK_S"]) if programs_s else 0
    numbers = (half, programs, channels, programs_s, channels_s)
    return Launcher(kernel, blocks, numbers, FINISH, FINISH_OPTIONS)


@lru_cache(maxsize=4096)
def _gradient(
    kernel: Any, config: Config, problem: Problem, programs: int, per_group: int,
    device: torch.device, grad: Layout, a: Layout, added: Layout | None, gate: torch.dtype,
    for_a: bool, sums: torch.dtype | None,
) -> Launcher:  # fmt: skip
    constants = fitted(config, problem.channels)
    strides = grad[0][0], a[0][0], added[0][0] if added else 0
    numbers = (*strides, *problem, problem.sharing, per_group)
    return Launcher(kernel, programs, numbers, constants, config.options)
