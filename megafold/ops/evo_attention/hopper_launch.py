"""Launches of EvoAttention's kernels for Hopper GPUs: tensors as TMA reads them, and all numbers.

When they run, and how they go about a problem, says :mod:`~megafold.ops.evo_attention.hopper`.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from megafold.ops.evo_attention.folding import (
    COLUMNS,
    OF_PROGRAMS,
    PARTS,
    add_ranges_kernel,
    fold_kernel,
)
from megafold.ops.evo_attention.hopper import (
    SIZES,
    TILE,
    at_once,
    in_lines,
    plan_of,
    programs_of,
    width_of,
)
from megafold.ops.evo_attention.tiles import step_of
from megafold.ops.hopper import Box, box, cache_of, described
from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.sizes import cdiv, multiprocessors

FOLD = 64  # queries or keys of a program
TURN = 32  # queries and keys of a tile of the bias
ADD_BLOCK = 512
START_OF_BIAS = 3  # and end of a program, in rows that it could have added
ADDED = 3e6  # bytes of groups that are added in the time of a row
SPLIT = 1.05  # what two parts take of the time that is counted, of one that is as long
IN_LAUNCH = 1.3  # of L2: what the rows of a launch may be; at 1.6 it takes 1.6 times as long


def forward(problem: Any, q, k, v, mask, bias, out, stats, scale: float) -> None:
    """Fill ``out`` and ``stats``; arguments as those of the launches of ``forward``."""
    boxes = _boxes(width_of(problem), q.dtype, TILE)
    operands = (described(t, boxes.operand) for t in (q, k, v))
    launcher = _of_forward(problem, q.dtype, q.device, scale, layout(mask))
    with on(q.device):
        launcher(*operands, described(bias, boxes.bias), described(out, boxes.operand), mask, stats)


def backward(
    problem: Any, q, k, v, mask, bias, out, stats, grad, delta, grad_q, grad_k, grad_v,
    grad_bias, scale: float,
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:  # fmt: skip
    """Fill delta and the gradients; that of a bias which rows share in part as sums.

    Returns:
        Flags, int8, of which the first is 1 where a shift exceeds PEAK: then nothing but delta was
        filled. And pairs of sums, fp32 ``[groups, *of_part]``, and the part of the gradient of a
        shared bias that is their sum; the rest of it is there.
    """
    device, rows, width = q.device, problem.total_rows, width_of(problem)
    plan = plan_of(problem, device)
    beyond = torch.empty(OF_PROGRAMS + _of_queries(problem), dtype=torch.int8, device=device)
    queries = torch.empty(
        (rows * problem.heads, cdiv(problem.queries, 4), 4 * COLUMNS), dtype=q.dtype, device=device
    )
    keys = torch.empty(
        (1 if mask is None else rows, cdiv(problem.keys, 4), 4 * COLUMNS),
        dtype=q.dtype,
        device=device,
    )
    kept = (plan.programs if plan.ranges == 1 else plan.items) * problem.width
    acc = torch.empty(
        (cdiv(problem.queries, TILE) * TILE, kept), dtype=torch.float32, device=device
    )
    given = turned = None
    if not plan.alone:
        given, turned = bias, torch.empty(bias.mT.shape, dtype=torch.float32, device=device)
    read = bias if turned is None else turned
    with on(device):
        _fold(problem, q.dtype, device, scale, layout(grad), layout(mask), layout(given))(
            out, grad, stats, queries, delta, beyond, mask, keys, given, turned
        )
        boxes = _boxes(width, q.dtype, TILE)
        d_q, d_k, d_v, d_grad = (described(t, boxes.operand) for t in (q, k, v, grad))
        d_grad_k, d_grad_v = (described(t, boxes.operand) for t in (grad_k, grad_v))
        d_queries, d_keys = (described(t, boxes.beside) for t in (queries, keys))
        of_q = _row_strides(grad_q)
        d_bias = described(read, boxes.bias)
        d_grad_bias = described(grad_bias, boxes.bias) if plan.alone else d_bias
        _of_all(problem, q.dtype, device, scale, mask is not None, of_q)(
            d_q, d_k, d_v, d_grad, d_queries, d_keys, d_bias, d_grad_k, d_grad_v, d_grad_bias,
            beyond, grad_q, acc,
        )  # fmt: skip
        if plan.ranges > 1:
            _add_ranges(problem, q.dtype, device, scale, of_q)(acc, grad_q)
        if plan.alone or grad_bias is None:
            return beyond, []
        del acc, read, turned
        boxes = _boxes(width, q.dtype, SIZES[width].bias.each)
        d_k, d_v = (described(t, boxes.operand) for t in (k, v))
        operands = (d_q, d_grad, d_queries, d_k, d_v, described(keys, boxes.beside), bias, beyond)
        adds = []
        for part in _parts(problem, device):
            of_part = grad_bias[:, part.first_head : part.first_head + part.heads]
            sums = of_part[None]
            if part.groups > 1 or grad_bias.dtype != torch.float32:
                sums = torch.empty(
                    (part.groups, *of_part.shape), dtype=torch.float32, device=device
                )
                adds.append((sums, of_part))
            at_a_time = _rows_at_once(problem, part.rows, device)
            for start in range(0, part.rows, at_a_time):
                _of_bias(
                    problem, q.dtype, device, scale, part, start, at_a_time, mask is not None,
                    layout(bias),
                )(*operands, sums)  # fmt: skip
    return beyond, adds


def _row_strides(t: torch.Tensor) -> tuple[int, int, int]:
    """The strides of ``[B S, N, H, D]``, but for the last, of a tensor ``[B, S, N, H, D]``."""
    return (t.stride(1) if t.shape[1] > 1 else t.stride(0), t.stride(2), t.stride(3))


def _shares(problem: Any) -> tuple[int, int]:
    """Programs of one head of the bias's gradient, and tiles of 64 queries that they count.

    Three tiles on end may be of two blocks of keys, and no more: so two are counted at least. Two
    tiles are of one block: so an even number is counted.
    """
    sizes = SIZES[width_of(problem)].bias
    across, blocks = cdiv(problem.queries, TILE), cdiv(problem.keys, sizes.each)
    across = max(2, across) if sizes.each == TILE else cdiv(across, sizes.groups) * sizes.groups
    return cdiv(across * blocks, sizes.groups), across


class Part(NamedTuple):
    """Some of a bias's heads, and how their gradient comes about."""

    first_head: int
    heads: int
    groups: int  # of rows, each of which leaves a sum
    rows: int  # of a group


@lru_cache(maxsize=1024)
def _parts(problem: Any, device: torch.device) -> tuple[Part, ...]:
    """What leaves the least to the busiest multiprocessor, which runs one program at a time.

    Programs of the first part take all rows; the rest are split in groups of rows, and a kernel
    adds what those leave. It takes no more than half the memory of q in all, or twice the bias's.
    """
    shares, most = _shares(problem)[0] * problem.biases, multiprocessors(device)
    of_head = 4 * problem.biases * problem.queries * problem.keys
    of_q = problem.total_rows * problem.queries * problem.heads * 2 * problem.width
    allowed = max(2 * problem.heads * of_head, of_q // 2)

    def time(part: Part) -> float:
        added = part.groups * part.heads * of_head / ADDED if part.groups > 1 else 0
        return cdiv(shares * part.heads * part.groups, most) * (part.rows + START_OF_BIAS) + added

    def split(first: int) -> Part:
        heads = problem.heads - first
        groups = min(problem.rows_per_bias, max(1, allowed // (heads * of_head)))
        rows = {cdiv(problem.rows_per_bias, n) for n in range(1, groups + 1)}
        parts = (Part(first, heads, cdiv(problem.rows_per_bias, n), n) for n in sorted(rows))
        return min(parts, key=time)

    # As many heads as fill all multiprocessors once, twice and so on; or none.
    turns = (cdiv(shares * problem.heads, most) if problem.biases == 1 else 1) - 1
    firsts = {turn * most // shares for turn in range(turns + 1)}
    parts = [
        (*((Part(0, n, 1, problem.rows_per_bias),) if n else ()), split(n)) for n in sorted(firsts)
    ]
    return min(parts, key=lambda both: sum(map(time, both)) * (SPLIT if len(both) > 1 else 1.0))


def _rows_at_once(problem: Any, per_group: int, device: torch.device) -> int:
    """How many rows of a group one launch adds: what programs, which drift apart, find in L2."""
    of_row = in_lines(problem) * (problem.queries + problem.keys) * (4 * width_of(problem) + 32)
    launches = cdiv(per_group * of_row, int(IN_LAUNCH * cache_of(device)))
    return cdiv(per_group, launches)


class _Boxes(NamedTuple):
    operand: Box  # of q, k, v: queries or keys of one head of one row
    beside: Box  # the columns beside them, four rows in a line
    bias: Box


@cache
def _boxes(width: int, dtype: torch.dtype, tile: int) -> _Boxes:
    from triton.experimental.gluon import language as gl

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return _Boxes(
        box((1, tile, 1, width), element),
        box((1, tile // 4, 4 * COLUMNS), element),
        box((1, TILE, TILE), gl.float32),
    )


def _tile(rows: int, columns: int, bits: int) -> Any:
    """A tile as TMA leaves it in shared memory, its rows in the order that threads hold keys in.

    Of every eight rows, 0, 2, 4, 6, 1, 3, 5, 7 come to be the first, second and so on. Sixteen
    bytes are swizzled by their row as in ``NVMMASharedLayout``.
    """
    from triton.experimental.gluon import language as gl

    columns_in_block = min(columns, 1024 // bits)  # of 128 bytes
    chunk = 128 // bits
    bases = [[0, 1 << i] for i in range(columns_in_block.bit_length() - 1)]
    rows_in_128 = 1024 // bits // columns_in_block
    phases = columns_in_block // chunk
    for i in range(rows.bit_length() - 1):
        row = {1: 4, 2: 1, 4: 2}.get(1 << i, 1 << i)
        phase = (1 << i) // rows_in_128 % phases
        bases.append([row, phase * chunk])
    wide = range(columns_in_block.bit_length() - 1, columns.bit_length() - 1)
    return gl.SharedLinearLayout([*bases, *([0, 1 << i] for i in wide)])


def _used(problem: Any) -> int:
    """Channels of a padded head that products are over: 48 where that is enough."""
    return 48 if 32 < problem.width <= 48 else width_of(problem)


def _of_queries(problem: Any) -> int:
    """Programs that fold queries."""
    return problem.total_rows * problem.heads * cdiv(problem.queries, FOLD)


@lru_cache(maxsize=1024)
def _fold(
    problem: Any, dtype: torch.dtype, device: torch.device, scale: float, grad: Layout,
    mask: Layout | None, bias: Layout | None,
) -> Launcher:  # fmt: skip
    of_queries, block_d = _of_queries(problem), width_of(problem)
    of_keys = (1 if mask is None else problem.total_rows) * cdiv(problem.keys, FOLD)
    tiles = 0
    if bias is not None:
        tiles = problem.biases * problem.heads
        tiles *= cdiv(problem.queries, TURN) * cdiv(problem.keys, TURN)
    numbers = (
        *grad[0],
        *((0, 0, 0) if mask is None else mask[0]),
        *((0, 0, 0, 0) if bias is None else bias[0]),
        scale,
        problem.rows,
        problem.total_rows * problem.heads * problem.queries,
        problem.queries,
        problem.keys,
        problem.heads,
        problem.width,
        of_queries,
        of_keys,
    )
    parts = PARTS[dtype]
    constants = {
        "STEP": step_of(problem.width, grad),
        "UNIT": tuple(parts[:3]),
        "LARGE": parts.large,
        "HAS_MASK": mask is not None,
        "EVEN_Q": problem.queries % FOLD == 0,
        "EVEN_D": problem.width == block_d,
        "BLOCK": FOLD,
        "BLOCK_D": block_d,
        "TILE": TURN,
    }
    return Launcher(fold_kernel, of_queries + of_keys + tiles, numbers, constants, {"num_warps": 2})


@lru_cache(maxsize=1024)
def _of_forward(
    problem: Any, dtype: torch.dtype, device: torch.device, scale: float, mask: Layout | None
) -> Launcher:
    from triton.experimental.gluon import language as gl

    from megafold.ops.evo_attention.hopper_forward import hopper_forward_kernel

    width = width_of(problem)
    sizes = SIZES[width].forward if problem.rows_per_bias > 1 else SIZES[width].forward_alone
    groups = cdiv(problem.rows_per_bias, sizes.rows)
    blocks_q = cdiv(problem.queries, TILE)
    items = blocks_q * problem.heads * groups * problem.biases
    programs = programs_of(items, sizes.programs, device)
    fewer = sizes.rows == 1 and programs <= (sizes.programs - 1) * multiprocessors(device)
    constants = {
        "HAS_MASK": mask is not None,
        "ROWS": sizes.rows,
        "STAGES": sizes.stages + fewer,  # in the memory of a program that does not run
        "REGISTERS": sizes.registers,
        "WIDTH": width,
        "TILE": TILE,
        "KEYS": gl.NVMMASharedLayout(2 * width, 16, rank=2),
        "MIXED_QUERIES": _tile(TILE, width, 16),
        "MIXED_BIAS": _tile(TILE, TILE, 32),
    }
    numbers = (
        *((0, 0, 0) if mask is None else mask[0]),
        items,
        blocks_q,
        problem.heads,
        groups,
        problem.rows_per_bias,
        problem.rows,
        problem.total_rows * problem.heads * problem.queries,
        problem.queries,
        problem.keys,
        scale,
    )
    options = {"num_warps": 4, **({"maxnreg": sizes.maxnreg} if sizes.maxnreg else {})}
    return Launcher(hopper_forward_kernel, programs, numbers, constants, options)


@lru_cache(maxsize=1024)
def _of_all(
    problem: Any, dtype: torch.dtype, device: torch.device, scale: float, masked: bool,
    of_q: tuple[int, int, int],
) -> Launcher:  # fmt: skip
    from triton.experimental.gluon import language as gl

    from megafold.ops.evo_attention.hopper_backward import hopper_backward_kernel

    width, plan = width_of(problem), plan_of(problem, device)
    blocks = plan.blocks
    operand, columns, logits = (gl.NVMMASharedLayout(2 * w, 16, rank=2) for w in (width, 16, TILE))
    mixed = (_tile(TILE, width, 16), _tile(TILE, COLUMNS, 16), _tile(TILE, TILE, 32))
    mixed = (*mixed, _tile(TILE, TILE, 16))
    if plan.alone:  # the bias lies along keys, which need no other order then
        mixed = (operand, columns, gl.NVMMASharedLayout(128, 32, rank=2), logits)
    constants = {
        "ALONE": plan.alone,
        "TOGETHER": at_once(problem, device) == problem.heads,
        "SPLIT": plan.ranges > 1,
        "AGAIN": plan.walks_each > 1,
        "PARTIAL": cdiv(problem.keys, TILE) % (blocks.groups * blocks.each) > 0,
        "GROUPS": blocks.groups,
        "EACH": blocks.each,
        "STAGES": blocks.stages,
        "SLICES": blocks.slices,
        "REGISTERS": blocks.registers,
        "WIDTH": width,
        "USED": _used(problem),
        "SLICE": TILE // blocks.slices,
        "TILE": TILE,
        "UNIT": tuple(PARTS[dtype][:3]),
        "KEYS": operand,
        "MIXED_KEYS": mixed[0],
        "MIXED_COLUMNS": mixed[1],
        "MIXED_BIAS": mixed[2],
        "TILED": logits,
        "MIXED_LOGITS": mixed[3],
    }
    numbers = (
        plan.items,
        problem.total_rows,
        problem.heads,
        at_once(problem, device),
        problem.width,
        *of_q,
        problem.rows_per_bias,
        problem.queries,
        problem.keys,
        int(masked),
        cdiv(problem.queries, TILE),
        plan.walks,
        plan.walks_each,
        _of_queries(problem),
        scale,
    )
    return Launcher(hopper_backward_kernel, plan.programs, numbers, constants, {"num_warps": 4})


@lru_cache(maxsize=1024)
def _add_ranges(
    problem: Any, dtype: torch.dtype, device: torch.device, scale: float, of_q: tuple[int, int, int]
) -> Launcher:
    rows, padded = problem.total_rows * problem.heads, cdiv(problem.queries, TILE) * TILE
    ranges, stride = plan_of(problem, device).ranges, rows * padded * problem.width
    numbers = (scale, ranges, stride, *of_q, problem.heads, problem.queries, padded, problem.width)
    programs = rows * cdiv(padded * problem.width, ADD_BLOCK)
    return Launcher(add_ranges_kernel, programs, numbers, {"BLOCK": ADD_BLOCK}, {"num_warps": 4})


@lru_cache(maxsize=1024)
def _of_bias(
    problem: Any, dtype: torch.dtype, device: torch.device, scale: float, part: Part, start: int,
    at_a_time: int, masked: bool, bias: Layout,
) -> Launcher:  # fmt: skip
    from megafold.ops.evo_attention.hopper_bias import hopper_bias_kernel

    width = width_of(problem)
    sizes = SIZES[width].bias
    constants = {
        "AGAIN": start > 0,
        "GROUPS": sizes.groups,
        "BLOCKS": 2 if sizes.each == TILE else 1,
        "EACH": sizes.each,
        "WAITS": sizes.each > TILE,
        "REGISTERS": sizes.registers,
        "STAGES": sizes.stages,
        "WIDTH": width,
        "USED": _used(problem),
        "TILE": TILE,
        "UNIT": tuple(PARTS[dtype][:3]),
    }
    shares, across = _shares(problem)
    programs = shares * part.heads * problem.biases * part.groups
    numbers = (
        *bias[0],
        problem.heads,
        part.first_head,
        part.heads,
        problem.biases,
        problem.rows_per_bias,
        part.rows,
        start,
        at_a_time,
        shares,
        across,
        problem.queries,
        problem.keys,
        int(masked),
        scale,
    )
    options = {"num_warps": 4, "maxnreg": sizes.maxnreg}
    return Launcher(hopper_bias_kernel, programs, numbers, constants, options)
