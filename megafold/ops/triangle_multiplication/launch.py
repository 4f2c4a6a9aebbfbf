"""Triangle multiplication on the host: block sizes, and the launches of the kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.layer_norm.launch import padded
from megafold.ops.sizes import cdiv, power_of_two
from megafold.ops.triangle_multiplication.backward import grad_input_kernel, grad_output_kernel
from megafold.ops.triangle_multiplication.forward import output_kernel, project_kernel
from megafold.ops.tuning import Config, Found, lookup

PROJECT = "triangle_multiplication.project"
OUTPUT = "triangle_multiplication.output"
GRAD_OUTPUT = "triangle_multiplication.grad_output"
GRAD_INPUT = "triangle_multiplication.grad_input"
KERNELS = (PROJECT, OUTPUT, GRAD_OUTPUT, GRAD_INPUT)

SMALLEST_BLOCK = 16  # the least that tensor cores multiply


class Problem(NamedTuple):
    """The sizes of one call."""

    batch: int
    tokens: int
    channels: int

    @property
    def pairs(self) -> int:
        return self.batch * self.tokens**2


def config_of(kernel: str, problem: Problem, weight: torch.Tensor) -> Found:
    """The block sizes a kernel runs with for a problem, and where they are from."""
    sizes = (("C", padded(problem.channels)), ("M", problem.pairs))
    return lookup(kernel, weight.device, weight.dtype, sizes)


def described(z: torch.Tensor, weight: torch.Tensor) -> tuple[str, ...]:
    """What both passes of a call run, with block sizes and where those are from."""
    problem = Problem(z.shape[0], z.shape[1], z.shape[3])
    lines = []
    for kernel in KERNELS:
        found = config_of(kernel, problem, weight)
        lines.append(f"{kernel}: {found.config} ({found.source})")
    return (*lines, "products over triangles, gradients of the weights: torch.bmm and torch.mm")


def launch_project(problem, z, mask, norm_weight, norm_bias, p, g, edges, stats, eps) -> Any:
    """Fill ``edges`` and ``stats``; arguments as those of the kernel."""
    launcher = _launcher(
        project_kernel, config_of(PROJECT, problem, p).config, problem, problem.pairs,
        (z.stride(0), eps, problem.pairs, problem.channels), precision(p), z.device,
        *(layout(t) for t in (z, mask, norm_weight, norm_bias, p, g)),
    )  # fmt: skip
    with on(z.device):
        return launcher(z, mask, norm_weight, norm_bias, p, g, edges, stats)


def launch_output(
    problem, x, z, norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, p, g,
    stats_in, out, stats_out, eps,
) -> Any:  # fmt: skip
    """Fill ``out`` and ``stats_out``; arguments as those of the kernel."""
    operands = (x, z, norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, p, g)
    launcher = _launcher(
        output_kernel, config_of(OUTPUT, problem, p).config, problem, problem.pairs,
        (z.stride(0), eps, problem.pairs, problem.channels), precision(p), z.device,
        *(layout(t) for t in (*operands, stats_in, stats_out)),
    )  # fmt: skip
    with on(z.device):
        return launcher(*operands, stats_in, out, stats_out)


def launch_grad_output(
    problem, grad, x, z, norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, p, g,
    stats_in, stats_out, grad_x, grad_gate, grad_u, y, sums, first, rows,
) -> Any:  # fmt: skip
    """Fill a chunk of pairs of what is not None from ``grad_x`` to ``sums``."""
    operands = (
        grad, x, z, norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, p, g,
        stats_in, stats_out,
    )  # fmt: skip
    outputs = (grad_x, grad_gate, grad_u, y, sums)
    launcher = _launcher(
        grad_output_kernel, config_of(GRAD_OUTPUT, problem, p).config, problem, rows,
        (grad.stride(0), z.stride(0), problem.pairs, problem.channels, first, rows),
        precision(p), z.device, *(layout(t) for t in (*operands, *outputs)),
    )  # fmt: skip
    with on(z.device):
        return launcher(*operands, *outputs)


def launch_grad_input(
    problem, edges, grad_gate, z, mask, norm_weight, norm_bias, p, g, g_out, stats,
    grad_z, parts, n, sums, gap, first, rows,
) -> Any:  # fmt: skip
    """Fill the pairs of one chunk of ``grad_z``, ``parts`` with ``n``, and ``sums``."""
    operands = (edges, grad_gate, z, mask, norm_weight, norm_bias, p, g, g_out, stats)
    outputs = (grad_z, parts, n, sums)
    launcher = _launcher(
        grad_input_kernel, config_of(GRAD_INPUT, problem, p).config, problem, rows,
        (z.stride(0), problem.pairs, problem.channels, gap, first, rows), precision(p), z.device,
        *(layout(t) for t in (*operands, *outputs)),
    )  # fmt: skip
    with on(z.device):
        return launcher(*operands, *outputs)


@lru_cache(maxsize=4096)
def _launcher(
    kernel: Any, config: Config, problem: Problem, rows: int, numbers: tuple[float | int, ...],
    precision: str, device: torch.device, *alike: Layout | None,
) -> Launcher:  # fmt: skip
    blocks = _fitted(config, problem)
    constants = {
        "EVEN": problem.channels == blocks["BLOCK_C"],
        "PRECISION": precision,
        **blocks,
    }
    programs = cdiv(rows, blocks["BLOCK_M"])
    return Launcher(kernel, programs, numbers, constants, config.options)


def programs_of(kernel: str, problem: Problem, weight: torch.Tensor) -> int:
    """How many programs of a kernel take all pairs, each one block of them."""
    config = config_of(kernel, problem, weight).config
    return cdiv(problem.pairs, _fitted(config, problem)["BLOCK_M"])


def _fitted(config: Config, problem: Problem) -> dict[str, int]:
    """The block sizes of a table, no larger than the problem."""
    width = padded(problem.channels)
    pairs = max(SMALLEST_BLOCK, power_of_two(problem.pairs))
    return {
        "BLOCK_M": min(config.blocks["BLOCK_M"], pairs),
        "BLOCK_O": min(config.blocks["BLOCK_O"], width),
        "BLOCK_C": width,
    }


def precision(weight: torch.Tensor) -> str:
    """How fp32 operands are multiplied: as torch's own setting says for its products."""
    nvidia = weight.device.type == "cuda" and torch.version.hip is None
    tf32 = weight.dtype == torch.float32 and nvidia and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"
