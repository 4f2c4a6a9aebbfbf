"""LayerNorm + Linear on the host: which kernels, their block sizes, memory, and launches.

Tensor cores multiply 16-bit operands in the fused kernels. Products of fp32 operands, and of
rows too wide for one tile, are cuBLAS's (through torch), between kernels that take whole rows;
the normalised x is then a temporary of the pass that needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.layer_norm.launch import (
    GRADIENT,
    NORMALISE,
    as_operand,
    as_rows,
    gradient,
    normalise,
    packed,
    padded,
)
from megafold.ops.layer_norm.launch import config_of as config_of_rows
from megafold.ops.layer_norm_linear.kernels import backward_kernel, finish_kernel, forward_kernel
from megafold.ops.sizes import cdiv, multiprocessors, power_of_two
from megafold.ops.tuning import Config, Found, lookup

FORWARD = "layer_norm_linear.forward"
BACKWARD = "layer_norm_linear.backward"
KERNELS = (FORWARD, BACKWARD)

HALVES = (torch.float16, torch.bfloat16)

SMALLEST_BLOCK = 16  # the least that tensor cores multiply
# Channels of which one program holds whole rows, and the weight's gradient. A forward kernel
# that walked over wider rows took 2.6 times as long as PyTorch (docs/layer_norm_linear.md).
WIDEST_FUSED = 128
FILL = 2  # programs per multiprocessor below which rows are shared out among several
# Of the kernel that adds up: small tiles, for there are few, and many groups at a time.
FINISH = {"BLOCK_G": 32, "BLOCK_O": 4, "BLOCK_C": 32}


class Problem(NamedTuple):
    """The sizes of one call."""

    rows: int
    channels: int
    outs: int


def is_fused(weight: torch.Tensor) -> bool:
    """Whether both passes multiply in kernels of their own, rather than through torch."""
    return weight.dtype in HALVES and weight.shape[1] <= WIDEST_FUSED


def config_of(kernel: str, problem: Problem, weight: torch.Tensor) -> Found:
    """The block sizes a fused kernel runs with for a problem, and where they are from."""
    sizes = (("C", padded(problem.channels)), ("O", problem.outs), ("M", problem.rows))
    return lookup(kernel, weight.device, weight.dtype, sizes)


def described(x: torch.Tensor, weight: torch.Tensor) -> tuple[str, ...]:
    """What both passes of a call run, with block sizes and where those are from."""
    rows = x.numel() // x.shape[-1]
    problem = Problem(rows, *reversed(weight.shape))
    if is_fused(weight):
        found = {kernel: config_of(kernel, problem, weight) for kernel in KERNELS}
    else:
        found = {k: config_of_rows(k, x, rows, problem.channels) for k in (NORMALISE, GRADIENT)}
    lines = (f"{kernel}: {f.config} ({f.source})" for kernel, f in found.items())
    if is_fused(weight):
        return tuple(lines)
    why = (
        f"rows of {problem.channels} channels, more than {WIDEST_FUSED}"
        if weight.dtype in HALVES
        else "fp32 operands"
    )
    return (f"products by torch ({why}), between", *(f"  {line}" for line in lines))


def forward(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output ``[..., O]`` in the dtype of the weight, and the statistics fp32 ``[2, M]``."""
    outs, channels = weight.shape
    stats = torch.empty((2, x.numel() // channels), dtype=torch.float32, device=x.device)
    shape = (*x.shape[:-1], outs)
    if not stats.numel() or not outs:
        return torch.empty(shape, dtype=weight.dtype, device=x.device), stats
    flat, weight = as_rows(x), as_rows(weight)
    norm_weight, norm_bias, bias = packed(norm_weight), packed(norm_bias), packed(bias)
    if is_fused(weight):
        out = torch.empty(shape, dtype=weight.dtype, device=x.device)
        launch_forward(flat, norm_weight, norm_bias, weight, bias, out, stats, eps)
        return out, stats
    normal = normalise(flat, norm_weight, norm_bias, stats, eps, weight.dtype, given=False)
    out = normal @ weight.t() if bias is None else torch.addmm(bias, normal, weight.t())
    return out.view(shape), stats


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stats: torch.Tensor,
    asked: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradients asked for of x, norm_weight, norm_bias, weight and bias, in this order."""
    operands = (x, norm_weight, norm_bias, weight, bias)
    if not grad.numel():
        return [
            torch.zeros(t.shape, dtype=t.dtype, device=t.device)
            for t, one in zip(operands, asked, strict=True)
            if one
        ]
    norms = packed(norm_weight), packed(norm_bias)
    run = _fused_backward if is_fused(weight) else _backward_by_products
    found = run(as_rows(grad), as_rows(x), *norms, as_rows(weight), stats, tuple(asked))
    return [
        as_operand(value, t) for t, value, one in zip(operands, found, asked, strict=True) if one
    ]


Gradients = tuple[torch.Tensor | None, ...]


def _fused_backward(grad, x, norm_weight, norm_bias, weight, stats, asked) -> Gradients:
    """One kernel for x and sums over rows, and one for the parameters."""
    for_x, for_norm_weight, for_norm_bias, for_weight, for_bias = asked
    outs, channels = weight.shape
    problem = Problem(x.shape[0], channels, outs)
    for_norms = for_norm_weight or for_norm_bias
    totals = for_norm_bias or for_bias or (for_weight and norm_bias is not None)
    plan = _plan(problem, config_of(BACKWARD, problem, weight).config, x.device)

    def empty(wanted: bool, *shape: int, like: torch.Tensor | None = None) -> torch.Tensor | None:
        dtype = torch.float32 if like is None else like.dtype
        return torch.empty(shape, dtype=dtype, device=x.device) if wanted else None

    grad_x = empty(for_x, *x.shape, like=x)
    products = empty(for_norms or for_weight or for_bias, plan.groups, outs, channels)
    sums = empty(totals, plan.groups, outs)
    launch_backward(grad, x, norm_weight, weight, stats, grad_x, products, sums)
    if products is None:
        return grad_x, None, None, None, None
    grad_weight = empty(for_weight, outs, channels, like=weight)
    grad_bias = empty(for_bias, outs, like=weight)
    of_norms = empty(for_norms, 2, cdiv(outs, FINISH["BLOCK_O"]), channels)
    launch_finish(
        products, sums, norm_weight, norm_bias, weight, grad_weight, grad_bias, of_norms
    )  # fmt: skip
    of_norm_weight, of_norm_bias = (None, None) if of_norms is None else of_norms.sum(dim=1)
    return grad_x, of_norm_weight, of_norm_bias, grad_weight, grad_bias


def _backward_by_products(grad, x, norm_weight, norm_bias, weight, stats, asked) -> Gradients:
    """Products by torch; one temporary as large as x at a time."""
    for_x, for_norm_weight, for_norm_bias, for_weight, for_bias = asked
    grad_weight = grad_x = of_norms = None
    if for_weight:
        normal = normalise(x, norm_weight, norm_bias, stats, 0.0, weight.dtype, given=True)
        grad_weight = grad.t() @ normal
        del normal
    if for_x or for_norm_weight or for_norm_bias:
        grad_x, of_norms = gradient(
            grad @ weight, x, norm_weight, stats,
            for_x=for_x, for_parameters=for_norm_weight or for_norm_bias,
        )  # fmt: skip
    grad_bias = grad.sum(dim=0) if for_bias else None
    of_norm_weight, of_norm_bias = (None, None) if of_norms is None else of_norms
    return grad_x, of_norm_weight, of_norm_bias, grad_weight, grad_bias


def launch_forward(x, norm_weight, norm_bias, weight, bias, out, stats, eps) -> Any:
    """Fill ``out`` and ``stats``; arguments as those of the kernel."""
    problem = Problem(*x.shape, weight.shape[0])
    config = config_of(FORWARD, problem, weight).config
    launcher = _forward(
        forward_kernel, config, problem, x.device, eps,
        layout(x), layout(norm_weight), layout(norm_bias), layout(weight), layout(bias),
    )  # fmt: skip
    with on(x.device):
        return launcher(x, norm_weight, norm_bias, weight, bias, out, stats)


def launch_backward(grad, x, norm_weight, weight, stats, grad_x, products, totals) -> Any:
    """Fill ``grad_x``, ``products`` and ``totals`` where they are not None."""
    problem = Problem(*x.shape, weight.shape[0])
    config = config_of(BACKWARD, problem, weight).config
    launcher = _backward(
        backward_kernel, config, problem, x.device,
        tuple(t is not None for t in (grad_x, products, totals)),
        layout(grad), layout(x), layout(norm_weight), layout(weight),
    )  # fmt: skip
    with on(x.device):
        return launcher(grad, x, norm_weight, weight, stats, grad_x, products, totals)


def launch_finish(
    products, totals, norm_weight, norm_bias, weight, grad_weight, grad_bias, of_norms
) -> Any:
    """Fill the last three, where they are not None, from the sums of ``launch_backward``."""
    outputs = (grad_weight, grad_bias, of_norms)
    launcher = _finish(
        finish_kernel, tuple(products.shape), products.device, totals is not None,
        layout(norm_weight), layout(norm_bias), layout(weight),
        tuple(t is not None for t in outputs),
    )  # fmt: skip
    with on(products.device):
        return launcher(products, totals, norm_weight, norm_bias, weight, *outputs)


class Plan(NamedTuple):
    """How the backward kernel shares out its work."""

    blocks: dict[str, int]
    slices: int  # blocks of outputs
    groups: int  # of rows
    per_group: int  # steps of ``slices`` blocks of rows


@lru_cache(maxsize=4096)
def _plan(problem: Problem, config: Config, device: torch.device) -> Plan:
    blocks = _fitted(config, problem)
    wanted = blocks.pop("WAVES") * multiprocessors(device)
    slices = cdiv(problem.outs, blocks["BLOCK_O"])
    steps = cdiv(problem.rows, blocks["BLOCK_M"] * slices)
    per_group = cdiv(steps, max(1, min(steps, wanted // slices)))
    return Plan(blocks, slices, cdiv(steps, per_group), per_group)


@lru_cache(maxsize=4096)
def _forward(
    kernel: Any, config: Config, problem: Problem, device: torch.device, eps: float,
    x: Layout, norm_weight: Layout | None, norm_bias: Layout | None, weight: Layout,
    bias: Layout | None,
) -> Launcher:  # fmt: skip
    blocks = _fitted(config, problem)
    per_rows = cdiv(problem.rows, blocks["BLOCK_M"])
    blocks_out = cdiv(problem.outs, blocks["BLOCK_O"])
    splits = min(blocks_out, cdiv(FILL * multiprocessors(device), per_rows))
    per_program = cdiv(blocks_out, splits)
    splits = cdiv(blocks_out, per_program)
    constants = {"EVEN": problem.channels == blocks["BLOCK_C"], **blocks}
    numbers = (x[0][0], weight[0][0], eps, *problem, per_program, splits)
    return Launcher(kernel, per_rows * splits, numbers, constants, config.options)


@lru_cache(maxsize=4096)
def _backward(
    kernel: Any, config: Config, problem: Problem, device: torch.device, asked: tuple[bool, ...],
    grad: Layout, x: Layout, norm_weight: Layout | None, weight: Layout,
) -> Launcher:  # fmt: skip
    plan = _plan(problem, config, device)
    constants = {
        "EVEN": problem.channels == plan.blocks["BLOCK_C"],
        "EVEN_O": problem.outs % plan.blocks["BLOCK_O"] == 0,
        "SLICES": plan.slices,
        **plan.blocks,
    }
    numbers = (grad[0][0], x[0][0], weight[0][0], *problem, plan.per_group)
    return Launcher(kernel, plan.groups * plan.slices, numbers, constants, config.options)


@lru_cache(maxsize=4096)
def _finish(
    kernel: Any, shape: tuple[int, int, int], device: torch.device, totals: bool,
    norm_weight: Layout | None, norm_bias: Layout | None, weight: Layout, asked: tuple[bool, ...],
) -> Launcher:  # fmt: skip
    groups, outs, channels = shape
    programs = cdiv(outs, FINISH["BLOCK_O"]) * cdiv(channels, FINISH["BLOCK_C"])
    numbers = (weight[0][0], groups, channels, outs)
    return Launcher(kernel, programs, numbers, FINISH, {"num_warps": 4, "num_stages": 1})


def _fitted(config: Config, problem: Problem) -> dict[str, int]:
    """The block sizes of a table, no larger than the problem, and whole rows."""
    blocks = dict(config.blocks)
    for name, size in (("BLOCK_M", problem.rows), ("BLOCK_O", problem.outs)):
        blocks[name] = min(blocks[name], max(SMALLEST_BLOCK, power_of_two(size)))
    blocks["BLOCK_C"] = padded(problem.channels)
    return blocks
