"""The transition on the host: which plan a call takes, block sizes, launches of the kernels.

Two plans. *Fused*, for 16-bit operands and rows that one program holds: one kernel forward, and
backward two for each chunk of rows and one at the end. *By products*, for all else: products of
the vendor's library, with kernels between them: for training of wide rows all at once, what the
backward pass needs being kept; else for each chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from megafold.ops.hopper import in_words, is_hopper, readable
from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.sizes import cdiv, multiprocessors, power_of_two
from megafold.ops.transition import elementwise, hopper
from megafold.ops.transition.backward import grad_rows_kernel
from megafold.ops.transition.forward import forward_kernel
from megafold.ops.transition.weights import (
    grad_weights_kernel,
    reduce_gradients_kernel,
    split_gradients_kernel,
)
from megafold.ops.tuning import Config, Found, lookup

FORWARD = "transition.forward"
GRAD_ROWS = "transition.grad_rows"
GRAD_WEIGHTS = "transition.grad_weights"
KERNELS = (FORWARD, GRAD_ROWS, GRAD_WEIGHTS)  # those with block sizes in tables

WIDEST_FUSED = 128  # channels of which a program holds rows, beside their weights
SMALLEST_BLOCK = 16  # the least that tensor cores multiply
SCRATCH_BYTES = 2**27  # of hidden activations at a time
SCRATCH_OF_X = 1.25  # of the size of x, where that is more: three waves of an H100 for 589,824 rows
SCRATCH_OF_PRODUCTS = 200 * 10**6  # the same by products: these are faster the more rows they have
CHUNK_STEP = 128  # chunks of rows begin at multiples of this: whole blocks, aligned
AT_A_TIME = 2  # programs of the kernel by rows that registers let a multiprocessor run

# Kernels without products: bandwidth is all they need, whatever the device.
NORM_ELEMENTS = 4096  # of a tile
NORM_ROWS = 16  # at most
NORM_WAVES = 8  # programs of the norm's gradient per multiprocessor, whose sums are added up
ELEMENTS = 1024  # that one program takes, or takes at a time
COPIED = 4096
WIDEST_BLOCK = 512  # of hidden units, of these elements
REDUCED = {"BLOCK_U": 8, "BLOCK_P": 256, "BLOCK_S": 16}  # partial sums of a program
OPTIONS = {"num_warps": 4, "num_stages": 1}


class Problem(NamedTuple):
    """The sizes of one call."""

    rows: int
    channels: int
    hidden: int

    @classmethod
    def of(cls, x: torch.Tensor, weight_gate: torch.Tensor) -> Problem:
        hidden, channels = weight_gate.shape
        return cls(x.numel() // channels, channels, hidden)


def fused(channels: int, dtype: torch.dtype) -> bool:
    """Whether the fused kernels take a call."""
    return channels <= WIDEST_FUSED and dtype.itemsize == 2


def keeps(channels: int) -> bool:
    """Whether a call that has gradients keeps what is hidden: the normalised rows, gate, value."""
    return channels > WIDEST_FUSED


def why_not_fused(channels: int, dtype: torch.dtype) -> str:
    """What the fused kernels cannot take, in words."""
    if dtype.itemsize != 2:
        return f"the fused kernels take 16-bit operands, not {str(dtype).removeprefix('torch.')}"
    return f"C {channels} is wider than the {WIDEST_FUSED} that the fused kernels hold"


@lru_cache(maxsize=256)
def padded_width(width: int) -> int:
    """The width a kernel computes with: the next power of two, 16 at least."""
    return max(SMALLEST_BLOCK, power_of_two(width))


def config_of(kernel: str, problem: Problem, device: torch.device, dtype: torch.dtype) -> Found:
    """The block sizes a kernel runs with for a problem, and where they are from."""
    sizes = (
        ("C", padded_width(problem.channels)),
        ("M", problem.rows),
        ("H", problem.hidden),
    )
    return lookup(kernel, device, 8 * dtype.itemsize, sizes)


def explained(
    x: torch.Tensor, weight_gate: torch.Tensor, *, kept: bool = True, what: str = "normalised rows"
) -> tuple[str, ...]:
    """The plan of a call and the block sizes of its kernels, in words.

    Args:
        kept: whether a call with gradients keeps what :func:`keeps` allows.
        what: that it keeps beside gate and value.
    """
    problem = Problem.of(x, weight_gate)
    if not fused(problem.channels, weight_gate.dtype):
        why = why_not_fused(problem.channels, weight_gate.dtype)
        how = f"products by torch.mm in chunks of rows, kernels between them ({why})"
        if kept and keeps(problem.channels):
            how += f"; with gradients all rows at once, {what}, gate and value are kept"
        return (how,)
    lines = []
    for kernel in KERNELS:
        found = config_of(kernel, problem, x.device, weight_gate.dtype)
        lines.append(f"{kernel}: {found.config} ({found.source})")
    if is_hopper(x.device):
        for name, *kernels in (("forward", FORWARD), ("backward", GRAD_ROWS, GRAD_WEIGHTS)):
            not_there = hopper.why_not(problem, x, weight_gate.dtype, *kernels)
            lines.append(f"transition.hopper: {name} {in_words(not_there)}")
    return tuple(lines)


def where_added(x: torch.Tensor, weight_gate: torch.Tensor) -> str:
    """What adds x to the update, and its two gradients, in words."""
    if fused(x.shape[-1], weight_gate.dtype):
        return "residual: added in the kernels of the output and of the gradient of x"
    alike = x.dtype == weight_gate.dtype
    how = "by torch.addmm" if alike else "in a pass of its own, for x has another dtype"
    return f"residual: x added {how}, its gradients in the kernel of the norm's"


def chunks(rows: int, bytes_per_row: int, spare: int, wave: int = 1) -> Iterator[slice]:
    """Rows in chunks of about one size, whose scratch memory is within bounds.

    Args:
        bytes_per_row: of scratch memory.
        spare: bytes that scratch memory may take where that is more than SCRATCH_BYTES.
        wave: rows that a GPU takes at a time; chunks are multiples of it where one is within
            the bounds, so that no multiprocessor is idle while a chunk ends.
    """
    most = max(SCRATCH_BYTES, spare) // max(bytes_per_row, 1)
    unit = CHUNK_STEP if most < wave else CHUNK_STEP * cdiv(wave, CHUNK_STEP)
    most = max(1, most // unit) * unit
    step = unit * cdiv(cdiv(rows, cdiv(rows, most)), unit)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def launch_forward(x, norm_weight, norm_bias, gate, value, out, y, stats, eps, residual) -> Any:
    """Fill ``y`` ``[M, C]``, and ``stats`` ``[2, M]`` where there is a norm (``eps``).

    Args:
        residual: whether x is added to the update.
    """
    problem = Problem.of(x, gate)
    if not hopper.why_not(problem, x, gate.dtype, FORWARD) and readable(x, gate, value, out):
        operands = x, norm_weight, norm_bias, gate, value, out
        return hopper.launch_forward(*operands, y, stats, eps, residual)
    launcher = _forward(
        forward_kernel, config_of(FORWARD, problem, x.device, gate.dtype).config, problem, eps,
        residual, x.device,
        layout(x), layout(norm_weight), layout(norm_bias),
        layout(gate), layout(value), layout(out),
    )  # fmt: skip
    with on(x.device):
        added = x if residual else None
        return launcher(x, norm_weight, norm_bias, gate, value, out, added, y, stats)


class RowsPlan(NamedTuple):
    """How the kernel by rows takes the rows of a call; the same in all of its chunks."""

    config: Config
    block: int  # rows of a program
    wave: int  # rows that the GPU takes at a time

    @classmethod
    def of(cls, problem: Problem, device: torch.device, dtype: torch.dtype) -> RowsPlan:
        """The plan for all rows of a call."""
        config = config_of(GRAD_ROWS, problem, device, dtype).config
        block = _fitted(config, problem)["BLOCK_M"]
        return cls(config, block, AT_A_TIME * multiprocessors(device) * block)

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """What the programs leave for the norm's weight and bias: ``[programs, 2, C]``."""
        rows, channels = x.shape
        return x.new_empty((cdiv(rows, self.block), 2, channels), dtype=torch.float32)


class WeightsPlan(NamedTuple):
    """How the gradients of the weights are shared out among programs."""

    config: Config
    splits: int  # of the rows of a chunk

    @classmethod
    def of(
        cls, problem: Problem, longest: int, device: torch.device, dtype: torch.dtype
    ) -> WeightsPlan:
        """The plan for a call; its longest chunk has ``longest`` rows."""
        config = config_of(GRAD_WEIGHTS, problem, device, dtype).config
        blocks = _fitted(config, problem)
        tiles = _tiles(problem.hidden, blocks["BLOCK_U"])
        programs = blocks["WAVES"] * multiprocessors(device)
        return cls(config, max(1, min(programs // tiles, cdiv(longest, blocks["BLOCK_K"]))))

    def partial(self, gate: torch.Tensor) -> torch.Tensor:
        """Where the splits add up their shares: fp32 ``[splits, 3 H, C]``."""
        hidden, channels = gate.shape
        return gate.new_empty((self.splits, 3 * hidden, channels), dtype=torch.float32)


def launch_grad_rows(
    plan: RowsPlan, x, norm_weight, norm_bias, gate, value, out, stats, grad, added,
    grad_x, sums, normalised, hidden, first: int,
) -> Any:  # fmt: skip
    """Fill ``grad_x``, ``sums``, ``normalised`` and ``hidden`` where they are not None.

    Args:
        added: to ``grad_x``, contiguous; or None.
        sums: of all rows of the call.
        first: which of them is the first here.
    """
    sums = None if sums is None else sums[first // plan.block :]
    launcher = _grad_rows(
        grad_rows_kernel, plan.config, Problem.of(x, gate), x.device,
        layout(stats), layout(sums), hidden is not None,
        layout(x), layout(norm_weight), layout(norm_bias),
        layout(gate), layout(value), layout(out), layout(grad), layout(added), layout(grad_x),
    )  # fmt: skip
    with on(x.device):
        return launcher(
            x, norm_weight, norm_bias, gate, value, out, stats, grad, added,
            grad_x, sums, normalised, hidden,
        )  # fmt: skip


def launch_grad_weights(plan: WeightsPlan, hidden, normalised, grad, partial, first: bool) -> Any:
    """Fill ``partial``, or add to it where this is not the ``first`` chunk of rows."""
    rows, width = hidden.shape
    problem = Problem(rows, normalised.shape[1], width // 3)
    launcher = _grad_weights(
        grad_weights_kernel, plan, problem, hidden.device, first,
        layout(hidden), layout(normalised), layout(grad),
    )  # fmt: skip
    with on(hidden.device):
        return launcher(hidden, normalised, grad, partial)


def launch_reduce(problem: Problem, partial, sums, gate, value, out, norm_weight, norm_bias) -> Any:
    """Fill the gradients that are not None from what the other two kernels left."""
    found = (gate, value, out, norm_weight, norm_bias)
    device = next(tensor.device for tensor in (partial, sums) if tensor is not None)
    launcher = _reduce(
        reduce_gradients_kernel, problem, device,
        0 if partial is None else partial.shape[0], 0 if sums is None else sums.shape[0],
        *(None if tensor is None else tensor.dtype for tensor in found),
    )  # fmt: skip
    with on(device):
        return launcher(partial, sums, *found)


def launch_split(both, sums, gate, value, norm_weight, norm_bias) -> Any:
    """Fill the gradients that are not None from ``both`` ``[2 H, C]`` and the norm's sums.

    ``sums`` are fp32 ``[programs, 2, C]``, or ``[programs, 1, C]`` for one vector alone, the first.
    """
    found = (gate, value, norm_weight, norm_bias)
    given = both if sums is None else sums
    channels, device = given.shape[-1], given.device
    launcher = _split(
        split_gradients_kernel, 0 if both is None else both.numel() // 2,
        *((0, 0) if sums is None else sums.shape[:2]), channels, device,
        *(None if tensor is None else tensor.dtype for tensor in (both, *found)),
    )  # fmt: skip
    with on(device):
        return launcher(both, sums, *found)


def launch_norm_forward(x, weight, bias, normalised, stats, eps) -> Any:
    """Fill ``normalised`` ``[M, C]``, and the statistics ``[2, M]`` where they are not None."""
    launcher = _norm_forward(
        elementwise.norm_forward_kernel, *x.shape, eps, x.device, layout(stats),
        layout(x), layout(weight), layout(bias), normalised.dtype,
    )  # fmt: skip
    with on(x.device):
        return launcher(x, weight, bias, normalised, stats)


def launch_norm_backward(
    grad, x, weight, stats, added, grad_x, want_sums
) -> tuple[Any, torch.Tensor | None]:
    """Fill ``grad_x`` where it is not None; ``added`` is added to it where that is not None.

    Returns what Triton compiled, and sums ``[programs, 2, C]`` for the norm's weight and bias
    where they are wanted.
    """
    launcher = _norm_backward(
        elementwise.norm_backward_kernel, *x.shape, want_sums, x.device, grad.dtype,
        layout(stats), layout(x), layout(weight), layout(added), layout(grad_x),
    )  # fmt: skip
    sums = None
    if want_sums:
        sums = x.new_empty((launcher.grid[0], 2, x.shape[1]), dtype=torch.float32)
    with on(x.device):
        return launcher(grad, x, weight, stats, added, grad_x, sums), sums


def launch_gate_rows_backward(grad, x, gate, grad_x, grad_gate) -> tuple[Any, torch.Tensor]:
    """Fill ``grad_x`` and ``grad_gate``, ``[M, C]`` as all are.

    Returns what Triton compiled, and sums ``[programs, 1, C]`` of the gate's gradient.
    """
    launcher = _gate_rows_backward(
        elementwise.gate_rows_backward_kernel, *x.shape, x.device, grad_gate.dtype,
        layout(grad), layout(x), layout(gate), layout(grad_x),
    )  # fmt: skip
    sums = x.new_empty((launcher.grid[0], 1, x.shape[1]), dtype=torch.float32)
    with on(x.device):
        return launcher(grad, x, gate, grad_x, grad_gate, sums), sums


def launch_swiglu(kernel: Any, pairs: torch.Tensor, *others: torch.Tensor) -> Any:
    """Run one of the kernels of SwiGLU on gate and value, ``[M, 2 H]``, and what else it takes.

    First of the others is the activation or its gradient, ``[M, H]``, rows any distance apart.
    """
    rows, width = pairs.shape
    launcher = _swiglu(
        kernel, rows, width // 2, pairs.device, layout(pairs), *(layout(t) for t in others)
    )
    with on(pairs.device):
        return launcher(pairs, *others)


@lru_cache(maxsize=4096)
def _forward(
    kernel: Any, config: Config, problem: Problem, eps: float | None, residual: bool,
    device: torch.device, x: Layout, norm_weight: Layout | None, norm_bias: Layout | None,
    *weights: Layout,
) -> Launcher:  # fmt: skip
    constants = _constants(config, problem, eps is not None, norm_weight, norm_bias)
    programs = cdiv(problem.rows, constants["BLOCK_M"])
    numbers = (x[0][0], x[0][0] if residual else 0, *problem, 0.0 if eps is None else eps)
    return Launcher(kernel, programs, numbers, constants, config.options)


@lru_cache(maxsize=4096)
def _grad_rows(
    kernel: Any, config: Config, problem: Problem, device: torch.device,
    stats: Layout | None, sums: Layout | None, hidden: bool,
    x: Layout, norm_weight: Layout | None, norm_bias: Layout | None,
    gate: Layout, value: Layout, out: Layout, grad: Layout, added: Layout | None,
    grad_x: Layout | None,
) -> Launcher:  # fmt: skip
    constants = _constants(config, problem, stats is not None, norm_weight, norm_bias)
    stored = {
        "STORE_X": grad_x is not None,
        "STORE_SUMS": sums is not None,
        "STORE_HIDDEN": hidden,
    }
    programs = cdiv(problem.rows, constants["BLOCK_M"])
    numbers = (x[0][0], grad[0][0], stats[0][0] if stats else 0, *problem)
    return Launcher(kernel, programs, numbers, {**constants, **stored}, config.options)


@lru_cache(maxsize=4096)
def _grad_weights(
    kernel: Any, plan: WeightsPlan, problem: Problem, device: torch.device, first: bool,
    hidden: Layout, normalised: Layout, grad: Layout,
) -> Launcher:  # fmt: skip
    blocks = _fitted(plan.config, problem)
    del blocks["WAVES"]
    block_c = padded_width(problem.channels)
    constants = {
        "FIRST": first,
        "EVEN_M": problem.rows % blocks["BLOCK_K"] == 0,
        "EVEN_U": problem.hidden % blocks["BLOCK_U"] == 0,
        "EVEN_C": problem.channels == block_c,
        "BLOCK_C": block_c,
        **blocks,
    }
    per_split = blocks["BLOCK_K"] * cdiv(problem.rows, blocks["BLOCK_K"] * plan.splits)
    numbers = (normalised[0][0], grad[0][0], *problem, per_split)
    programs = plan.splits * _tiles(problem.hidden, blocks["BLOCK_U"])
    return Launcher(kernel, programs, numbers, constants, plan.config.options)


@lru_cache(maxsize=4096)
def _reduce(
    kernel: Any, problem: Problem, device: torch.device, splits: int, programs: int,
    *dtypes: torch.dtype | None,
) -> Launcher:  # fmt: skip
    constants = {**REDUCED, "BLOCK_C": padded_width(problem.channels)}
    of_weights = cdiv(3 * problem.hidden, constants["BLOCK_U"]) if splits else 0
    of_sums = cdiv(2 * problem.channels, constants["BLOCK_S"]) if programs else 0
    numbers = (splits, programs, problem.channels, problem.hidden)
    return Launcher(kernel, of_weights + of_sums, numbers, constants, OPTIONS)


@lru_cache(maxsize=4096)
def _split(
    kernel: Any, half: int, programs: int, vectors: int, channels: int, device: torch.device,
    *dtypes: torch.dtype | None,
) -> Launcher:  # fmt: skip
    constants = {"BLOCK": COPIED, "BLOCK_P": REDUCED["BLOCK_P"], "BLOCK_S": REDUCED["BLOCK_S"]}
    of_sums = cdiv(vectors * channels, constants["BLOCK_S"])
    numbers = (half, programs, channels, vectors * channels)
    return Launcher(kernel, cdiv(half, COPIED) + of_sums, numbers, constants, OPTIONS)


@lru_cache(maxsize=4096)
def _norm_forward(
    kernel: Any, rows: int, channels: int, eps: float, device: torch.device, stats: Layout | None,
    x: Layout, weight: Layout | None, bias: Layout | None, dtype: torch.dtype,
) -> Launcher:  # fmt: skip
    blocks = _norm_blocks(channels, NORM_ELEMENTS)
    constants = {
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "STORE_STATS": stats is not None,
        "EVEN_M": rows % blocks["BLOCK_M"] == 0,
        "EVEN_C": channels == blocks["BLOCK_C"],
        **blocks,
    }
    programs = cdiv(rows, blocks["BLOCK_M"])
    numbers = (x[0][0], stats[0][0] if stats else 0, rows, channels, eps)
    return Launcher(kernel, programs, numbers, constants, OPTIONS)


@lru_cache(maxsize=4096)
def _norm_backward(
    kernel: Any, rows: int, channels: int, sums: bool, device: torch.device, dtype: torch.dtype,
    stats: Layout, x: Layout, weight: Layout | None, added: Layout | None,
    grad_x: Layout | None,
) -> Launcher:  # fmt: skip
    programs, per_program, sizes = _summing(rows, channels, device)
    constants = {
        "HAS_WEIGHT": weight is not None,
        "STORE_X": grad_x is not None,
        "STORE_SUMS": sums,
        **sizes,
    }
    numbers = (x[0][0], added[0][0] if added else 0, stats[0][0], rows, channels, per_program)
    return Launcher(kernel, programs, numbers, constants, OPTIONS)


@lru_cache(maxsize=4096)
def _gate_rows_backward(
    kernel: Any, rows: int, channels: int, device: torch.device, dtype: torch.dtype, grad: Layout,
    *tensors: Layout,
) -> Launcher:  # fmt: skip
    programs, per_program, sizes = _summing(rows, channels, device)
    numbers = (grad[0][0], rows, channels, per_program)
    return Launcher(kernel, programs, numbers, sizes, OPTIONS)


def _summing(rows: int, channels: int, device: torch.device) -> tuple[int, int, dict[str, Any]]:
    """Programs that add up rows, the blocks of each, and the constants of these blocks.

    A block is one row, or as many as a tile of ELEMENTS has, so that sums stay in registers.
    """
    sizes = _norm_blocks(channels, ELEMENTS)
    blocks = cdiv(rows, sizes["BLOCK_M"])
    per_program = cdiv(blocks, min(blocks, NORM_WAVES * multiprocessors(device)))
    even = {
        "EVEN_M": rows % (sizes["BLOCK_M"] * per_program) == 0,
        "EVEN_C": channels == sizes["BLOCK_C"],
    }
    return cdiv(blocks, per_program), per_program, {**even, **sizes}


@lru_cache(maxsize=4096)
def _swiglu(
    kernel: Any, rows: int, hidden: int, device: torch.device, *tensors: Layout
) -> Launcher:
    block_h = min(WIDEST_BLOCK, power_of_two(hidden))
    block_m = ELEMENTS // block_h
    constants = {
        "EVEN_M": rows % block_m == 0,
        "EVEN_H": hidden % block_h == 0,
        "BLOCK_M": block_m,
        "BLOCK_H": block_h,
    }
    programs = cdiv(rows, block_m) * cdiv(hidden, block_h)
    numbers = (tensors[1][0][0], rows, hidden)
    return Launcher(kernel, programs, numbers, constants, OPTIONS)


@lru_cache(maxsize=256)
def _norm_blocks(channels: int, elements: int) -> dict[str, int]:
    block_c = power_of_two(channels)
    return {"BLOCK_M": min(NORM_ROWS, max(1, elements // block_c)), "BLOCK_C": block_c}


def _tiles(hidden: int, block: int) -> int:
    """Blocks of hidden columns: those of gate's and value's gradients, and of the activation."""
    return cdiv(2 * hidden, block) + cdiv(hidden, block)


def _fitted(config: Config, problem: Problem) -> dict[str, int]:
    """The block sizes of a table, no larger than the problem."""
    rows, units = padded_width(problem.rows), padded_width(problem.hidden)
    most = {"BLOCK_M": rows, "BLOCK_K": rows, "BLOCK_H": units, "BLOCK_U": units}
    return {name: min(size, most.get(name, size)) for name, size in config.blocks.items()}


def _constants(
    config: Config, problem: Problem, norm: bool, weight: Layout | None, bias: Layout | None
) -> dict[str, Any]:
    blocks = _fitted(config, problem)
    block_c = padded_width(problem.channels)
    return {
        "NORM": norm,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "EVEN_M": problem.rows % blocks["BLOCK_M"] == 0,
        "EVEN_H": problem.hidden % blocks["BLOCK_H"] == 0,
        "EVEN_C": problem.channels == block_c,
        "BLOCK_C": block_c,
        **blocks,
    }
