"""EvoAttention on the host: shapes, block sizes, memory, and the launches of the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from megafold.ops.evo_attention import hopper, hopper_launch
from megafold.ops.evo_attention.backward import grad_bias_kernel, grad_kv_kernel, grad_q_kernel
from megafold.ops.evo_attention.forward import forward_kernel
from megafold.ops.evo_attention.tiles import step_of
from megafold.ops.evo_attention.waiting import waiting_kernel
from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.precision import IEEE, bits_of, precision_of
from megafold.ops.sizes import cdiv, multiprocessors, power_of_two
from megafold.ops.sums import add_sums
from megafold.ops.tuning import Config, Found, lookup

FORWARD = "evo_attention.forward"
GRAD_Q = "evo_attention.grad_q"
GRAD_KV = "evo_attention.grad_kv"
GRAD_BIAS = "evo_attention.grad_bias"
GRADIENTS = (GRAD_Q, GRAD_KV, GRAD_BIAS)
KERNELS = (FORWARD, *GRADIENTS)

SMALLEST_BLOCK = 16  # the least that tensor cores multiply
FEW_KEYS = 16  # up to which gradients are differences of near equals
ROWS_FOR_COPY = 8  # that share a bias, from which a transposed copy of it is made
BY_GRID = ("i_program", None)  # a program does what its place in the grid says
WAITING = {"BLOCK_Q": 64, "BLOCK_K": 64}  # of the kernel that waits behind Hopper's own
WAITING_PROGRAMS = 2  # of it, per multiprocessor
WAVES = 8  # programs per multiprocessor that the bias's gradient is split into, where it may


class Problem(NamedTuple):
    """The sizes of one call, and what of them the kernels are compiled or launched with."""

    batch: int
    rows: int
    queries: int
    keys: int
    heads: int
    width: int
    rows_per_bias: int  # rows that share one bias: S, or B S

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, pair_bias: torch.Tensor | None) -> Problem:
        batch, rows, queries, heads, width = q.shape
        shared = pair_bias is None or pair_bias.shape[0] == 1
        per_bias = batch * rows if shared else rows
        return cls(batch, rows, queries, k.shape[2], heads, width, per_bias)

    @property
    def total_rows(self) -> int:
        return self.batch * self.rows

    @property
    def biases(self) -> int:
        return self.total_rows // self.rows_per_bias if self.rows_per_bias else 0


def padded_width(width: int) -> int:
    """The width a kernel computes with: the next power of two, 16 at least."""
    return max(SMALLEST_BLOCK, power_of_two(width))


def config_of(kernel: str, problem: Problem, q: torch.Tensor) -> Found:
    """The block sizes a kernel runs with for a problem, and where they are from."""
    sizes = (
        ("D", padded_width(problem.width)),
        ("N", problem.queries),
        ("K", problem.keys),
        ("R", problem.rows_per_bias),
    )
    return lookup(kernel, q.device, bits_of(q.dtype, q.device), sizes)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    pair_bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output ``[B, S, N, H, D]`` and the statistics fp32 ``[2, B S, H, N]``."""
    problem = Problem.of(q, k, pair_bias)
    out = _empty_like(q)
    of_rows = (2, problem.total_rows, problem.heads, problem.queries)
    stats = torch.empty(of_rows, dtype=torch.float32, device=q.device)
    if out.numel():
        bias, mask = pair_bias, spread(mask, problem)
        by_tma = not hopper.why_not_forward(problem, q, bias, (FORWARD,))
        by_tma = by_tma and hopper.readable(q, k, v)
        if by_tma:
            bias = hopper.as_read(problem, bias)
        if by_tma and hopper.readable(bias):
            hopper_launch.forward(problem, q, k, v, mask, bias, out, stats, scale)
        else:
            launch_forward(problem, q, k, v, mask, readable(bias), out, stats, scale)
    return out, stats


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    pair_bias: torch.Tensor | None,
    out: torch.Tensor,
    stats: torch.Tensor,
    scale: float,
    asked: Sequence[bool],
    into: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """The gradients asked for of q, k, v and pair_bias, in this order; others are not computed.

    Args:
        into: memory for those of q, k and v, all asked for, laid out as these are, neighbours
            along D; None: their own, contiguous.
    """
    problem = Problem.of(q, k, pair_bias)
    for_q, for_k, for_v, for_bias = asked
    grad_q, grad_k, grad_v = into or (
        _empty_like(t) if one else None for t, one in zip((q, k, v), asked[:3], strict=True)
    )
    grad_bias = _empty_like(pair_bias) if for_bias else None
    results = [g for g in (grad_q, grad_k, grad_v, grad_bias) if g is not None]
    if not out.numel() or not problem.keys:  # no key: what there is does not depend on anything
        return [g.zero_() for g in results]
    bias, mask = readable(pair_bias), spread(mask, problem)
    delta = torch.empty(stats.shape[1:], dtype=torch.float32, device=q.device)
    alone = grad_bias if problem.rows_per_bias == 1 else None
    shared = for_bias and alone is None
    if (
        for_q
        and for_k
        and for_v
        and (problem.rows_per_bias > 1 or for_bias)
        and not hopper.why_not_backward(problem, q, bias, scale, GRADIENTS)
        and hopper.readable(q, k, v, grad)
        and (problem.rows_per_bias > 1 or hopper.readable(bias))
    ):
        beyond, adds = hopper_launch.backward(
            problem, q, k, v, mask, bias, out, stats, grad, delta, grad_q, grad_k, grad_v,
            grad_bias, scale,
        )  # fmt: skip
        launch_waiting(
            problem, beyond, q, k, v, mask, bias, out, stats, grad, delta, grad_q, grad_k, grad_v,
            alone, grad_bias if shared else None, scale, into is not None,
        )  # fmt: skip
        shared = False
        for sums, part in adds:
            add_sums(sums, part, beyond)
    else:
        launch_grad_q(
            problem, q, k, v, mask, bias, out, stats, grad, delta, grad_q, alone, scale,
            into is not None,
        )  # fmt: skip
        if for_k or for_v:
            launch_grad_kv(
                problem, q, k, v, mask, bias, stats, grad, delta, grad_k, grad_v, scale,
                into is not None,
            )  # fmt: skip
    if shared:
        launch_grad_bias(problem, q, k, v, mask, bias, stats, grad, delta, grad_bias, scale)
    return results


def launch_forward(problem, q, k, v, mask, bias, out, stats, scale) -> Any:
    """Fill ``out`` and ``stats``; arguments as those of the kernel."""
    config = config_of(FORWARD, problem, q).config
    launcher = _by_rows(
        forward_kernel, config, problem, "BLOCK_Q", q.device, scale,
        precision_of(q.dtype, q.device), (), layout(q), layout(k), layout(v), None, layout(mask),
        layout(bias),
    )  # fmt: skip
    with on(q.device):
        return launcher(q, k, v, mask, bias, out, stats)


def launch_grad_q(
    problem, q, k, v, mask, bias, out, stats, grad, delta, grad_q, grad_bias, scale,
    as_operands: bool = False,
) -> Any:  # fmt: skip
    """Fill ``delta``, and ``grad_q`` and ``grad_bias`` where they are not None."""
    config = config_of(GRAD_Q, problem, q).config
    stored = (("STORE_Q", grad_q is not None), ("STORE_BIAS", grad_bias is not None))
    stored = (*stored, ("AS_OPERANDS", as_operands))
    launcher = _by_rows(
        grad_q_kernel, config, problem, "BLOCK_Q", q.device, scale,
        precision_of(q.dtype, q.device), (*stored, BY_GRID), layout(q), layout(k), layout(v),
        layout(grad), layout(mask), layout(bias),
    )  # fmt: skip
    with on(q.device):
        return launcher(q, k, v, mask, bias, out, stats, grad, delta, grad_q, grad_bias)


def launch_grad_kv(
    problem, q, k, v, mask, bias, stats, grad, delta, grad_k, grad_v, scale,
    as_operands: bool = False,
) -> Any:  # fmt: skip
    """Fill ``grad_k`` and ``grad_v`` where they are not None."""
    config = config_of(GRAD_KV, problem, q).config
    if config.blocks["KEYS_FIRST"]:
        bias = along_queries(bias, problem)
    stored = (("STORE_K", grad_k is not None), ("STORE_V", grad_v is not None))
    stored = (*stored, ("AS_OPERANDS", as_operands))
    launcher = _by_rows(
        grad_kv_kernel, config, problem, "BLOCK_K", q.device, scale,
        precision_of(q.dtype, q.device), (*stored, BY_GRID), layout(q), layout(k), layout(v),
        layout(grad), layout(mask), layout(bias),
    )  # fmt: skip
    with on(q.device):
        return launcher(q, k, v, mask, bias, stats, grad, delta, grad_k, grad_v)


def launch_grad_bias(
    problem, q, k, v, mask, bias, stats, grad, delta, grad_bias, scale
) -> Any:  # fmt: skip
    """Fill ``grad_bias``: the rows in groups, then the sum of the groups."""
    config = config_of(GRAD_BIAS, problem, q).config
    blocks = _fitted(config.blocks, problem)
    tiles = _tiles_of_bias(problem, blocks)
    groups = row_groups(
        problem, tiles, multiprocessors(q.device), 4 * grad_bias.numel(),
        q.numel() * q.element_size(),
    )  # fmt: skip
    per_group = cdiv(problem.rows_per_bias, groups)
    groups = cdiv(problem.rows_per_bias, per_group)
    sums = grad_bias
    if groups > 1:
        of_groups = (groups, *grad_bias.shape)
        sums = torch.empty(of_groups, dtype=torch.float32, device=grad_bias.device)
    launcher = _bias_sums(
        grad_bias_kernel, config, problem, tiles * groups, per_group, q.device, scale,
        precision_of(q.dtype, q.device), layout(q), layout(k), layout(v), layout(grad),
        layout(mask), layout(bias), sums.dtype,
    )  # fmt: skip
    with on(q.device):
        compiled = launcher(q, k, v, mask, bias, stats, grad, delta, sums)
    if groups > 1:
        add_sums(sums, grad_bias)
    return compiled


def launch_waiting(
    problem, beyond, q, k, v, mask, bias, out, stats, grad, delta, grad_q, grad_k, grad_v,
    of_each, shared, scale, as_operands: bool = False,
) -> Any:  # fmt: skip
    """Fill the gradients that are not None where ``beyond`` says so on the GPU; else nothing."""
    launcher = _waiting(
        waiting_kernel, problem, q.device, scale, of_each is not None, shared is not None,
        as_operands,
        layout(q), layout(k), layout(v), layout(grad), layout(mask), layout(bias),
    )  # fmt: skip
    with on(q.device):
        return launcher(
            beyond, q, k, v, mask, bias, out, stats, grad, delta, grad_q, grad_k, grad_v,
            of_each, shared,
        )  # fmt: skip


@lru_cache(maxsize=4096)
def _by_rows(
    kernel: Any, config: Config, problem: Problem, split: str, device: torch.device, scale: float,
    precision: str, stored: tuple[tuple[str, bool | None], ...],
    q: Layout, k: Layout, v: Layout, grad: Layout | None, mask: Layout | None, bias: Layout | None,
) -> Launcher:  # fmt: skip
    """A launch whose programs each take one block (``split``) of one head in ROWS rows."""
    blocks = _fitted(config.blocks, problem)
    groups = problem.biases * cdiv(problem.rows_per_bias, blocks["ROWS"])
    size = problem.queries if split == "BLOCK_Q" else problem.keys
    programs = cdiv(size, blocks[split]) * problem.heads * groups
    operands = (q, k, v) if grad is None else (q, k, v, grad)
    constants = {**_constants(problem, operands, precision, mask, bias, blocks), **dict(stored)}
    numbers = (*_strides(q, k, v, grad, mask, bias), *_sizes(problem, scale))
    return Launcher(kernel, programs, numbers, constants, config.options)


@lru_cache(maxsize=4096)
def _bias_sums(
    kernel: Any, config: Config, problem: Problem, programs: int, per_group: int,
    device: torch.device, scale: float, precision: str,
    q: Layout, k: Layout, v: Layout, grad: Layout, mask: Layout | None, bias: Layout | None,
    dtype: torch.dtype,
) -> Launcher:  # fmt: skip
    """A launch whose programs each take one tile of the bias in ``per_group`` rows."""
    blocks = _fitted(config.blocks, problem)
    wrap = problem.rows_per_bias > problem.rows
    constants = _constants(problem, (q, k, v, grad), precision, mask, bias, blocks)
    constants = {**constants, "WRAP": wrap, **dict([BY_GRID])}
    numbers = (*_strides(q, k, v, grad, mask, bias), *_sizes(problem, scale))
    numbers = (*numbers, problem.biases, per_group)
    return Launcher(kernel, programs, numbers, constants, config.options)


@lru_cache(maxsize=4096)
def _waiting(
    kernel: Any, problem: Problem, device: torch.device, scale: float, alone: bool, shared: bool,
    as_operands: bool,
    q: Layout, k: Layout, v: Layout, grad: Layout, mask: Layout | None, bias: Layout,
) -> Launcher:  # fmt: skip
    """A launch of few programs: as a rule they return at once."""
    blocks = _fitted(WAITING, problem)
    of_rows = problem.heads * problem.total_rows
    of_q = cdiv(problem.queries, blocks["BLOCK_Q"]) * of_rows
    of_keys = cdiv(problem.keys, blocks["BLOCK_K"]) * of_rows
    constants = _constants(problem, (q, k, v, grad), IEEE, mask, bias, blocks)
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    constants["WRAP"] = problem.rows_per_bias > problem.rows
    constants["AS_OPERANDS"] = as_operands
    numbers = (*_strides(q, k, v, grad, mask, bias), *_sizes(problem, scale))
    of_bias = _tiles_of_bias(problem, blocks) * shared
    numbers = (*numbers, problem.biases, of_q, of_keys, of_bias)
    programs = min(of_q, WAITING_PROGRAMS * multiprocessors(device))
    return Launcher(kernel, programs, numbers, constants, {"num_warps": 8, "num_stages": 2})


def _tiles_of_bias(problem: Problem, blocks: Mapping[str, int]) -> int:
    tiles = cdiv(problem.queries, blocks["BLOCK_Q"]) * cdiv(problem.keys, blocks["BLOCK_K"])
    return tiles * problem.heads * problem.biases


def row_groups(
    problem: Problem, tiles: int, processors: int, sum_bytes: int, spare_bytes: int
) -> int:
    """Into how many groups of rows the gradient of the bias is split.

    Enough for every multiprocessor to have work, while the sums of all groups take no more than
    a quarter of the memory of q.
    """
    wanted = cdiv(WAVES * processors, tiles)
    allowed = spare_bytes // (4 * sum_bytes)
    return max(1, min(wanted, allowed, problem.rows_per_bias))


def spread(mask: torch.Tensor | None, problem: Problem) -> torch.Tensor | None:
    """A mask as the kernels read it: a view ``[B, S, M]``, not copied."""
    return None if mask is None else mask.expand(problem.batch, problem.rows, problem.keys)


def readable(bias: torch.Tensor | None) -> torch.Tensor | None:
    """The bias as the kernels read it: with neighbours in memory along keys or along queries.

    A bias cut out of a projection has heads or channels there; its copy is small beside q,
    and every tile of it is read many times.
    """
    if bias is None or bias.stride(-1) == 1 or bias.stride(-2) == 1:
        return bias
    return bias.contiguous()


def along_queries(bias: torch.Tensor | None, problem: Problem) -> torch.Tensor | None:
    """The bias with neighbours in memory along queries, where enough rows share a copy of it.

    The gradients of k and v walk over queries and hold logits ``[keys, queries]``.
    """
    if bias is None or bias.stride(-2) == 1 or problem.rows_per_bias < ROWS_FOR_COPY:
        return bias
    return bias.transpose(-1, -2).contiguous().transpose(-1, -2)


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fitted(blocks, problem: Problem) -> dict[str, int]:
    """The block sizes of a table, no larger than the problem."""
    fitted = dict(blocks)
    if "ROWS" in fitted:
        fitted["ROWS"] = min(fitted["ROWS"], problem.rows_per_bias)
    for name, size in (("BLOCK_Q", problem.queries), ("BLOCK_K", problem.keys)):
        fitted[name] = min(fitted[name], max(SMALLEST_BLOCK, power_of_two(size)))
    return fitted


def _constants(
    problem: Problem, operands: Sequence[Layout], precision: str, mask: Layout | None,
    bias: Layout | None, blocks: Mapping[str, int],
) -> dict[str, object]:  # fmt: skip
    block_d, dtype = padded_width(problem.width), operands[0][1]
    return {
        "STEP": step_of(problem.width, *operands),
        "HAS_MASK": mask is not None,
        "HAS_BIAS": bias is not None,
        "EVEN_Q": fits(problem.queries, blocks["BLOCK_Q"]),
        "EVEN_K": fits(problem.keys, blocks["BLOCK_K"]),
        "EVEN_D": problem.width == block_d,
        "PRECISION": precision,
        # TF32 has the precision of fp16, and is treated alike.
        "EXACT": (dtype == torch.float32 and precision == IEEE) or problem.keys <= FEW_KEYS,
        "BLOCK_D": block_d,
        **blocks,
    }


def fits(size: int, block: int) -> bool:
    """Whether blocks fill a dimension, so that no read needs a mask; none fills an empty one."""
    return size > 0 and size % block == 0


def _sizes(problem: Problem, scale: float) -> tuple[float | int, ...]:
    return (
        scale,
        problem.rows,
        problem.rows_per_bias,
        problem.total_rows * problem.heads * problem.queries,
        problem.queries,
        problem.keys,
        problem.heads,
        problem.width,
    )


def _strides(
    q: Layout, k: Layout, v: Layout, grad: Layout | None, mask: Layout | None, bias: Layout | None
) -> tuple[int, ...]:
    """The strides of all operands, in the kernels' order."""
    operands = (q, k, v) if grad is None else (q, k, v, grad)
    strides = [stride for operand in operands for stride in operand[0]]
    return (*strides, *(mask[0] if mask else (0, 0, 0)), *(bias[0] if bias else (0, 0, 0, 0)))
