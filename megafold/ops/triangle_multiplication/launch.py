"""Triangle multiplication on the host: block sizes, and the launches of the kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from megafold.ops.hopper import in_words, is_hopper, readable
from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.layer_norm.launch import padded
from megafold.ops.precision import precision_of
from megafold.ops.sizes import cdiv, multiprocessors, power_of_two
from megafold.ops.triangle_multiplication import (
    hopper,
    hopper_launch_backward,
    hopper_launch_forward,
    hopper_launch_weights,
)
from megafold.ops.triangle_multiplication.backward import grad_x_kernel, grad_z_kernel
from megafold.ops.triangle_multiplication.forward import output_kernel, project_kernel
from megafold.ops.triangle_multiplication.weights import weights_in_kernel, weights_out_kernel
from megafold.ops.tuning import Config, Found, lookup

PROJECT = "triangle_multiplication.project"
OUTPUT = "triangle_multiplication.output"
WEIGHTS_OUT = "triangle_multiplication.weights_out"
GRAD_X = "triangle_multiplication.grad_x"
WEIGHTS_IN = "triangle_multiplication.weights_in"
GRAD_Z = "triangle_multiplication.grad_z"
KERNELS = (PROJECT, OUTPUT, WEIGHTS_OUT, GRAD_X, WEIGHTS_IN, GRAD_Z)  # in the order they run
OF_WEIGHTS = (WEIGHTS_OUT, WEIGHTS_IN)  # of which every multiprocessor has WAVES programs

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
    return lookup(kernel, weight.device, 8 * weight.dtype.itemsize, sizes)


def described(z: torch.Tensor, weight: torch.Tensor, *, dropped: bool = False) -> tuple[str, ...]:
    """What both passes of a call run, with block sizes and where those are from.

    Args:
        dropped: whether it has dropout.
    """
    problem = Problem(z.shape[0], z.shape[1], z.shape[3])
    lines = []
    for kernel in KERNELS:
        found = config_of(kernel, problem, weight)
        lines.append(f"{kernel}: {found.config} ({found.source})")
    if is_hopper(z.device):
        why = {kernel: hopper.why_not(problem, z, weight.dtype, kernel) for kernel in KERNELS}
        for reason in dict.fromkeys(why.values()):
            which = ", ".join(k.partition(".")[2] for k in KERNELS if why[k] == reason)
            lines.append(f"triangle_multiplication.hopper: {which} {in_words(reason)}")
    if dropped:
        lines.append("gradient times dropout: a kernel of its own, the same for every device")
    return (*lines, "products over triangles: torch.bmm")


def own(kernel: str, problem: Problem, z: torch.Tensor, *tensors: torch.Tensor) -> bool:
    """Whether a kernel of a call is Hopper's own; ``tensors``: what TMA would read beside z."""
    why_not = hopper.why_not(problem, z, tensors[0].dtype, kernel)
    return not why_not and readable(z, *tensors)


def launch_project(problem, z, mask, norm_weight, norm_bias, p, g, edges, stats, eps) -> Any:
    """Fill ``edges`` and ``stats``; arguments as those of the kernel."""
    if own(PROJECT, problem, z, p, g, edges):
        return hopper_launch_forward.launch_project(
            problem, z, mask, norm_weight, norm_bias, p, g, edges, stats, eps
        )
    launcher = _launcher(
        project_kernel, config_of(PROJECT, problem, p).config, problem, None,
        (z.stride(0), eps, problem.pairs, problem.channels),
        precision_of(p.dtype, p.device), z.device,
        *(layout(t) for t in (z, mask, norm_weight, norm_bias, p, g)),
    )  # fmt: skip
    with on(z.device):
        return launcher(z, mask, norm_weight, norm_bias, p, g, edges, stats)


def launch_output(
    problem, x, z, norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, p, g,
    stats_in, dropout, residual, out, stats_out, eps,
) -> Any:  # fmt: skip
    """Fill ``out`` and ``stats_out``; arguments as those of the kernel.

    Args:
        dropout: as :func:`megafold.ops.triangle_multiplication.dropout.as_read` has it.
        residual: whether z is added.
    """
    operands = (x, z, norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, p, g)
    if own(OUTPUT, problem, z, p, g, x, out):
        return hopper_launch_forward.launch_output(
            problem, *operands, stats_in, dropout, residual, out, stats_out, eps
        )
    tensors = (*operands, stats_in, dropout.tensor, z if residual else None, out, stats_out)
    launcher = _launcher(
        output_kernel, config_of(OUTPUT, problem, p).config, problem, None,
        (z.stride(0), problem.tokens, *dropout.strides, eps, problem.pairs, problem.channels),
        precision_of(p.dtype, p.device), z.device,
        *(layout(t) for t in tensors),
    )  # fmt: skip
    with on(z.device):
        return launcher(*tensors)


def launch_weights_out(
    problem, grad, x, z, norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, p, g,
    stats_in, stats_out, sums, own,
) -> Any:  # fmt: skip
    """Fill ``sums``, of as many splits as :func:`splits_of` says."""
    operands = (
        grad, x, z, norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, p, g,
        stats_in, stats_out, sums,
    )  # fmt: skip
    if own:
        return hopper_launch_weights.launch_weights_out(problem, *operands)
    blocks, splits = _split(WEIGHTS_OUT, problem, p)
    launcher = _launcher(
        weights_out_kernel, config_of(WEIGHTS_OUT, problem, p).config, problem, blocks * splits,
        (grad.stride(0), z.stride(0), problem.pairs, problem.channels),
        precision_of(p.dtype, p.device), z.device,
        *(layout(t) for t in operands),
    )  # fmt: skip
    with on(z.device):
        return launcher(*operands)


def launch_grad_x(
    problem, grad, x, z, norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, p, g,
    stats_in, stats_out, grad_x, grad_gate, sums, own,
) -> Any:  # fmt: skip
    """Fill what is not None of ``grad_x``, ``grad_gate`` and ``sums``."""
    operands = (
        grad, x, z, norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, p, g,
        stats_in, stats_out, grad_x, grad_gate, sums,
    )  # fmt: skip
    if own:
        return hopper_launch_backward.launch_grad_x(problem, *operands)
    launcher = _launcher(
        grad_x_kernel, config_of(GRAD_X, problem, p).config, problem, None,
        (grad.stride(0), z.stride(0), problem.pairs, problem.channels),
        precision_of(p.dtype, p.device), z.device,
        *(layout(t) for t in operands),
    )  # fmt: skip
    with on(z.device):
        return launcher(*operands)


def launch_weights_in(
    problem, edges, z, mask, norm_weight, norm_bias, p, g, stats, sums, gap, own
) -> Any:  # fmt: skip
    """Fill ``sums``, of as many splits as :func:`splits_of` says."""
    operands = (edges, z, mask, norm_weight, norm_bias, p, g, stats, sums)
    if own:
        return hopper_launch_weights.launch_weights_in(problem, *operands, gap)
    blocks, splits = _split(WEIGHTS_IN, problem, p)
    launcher = _launcher(
        weights_in_kernel, config_of(WEIGHTS_IN, problem, p).config, problem, blocks * splits,
        (z.stride(0), problem.pairs, problem.channels, gap),
        precision_of(p.dtype, p.device), z.device,
        *(layout(t) for t in operands),
    )  # fmt: skip
    with on(z.device):
        return launcher(*operands)


def launch_grad_z(
    problem, edges, grad_gate, z, mask, norm_weight, norm_bias, p, g, g_out, stats, residual,
    grad_z, sums, gap, own,
) -> Any:  # fmt: skip
    """Fill what is not None of ``grad_z`` and ``sums``.

    Args:
        residual: gradient of the output ``[M, C]``, to be added to that of z; or None.
    """
    operands = (
        edges, grad_gate, z, mask, norm_weight, norm_bias, p, g, g_out, stats, residual, grad_z,
        sums,
    )  # fmt: skip
    if own:
        return hopper_launch_backward.launch_grad_z(problem, *operands, gap)
    stride = 0 if residual is None else residual.stride(0)
    launcher = _launcher(
        grad_z_kernel, config_of(GRAD_Z, problem, p).config, problem, None,
        (z.stride(0), stride, problem.pairs, problem.channels, gap),
        precision_of(p.dtype, p.device), z.device,
        *(layout(t) for t in operands),
    )  # fmt: skip
    with on(z.device):
        return launcher(*operands)


@lru_cache(maxsize=4096)
def _launcher(
    kernel: Any, config: Config, problem: Problem, programs: int | None,
    numbers: tuple[float | int, ...], precision: str, device: torch.device, *alike: Layout | None,
) -> Launcher:  # fmt: skip
    """A kernel as it is launched; None for the programs: one for every block of pairs."""
    blocks = _fitted(config, problem)
    constants = {"EVEN": problem.channels == blocks["BLOCK_C"], "PRECISION": precision, **blocks}
    if "EVEN_M" in kernel.arg_names:
        constants["EVEN_M"] = problem.pairs % blocks["BLOCK_M"] == 0
    if programs is None:
        programs = cdiv(problem.pairs, blocks["BLOCK_M"])
    return Launcher(kernel, programs, numbers, constants, config.options)


def sums_of(kernel: str, problem: Problem, weight: torch.Tensor, own: bool) -> int:
    """How many sums a kernel leaves for its norm's parameters.

    Args:
        own: by Hopper's; else one for each program, which has one block of the pairs.
    """
    if own:
        return hopper_launch_backward.sums_of(problem, weight.device)
    config = config_of(kernel, problem, weight).config
    return cdiv(problem.pairs, _fitted(config, problem)["BLOCK_M"])


def splits_of(kernel: str, problem: Problem, weight: torch.Tensor, own: bool) -> int:
    """In how many sums over some of the pairs a kernel leaves the gradients of weights.

    Args:
        own: by Hopper's.
    """
    if own:
        sizes = hopper_launch_weights.IN if kernel == WEIGHTS_IN else hopper_launch_weights.OUT
        return hopper_launch_weights.splits(sizes, problem.pairs, weight.device)
    return _split(kernel, problem, weight)[1]


def _split(kernel: str, problem: Problem, weight: torch.Tensor) -> tuple[int, int]:
    """Programs that one split takes, one for each block of outputs; and the splits."""
    config = config_of(kernel, problem, weight).config
    fitted = _fitted(config, problem)
    outputs = problem.channels * (2 if kernel == WEIGHTS_IN else 1)
    blocks = cdiv(outputs, fitted["BLOCK_O"])
    programs = config.blocks["WAVES"] * multiprocessors(weight.device)
    return blocks, max(1, min(programs // blocks, cdiv(problem.pairs, fitted["BLOCK_M"])))


def _fitted(config: Config, problem: Problem) -> dict[str, int]:
    """The block sizes of a table, no larger than the problem."""
    width = padded(problem.channels)
    pairs = max(SMALLEST_BLOCK, power_of_two(problem.pairs))
    return {
        "BLOCK_M": min(config.blocks["BLOCK_M"], pairs),
        "BLOCK_O": min(config.blocks["BLOCK_O"], width),
        "BLOCK_C": width,
    }
