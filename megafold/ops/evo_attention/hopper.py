"""EvoAttention on Hopper GPUs: when kernels of its own run, and their launches.

They are written in Gluon, Triton's language of layouts and warps with roles, which compiles for
this chip alone. What they do not take, those of ``forward`` and ``backward`` do; those of
``backward`` take over on the GPU itself where logits are too large for folded products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cache, lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch

from megafold.ops.evo_attention.folding import (
    COLUMNS,
    PARTS,
    PEAK,
    fold_keys_kernel,
    fold_queries_kernel,
    spread_mask_kernel,
    turn_bias_kernel,
)
from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.sizes import cdiv, multiprocessors, power_of_two
from megafold.ops.tuning import is_overridden

TILE = 64  # queries and keys of a tile
L2_OF_AN_H100 = 50 * 2**20
IN_CACHE = 0.9  # of L2
SMALL_BIAS = 0.2  # of L2
LINE = 128  # bytes of the cache
FEWEST_ITEMS = 2  # of work for each multiprocessor
FEWEST_ROWS = 8  # that share a bias: two copies of it are made, and its gradient is a sum
WIDTHS = (32, 64)  # of a head, padded
FOLD_BLOCK = 128
BIAS_GROUPS = 3
BIAS_WAVES = 8  # programs per multiprocessor that the bias's gradient is split into


class Blocks(NamedTuple):
    """What the kernel for q, k and v is compiled with."""

    groups: int  # of 64 keys
    stages: int
    slices: int
    registers: int
    cost: float  # of a tile, beside the others of this width


class Forward(NamedTuple):
    """What the forward kernel is compiled with."""

    rows: int  # that share tiles of the bias
    programs: int  # on one multiprocessor
    stages: int
    maxnreg: int  # registers of a thread at the start; 0: as many as there are
    registers: int  # of a thread of the second row on


class Sizes(NamedTuple):
    """What kernels are compiled with for a width; measured on an H100."""

    forward: Forward  # of rows that share a bias
    forward_alone: Forward  # of a row that has its own
    blocks: tuple[Blocks, ...]
    bias_stages: int  # 0: the kernel of `backward` is faster for the bias


SIZES = {
    32: Sizes(
        Forward(2, 2, 2, 80, 104),
        Forward(1, 3, 2, 80, 0),
        (Blocks(3, 2, 2, 128, 1.0), Blocks(2, 3, 2, 168, 1.08)),
        4,
    ),
    64: Sizes(Forward(2, 1, 3, 0, 152), Forward(1, 2, 2, 96, 0), (Blocks(2, 2, 4, 176, 1.0),), 0),
}
_recording = False


@cache
def has_gluon() -> bool:
    """Whether this Triton has what the kernels are written in."""
    try:
        from megafold.ops.evo_attention import (  # noqa: F401
            hopper_backward,
            hopper_bias,
            hopper_forward,
        )
    except (ImportError, AttributeError, TypeError):
        return False
    return True


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


def _why_never(problem: Any, q: torch.Tensor, kernels: tuple[str, ...]) -> str:
    """Why neither pass is Hopper's."""
    if not is_hopper(q.device):
        return "not a Hopper GPU"
    if is_overridden(*kernels):
        return "use_config has other kernels in force"
    if q.dtype not in PARTS:
        return f"{str(q.dtype).removeprefix('torch.')} operands"
    if _width(problem) not in WIDTHS or problem.width % 8:
        return f"heads of {problem.width} channels"
    return "" if has_gluon() else "this Triton has no Gluon for it"


def why_not_forward(
    problem: Any, q: torch.Tensor, pair_bias: torch.Tensor | None, kernels: tuple[str, ...]
) -> str:
    """Why a call's forward pass is not Hopper's, in words; empty where it is.

    Decided from what `explain` knows too; a call may yet be laid out in memory in a way that TMA
    does not read (:func:`readable`).

    Args:
        kernels: those that run otherwise.
    """
    never = _why_never(problem, q, kernels)
    if never:
        return never
    if pair_bias is None or pair_bias.dtype != torch.float32:
        return "no bias in fp32"
    if problem.keys % 4 or problem.keys < TILE:
        return f"a number of keys that is no multiple of 4, or below {TILE}"
    items = cdiv(problem.queries, TILE) * problem.heads * problem.total_rows
    if items < FEWEST_ITEMS * multiprocessors(q.device):
        return "too few queries to fill the GPU"
    return ""


def why_not_backward(
    problem: Any, q: torch.Tensor, pair_bias: torch.Tensor | None, scale: float,
    kernels: tuple[str, ...],
) -> str:  # fmt: skip
    """Why a call's gradients are not Hopper's; as :func:`why_not_forward`."""
    never = _why_never(problem, q, kernels)
    if never:
        return never
    if pair_bias is None or problem.rows_per_bias < FEWEST_ROWS:
        return f"fewer than {FEWEST_ROWS} rows share a bias"
    if problem.queries % 4:
        return "a number of queries that is no multiple of 4"
    if problem.total_rows * problem.heads < FEWEST_ITEMS * multiprocessors(q.device):
        return "too few rows and heads to fill the GPU"
    if not scale > 0.0:
        return "a scale that is not positive"
    if _in_use(problem, q.device) > IN_CACHE * _cache(q.device):
        return "more is in use at a time than the L2 cache holds"
    return ""


def _in_use(problem: Any, device: torch.device) -> int:
    """Bytes that programs come back to in every walk over keys.

    They are the queries' operands and sums, and the bias of the heads that run at once.
    """
    programs = min(problem.total_rows * problem.heads, multiprocessors(device))
    of_query = 4 * _width(problem) + 2 * COLUMNS + 4 * _width(problem)
    bias = 4 * _at_once(problem, device) * problem.queries * problem.keys
    return programs * problem.queries * of_query + bias


def _at_once(problem: Any, device: torch.device) -> int:
    """Heads that run at once: all, or as many as fill lines of the cache where it is scarce."""
    bias = 4 * problem.heads * problem.queries * problem.keys
    return problem.heads if bias <= SMALL_BIAS * _cache(device) else _in_lines(problem)


def _in_lines(problem: Any) -> int:
    """Of how many heads the channels of one row fill whole lines of the cache; or all heads."""
    heads = LINE // gcd(LINE, 2 * problem.width)
    return heads if problem.heads % heads == 0 else problem.heads


@cache
def _cache(device: torch.device) -> int:
    if device.type == "meta":
        return L2_OF_AN_H100
    return torch.cuda.get_device_properties(device).L2_cache_size


def readable(*tensors: torch.Tensor) -> bool:
    """Whether TMA reads tensors ``[B, S, N, H, D]`` or a bias ``[B or 1, H, N, M]``.

    Neighbours in memory lie along the last dimension, the rest is aligned.
    """
    return all(
        t.data_ptr() % 16 == 0 and _lies_well(t.shape, t.stride(), t.element_size())
        for t in tensors
    )


@lru_cache(maxsize=4096)
def _lies_well(shape: torch.Size, strides: tuple[int, ...], bytes_each: int) -> bool:
    """Whether the first two dimensions are one, and all steps but the last whole 16 bytes."""
    if strides[-1] != 1:
        return False
    if shape[0] > 1 and shape[1] > 1 and strides[0] != shape[1] * strides[1]:
        return False
    steps = [s for n, s in zip(shape[:-1], strides[:-1], strict=True) if n > 1]
    return all(s > 0 and s * bytes_each % 16 == 0 for s in steps)


def forward(problem: Any, q, k, v, mask, bias, out, stats, scale: float) -> None:
    """Fill ``out`` and ``stats``; arguments as those of the launches of ``forward``."""
    padded = cdiv(problem.keys, TILE) * TILE
    rows = 1 if mask is None else problem.total_rows
    added = torch.empty((rows, padded), dtype=torch.float32, device=q.device)
    with on(q.device):
        _spread_mask(problem, q.device, layout(mask))(mask, added)
        boxes = _boxes(_width(problem), q.dtype)
        described = [_described(t, boxes.operand) for t in (q, k, v)]
        described += [_described(added, boxes.mask), _described(bias, boxes.bias)]
        launcher = _of_forward(problem, q.dtype, q.device, scale, mask is not None)
        launcher(*described, _described(out, boxes.operand), stats)


def backward(
    problem: Any, q, k, v, mask, bias, out, stats, grad, delta, grad_q, grad_k, grad_v,
    scale: float, for_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Fill delta, the gradients of q, k and v, and sums that make up that of the bias.

    Returns:
        The largest shift, fp32 ``[]``: where it exceeds PEAK nothing but delta was filled. The
        sums, fp32 ``[groups, *bias.shape]``, unless the kernel of ``backward`` is faster.
    """
    device, rows = q.device, problem.total_rows
    peak = torch.linalg.vector_norm(stats[0], float("inf"))
    queries = torch.empty(
        (rows * problem.heads, problem.queries, COLUMNS), dtype=q.dtype, device=device
    )
    keys = torch.empty(
        (1 if mask is None else rows, problem.keys, COLUMNS), dtype=q.dtype, device=device
    )
    programs = min(rows * problem.heads, multiprocessors(device))
    blocks_q = cdiv(problem.queries, TILE)
    acc = torch.empty(
        (programs, blocks_q * TILE, _width(problem)), dtype=torch.float32, device=device
    )
    along_queries = torch.empty(bias.mT.shape, dtype=torch.float32, device=device)
    with on(device):
        _turn_bias(problem, device, layout(bias))(bias, along_queries)
        _fold_queries(problem, q.dtype, device, scale, layout(grad))(
            out, grad, stats, queries, delta
        )
        _fold_keys(problem, q.dtype, device, layout(mask))(mask, keys)
        boxes = _boxes(_width(problem), q.dtype)
        d_q, d_k, d_v, d_grad = (_described(t, boxes.operand) for t in (q, k, v, grad))
        d_grad_k, d_grad_v = (_described(t, boxes.operand) for t in (grad_k, grad_v))
        d_queries, d_keys = (_described(t, boxes.beside) for t in (queries, keys))
        d_bias = _described(along_queries, boxes.bias)
        _of_all(problem, q.dtype, device, scale, programs, mask is not None)(
            d_q, d_k, d_v, d_grad, d_queries, d_keys, d_bias, d_grad_k, d_grad_v, peak, grad_q, acc
        )
        if not for_bias or not SIZES[_width(problem)].bias_stages:
            return peak, None
        del acc, along_queries
        strips = cdiv(problem.queries, BIAS_GROUPS * TILE) * cdiv(problem.keys, TILE)
        strips *= problem.heads * problem.biases
        groups, per_group = _row_groups(problem, strips, bias, q)
        sums = torch.empty((groups, *bias.shape), dtype=torch.float32, device=device)
        _of_bias(
            problem,
            q.dtype,
            device,
            scale,
            strips * groups,
            per_group,
            mask is not None,
            layout(bias),
        )(d_q, d_k, d_v, d_grad, d_queries, d_keys, bias, peak, sums)
    return peak, sums


def _row_groups(problem: Any, strips: int, bias: torch.Tensor, q: torch.Tensor) -> tuple[int, int]:
    """Into how many groups the rows are split, and rows in each.

    Enough for every multiprocessor, while the sums of all groups take no more than half the memory
    of q; two at least, as one program has a multiprocessor to itself.
    """
    wanted = cdiv(BIAS_WAVES * multiprocessors(q.device), strips)
    allowed = max(2, q.numel() * q.element_size() // (8 * bias.numel()))
    per_group = cdiv(problem.rows_per_bias, min(wanted, allowed, problem.rows_per_bias))
    return cdiv(problem.rows_per_bias, per_group), per_group


def _blocks(problem: Any) -> Blocks:
    """What leaves the least of the last walk over the keys undone."""
    return min(
        SIZES[_width(problem)].blocks,
        key=lambda b: b.cost * b.groups * cdiv(problem.keys, TILE * b.groups),
    )


def _width(problem: Any) -> int:
    return power_of_two(problem.width)


@dataclass(frozen=True, eq=False)  # one of each kind: compared by identity
class _Box:
    """What TMA fetches at once, and how it then lies in shared memory."""

    shape: tuple[int, ...]
    layout: Any


class _Boxes(NamedTuple):
    operand: _Box  # of q, k, v: 64 queries or keys of one head of one row
    beside: _Box  # the columns beside them
    bias: _Box
    mask: _Box


@cache
def _boxes(width: int, dtype: torch.dtype) -> _Boxes:
    from triton.experimental.gluon import language as gl

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    boxes = (
        ([1, TILE, 1, width], element),
        ([1, TILE, COLUMNS], element),
        ([1, TILE, TILE], gl.float32),
        ([1, TILE], gl.float32),
    )
    of = gl.NVMMASharedLayout.get_default_for
    return _Boxes(*(_Box(tuple(shape), of(shape, kind)) for shape, kind in boxes))


# What describes tensors that lie alike, without a tensor: to describe one anew takes ten times as
# long, which a call does a dozen times.
_described_before: dict[tuple[Any, ...], Any] = {}


def _described(tensor: torch.Tensor, box: _Box) -> Any:
    """A tensor as TMA reads it; those of more dimensions than the box with the first two joined."""
    key = (tensor.shape, tensor.stride(), tensor.dtype, box)
    alike = _described_before.get(key)
    if alike is None:
        alike = _described_before[key] = _describe(tensor, box)
        alike.base = None
    described = copy(alike)
    described.base = tensor
    return described


def _describe(tensor: torch.Tensor, box: _Box) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    shape, strides = list(tensor.shape), list(tensor.stride())
    if tensor.dim() > len(box.shape):
        outer = strides[1] if shape[1] > 1 else strides[0]
        shape, strides = [shape[0] * shape[1], *shape[2:]], [outer, *strides[2:]]
    aligned = 16 // tensor.element_size()
    strides = [s if n > 1 else aligned for n, s in zip(shape[:-1], strides[:-1], strict=True)]
    return TensorDescriptor(tensor, shape, [*strides, 1], list(box.shape), box.layout)


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


def _folding(dtype: torch.dtype) -> dict[str, Any]:
    parts = PARTS[dtype]
    return {"UNIT": tuple(parts[:3]), "LARGE": parts.large}


@lru_cache(maxsize=1024)
def _fold_queries(
    problem: Any, dtype: torch.dtype, device: torch.device, scale: float, grad: Layout
) -> Launcher:
    block_d = _width(problem)
    constants = {
        **_folding(dtype),
        "EVEN_Q": problem.queries % FOLD_BLOCK == 0,
        "EVEN_D": problem.width == block_d,
        "BLOCK_Q": FOLD_BLOCK,
        "BLOCK_D": block_d,
    }
    programs = problem.total_rows * problem.heads * cdiv(problem.queries, FOLD_BLOCK)
    statistics = problem.total_rows * problem.heads * problem.queries
    sizes = (problem.rows, statistics, problem.queries, problem.heads, problem.width)
    return Launcher(
        fold_queries_kernel, programs, (*grad[0], scale, *sizes), constants, {"num_warps": 4}
    )


@lru_cache(maxsize=1024)
def _fold_keys(
    problem: Any, dtype: torch.dtype, device: torch.device, mask: Layout | None
) -> Launcher:
    rows = 1 if mask is None else problem.total_rows
    strides = (0, 0, 0) if mask is None else mask[0]
    constants = {**_folding(dtype), "HAS_MASK": mask is not None, "BLOCK": FOLD_BLOCK}
    programs = rows * cdiv(problem.keys, FOLD_BLOCK)
    numbers = (*strides, problem.rows, problem.keys)
    return Launcher(fold_keys_kernel, programs, numbers, constants, {"num_warps": 4})


@lru_cache(maxsize=1024)
def _turn_bias(problem: Any, device: torch.device, bias: Layout) -> Launcher:
    programs = problem.biases * problem.heads
    programs *= cdiv(problem.queries, TILE) * cdiv(problem.keys, TILE)
    numbers = (*bias[0], problem.heads, problem.queries, problem.keys)
    return Launcher(turn_bias_kernel, programs, numbers, {"BLOCK": TILE}, {"num_warps": 4})


@lru_cache(maxsize=1024)
def _spread_mask(problem: Any, device: torch.device, mask: Layout | None) -> Launcher:
    rows = 1 if mask is None else problem.total_rows
    padded = cdiv(problem.keys, TILE) * TILE
    strides = (0, 0, 0) if mask is None else mask[0]
    constants = {"HAS_MASK": mask is not None, "BLOCK": FOLD_BLOCK}
    numbers = (*strides, problem.rows, problem.keys, padded)
    programs = rows * cdiv(padded, FOLD_BLOCK)
    return Launcher(spread_mask_kernel, programs, numbers, constants, {"num_warps": 4})


@lru_cache(maxsize=1024)
def _of_forward(
    problem: Any, dtype: torch.dtype, device: torch.device, scale: float, masked: bool
) -> Launcher:
    from triton.experimental.gluon import language as gl

    from megafold.ops.evo_attention.hopper_forward import hopper_forward_kernel

    width = _width(problem)
    sizes = SIZES[width].forward if problem.rows_per_bias > 1 else SIZES[width].forward_alone
    groups = cdiv(problem.rows_per_bias, sizes.rows)
    blocks_q = cdiv(problem.queries, TILE)
    items = blocks_q * problem.heads * groups * problem.biases
    constants = {
        "ROWS": sizes.rows,
        "STAGES": sizes.stages,
        "REGISTERS": sizes.registers,
        "WIDTH": width,
        "TILE": TILE,
        "KEYS": gl.NVMMASharedLayout(2 * width, 16, rank=2),
        "MIXED_QUERIES": _tile(TILE, width, 16),
        "MIXED_BIAS": _tile(TILE, TILE, 32),
    }
    numbers = (
        items,
        blocks_q,
        problem.heads,
        groups,
        problem.rows_per_bias,
        problem.total_rows * problem.heads * problem.queries,
        problem.queries,
        problem.keys,
        int(masked),
        scale,
    )
    programs = min(items, sizes.programs * multiprocessors(device))
    options = {"num_warps": 4, **({"maxnreg": sizes.maxnreg} if sizes.maxnreg else {})}
    return Launcher(hopper_forward_kernel, programs, numbers, constants, options)


@lru_cache(maxsize=1024)
def _of_all(
    problem: Any,
    dtype: torch.dtype,
    device: torch.device,
    scale: float,
    programs: int,
    masked: bool,
) -> Launcher:
    from triton.experimental.gluon import language as gl

    from megafold.ops.evo_attention.hopper_backward import hopper_backward_kernel

    width = _width(problem)
    blocks = _blocks(problem)
    constants = {
        "PEAK": PEAK,
        "GROUPS": blocks.groups,
        "STAGES": blocks.stages,
        "SLICES": blocks.slices,
        "REGISTERS": blocks.registers,
        "WIDTH": width,
        "SLICE": TILE // blocks.slices,
        "TILE": TILE,
        "UNIT": tuple(PARTS[dtype][:3]),
        "KEYS": gl.NVMMASharedLayout(2 * width, 16, rank=2),
        "MIXED_KEYS": _tile(TILE, width, 16),
        "MIXED_COLUMNS": _tile(TILE, COLUMNS, 16),
        "MIXED_BIAS": _tile(TILE, TILE, 32),
        "TILED": gl.NVMMASharedLayout(128, 16, rank=2),
        "MIXED_LOGITS": _tile(TILE, TILE, 16),
    }
    numbers = (
        problem.total_rows * problem.heads,
        problem.total_rows,
        problem.heads,
        _at_once(problem, device),
        problem.width,
        problem.rows_per_bias,
        problem.queries,
        int(masked),
        cdiv(problem.queries, TILE),
        cdiv(problem.keys, TILE * blocks.groups),
        scale,
    )
    return Launcher(hopper_backward_kernel, programs, numbers, constants, {"num_warps": 4})


@lru_cache(maxsize=1024)
def _of_bias(
    problem: Any, dtype: torch.dtype, device: torch.device, scale: float, programs: int,
    per_group: int, masked: bool, bias: Layout,
) -> Launcher:  # fmt: skip
    from megafold.ops.evo_attention.hopper_bias import hopper_bias_kernel

    width = _width(problem)
    constants = {
        "PEAK": PEAK,
        "STAGES": SIZES[width].bias_stages,
        "WIDTH": width,
        "TILE": TILE,
        "UNIT": tuple(PARTS[dtype][:3]),
    }
    numbers = (
        *bias[0],
        problem.heads,
        _in_lines(problem),
        problem.biases,
        problem.rows_per_bias,
        per_group,
        problem.queries,
        problem.keys,
        int(masked),
        scale,
    )
    options = {"num_warps": 4, "maxnreg": 128}
    return Launcher(hopper_bias_kernel, programs, numbers, constants, options)
