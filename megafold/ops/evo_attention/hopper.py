"""EvoAttention on Hopper GPUs: when kernels of its own run, and with what sizes.

They are written in Gluon, Triton's language of layouts and warps with roles, which compiles for
this chip alone. What they do not take, those of ``forward`` and ``backward`` do; those of
``backward`` take over on the GPU itself where logits are too large for folded products.
"""

from __future__ import annotations

from functools import cache, lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch

from megafold.ops.evo_attention.folding import PARTS
from megafold.ops.hopper import cache_of, is_aligned, is_hopper
from megafold.ops.sizes import cdiv, multiprocessors, power_of_two
from megafold.ops.tuning import is_overridden

TILE = 64  # queries and keys of a tile
SMALL_BIAS = 0.2  # of L2: up to it all heads run at once
LINE = 128  # bytes of the cache
FEWEST_ITEMS = 2  # of work for each multiprocessor
SUMS = 0.1  # of the memory of a bias's gradient: what sums of q's may take
FEWEST_ROWS = 8  # that share a bias: two copies of it are made, and its gradient is a sum
WIDTHS = (32, 64)  # of a head, padded
ALONE_WIDTH = 32  # of a head whose row has a bias of its own: wider, those of `backward` are faster


class Blocks(NamedTuple):
    """What the kernel for q, k and v is compiled with."""

    groups: int  # of four warps
    each: int  # blocks of 64 keys that a group has in a walk: 1 or 2
    stages: int
    slices: int
    registers: int
    cost: float  # of a tile, beside the others of this width


class Forward(NamedTuple):
    """What the forward kernel is compiled with."""

    rows: int  # that share tiles of the bias: 1 or 2
    programs: int  # on one multiprocessor, at most
    stages: int  # of a row of its own: one more where fewer programs run
    maxnreg: int  # registers of a thread at the start; 0: as many as there are
    registers: int  # of a thread of the second row


class OfBias(NamedTuple):
    """What the kernel for the bias's gradient is compiled with."""

    groups: int  # of 64 queries
    each: int  # keys of a group
    stages: int  # rows that are fetched ahead
    maxnreg: int  # registers of a thread at the start
    registers: int  # of a thread of the groups but the first


class Sizes(NamedTuple):
    """What kernels are compiled with for a width; measured on an H100."""

    forward: Forward  # of rows that share a bias
    forward_alone: Forward  # of a row that has its own
    blocks: tuple[Blocks, ...]
    bias: OfBias


SIZES = {
    32: Sizes(
        Forward(2, 2, 2, 80, 104),
        Forward(1, 3, 2, 80, 0),
        (
            Blocks(3, 1, 2, 2, 128, 1.0),
            Blocks(2, 1, 3, 2, 168, 1.2),
            Blocks(2, 2, 3, 2, 168, 1.1),
        ),
        OfBias(3, 64, 4, 128, 152),
    ),
    64: Sizes(
        Forward(2, 1, 3, 0, 152),
        Forward(1, 2, 2, 96, 0),
        (Blocks(2, 1, 2, 2, 184, 1.0),),
        OfBias(2, 128, 2, 168, 240),
    ),
}


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


def _why_never(problem: Any, q: torch.Tensor, kernels: tuple[str, ...]) -> str:
    """Why neither pass is Hopper's."""
    if not is_hopper(q.device):
        return "not a Hopper GPU"
    if is_overridden(*kernels):
        return "use_config has other kernels in force"
    if q.dtype not in PARTS:
        return f"{str(q.dtype).removeprefix('torch.')} operands"
    if width_of(problem) not in WIDTHS or problem.width % 8:
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
    if pair_bias is None:
        return "no bias"
    if pair_bias.dtype != torch.float32 and not _copies(problem):
        return "a bias in 16 bits, of which a copy in fp32 would be larger than q"
    if problem.keys % 4 or problem.keys < TILE:
        return f"a number of keys that is no multiple of 4, or below {TILE}"
    items = cdiv(problem.queries, TILE) * problem.heads * problem.total_rows
    alone = problem.rows_per_bias == 1 and width_of(problem) == ALONE_WIDTH
    if not alone and items < FEWEST_ITEMS * multiprocessors(q.device):
        return "too few queries to fill the GPU"
    return ""


def as_read(problem: Any, bias: torch.Tensor) -> torch.Tensor:
    """A bias as TMA reads it: itself, or a copy that is small beside q."""
    if not _copies(problem) or (bias.dtype == torch.float32 and readable(bias)):
        return bias
    return torch.empty(bias.shape, dtype=torch.float32, device=bias.device).copy_(bias)


def _copies(problem: Any) -> bool:
    """Whether enough rows share a bias for a copy of it in fp32 to be no larger than q."""
    return 4 * problem.keys <= 2 * problem.width * problem.rows_per_bias


def why_not_backward(
    problem: Any, q: torch.Tensor, pair_bias: torch.Tensor | None, scale: float,
    kernels: tuple[str, ...],
) -> str:  # fmt: skip
    """Why a call's gradients are not Hopper's; as :func:`why_not_forward`."""
    never = _why_never(problem, q, kernels)
    if never:
        return never
    if pair_bias is None or 1 < problem.rows_per_bias < FEWEST_ROWS:
        return f"fewer than {FEWEST_ROWS} rows share a bias"
    alone = problem.rows_per_bias == 1
    if alone and (width_of(problem) != ALONE_WIDTH or pair_bias.dtype != torch.float32):
        return f"a bias of its own for each row, in 16 bits or of heads wider than {ALONE_WIDTH}"
    if (problem.keys if alone else problem.queries) % 4:
        return f"a number of {'keys' if alone else 'queries'} that is no multiple of 4"
    if not problem.total_rows * problem.heads * problem.queries * problem.keys:
        return "nothing to attend to"
    items, most = plan_of(problem, q.device).items, multiprocessors(q.device)
    if alone and 2 * items < most:
        return "too few keys to be split for the whole GPU"
    if not alone and items < FEWEST_ITEMS * most:
        return "too few rows and heads to fill the GPU"
    if not scale > 0.0:
        return "a scale that is not positive"
    return ""


def at_once(problem: Any, device: torch.device) -> int:
    """Heads that run at once: all, or as many as fill lines of the cache where it is scarce."""
    bias = 4 * problem.heads * problem.queries * problem.keys
    if problem.rows_per_bias == 1 or bias <= SMALL_BIAS * cache_of(device):
        return problem.heads
    return in_lines(problem)


def in_lines(problem: Any) -> int:
    """Of how many heads the channels of one row fill whole lines of the cache; or all heads."""
    heads = LINE // gcd(LINE, 2 * problem.width)
    return heads if problem.heads % heads == 0 else problem.heads


def readable(*tensors: torch.Tensor) -> bool:
    """Whether TMA reads tensors ``[B, S, N, H, D]`` or a bias ``[B or 1, H, N, M]``.

    Its first two dimensions are one.
    """
    return all(is_aligned(t) and _are_one(t.shape, t.stride()) for t in tensors)


def _are_one(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    return shape[0] <= 1 or shape[1] <= 1 or strides[0] == shape[1] * strides[1]


class Plan(NamedTuple):
    """How the kernel for q, k and v goes about a problem."""

    blocks: Blocks
    alone: bool  # each row has a bias of its own
    walks: int  # over all keys
    walks_each: int  # of an item
    ranges: int  # of keys, each an item
    items: int
    programs: int


@lru_cache(maxsize=4096)
def plan_of(problem: Any, device: torch.device) -> Plan:
    """What takes the least time, from the tiles that the busiest program has.

    Ranges of keys each leave a sum; all of them may take SUMS of the bias's gradient.
    """
    alone = problem.rows_per_bias == 1
    most, heads = multiprocessors(device), problem.total_rows * problem.heads

    def of(blocks: Blocks) -> Plan:
        walks = cdiv(problem.keys, TILE * blocks.groups * blocks.each)
        allowed = min(most // heads, int(SUMS * problem.keys / problem.width))
        each = cdiv(walks, max(1, allowed)) if alone else walks
        ranges = cdiv(walks, each)
        items = ranges * heads
        return Plan(blocks, alone, walks, each, ranges, items, min(items, most))

    def cost(plan: Plan) -> float:
        turns = cdiv(plan.items, plan.programs) * plan.walks_each
        return turns * plan.blocks.groups * plan.blocks.each * plan.blocks.cost

    def fits(blocks: Blocks) -> bool:
        if not alone:
            return blocks.each == 1
        # Three groups would spill registers. Both blocks of a group have keys, or it has one.
        whole = blocks.each == 1 or tiles % (blocks.groups * blocks.each) == 0
        return blocks.groups == 2 and whole

    tiles = cdiv(problem.keys, TILE)
    return min(map(of, filter(fits, SIZES[width_of(problem)].blocks)), key=cost)


def programs_of(items: int, most: int, device: torch.device) -> int:
    """As many programs for items of work as leave no multiprocessor idle for long at the end.

    Args:
        most: that a multiprocessor runs at a time. They share what it can do; fewer of them wait
            more, by about a tenth each.
    """
    n = multiprocessors(device)

    def cost(each: int) -> float:
        return cdiv(items, each * n) * each * (1 + 0.1 * (most - each))

    return min(items, min(range(1, most + 1), key=cost) * n)


def width_of(problem: Any) -> int:
    return power_of_two(problem.width)
