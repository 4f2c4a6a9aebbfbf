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

from megafold.ops.hopper import in_words, readable
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
from megafold.ops.layer_norm_linear import hopper
from megafold.ops.layer_norm_linear.kernels import (
    backward_kernel,
    finish_kernel,
    forward_kernel,
    grad_x_kernel,
    product_kernel,
)
from megafold.ops.sizes import cdiv, multiprocessors, power_of_two
from megafold.ops.tuning import Config, Found, lookup

FORWARD = "layer_norm_linear.forward"
BACKWARD = "layer_norm_linear.backward"
GRAD_X = "layer_norm_linear.grad_x"
PRODUCT = "layer_norm_linear.product"
KERNELS = (FORWARD, BACKWARD, GRAD_X, PRODUCT)
GRADIENTS = (GRAD_X, PRODUCT)  # of more outputs than one program sums for

HALVES = (torch.float16, torch.bfloat16)

SMALLEST_BLOCK = 16  # the least that tensor cores multiply
# Channels of which one program holds whole rows, and the weight's gradient. A forward kernel
# that walked over wider rows took 2.6 times as long as PyTorch (docs/layer_norm_linear.md).
WIDEST_FUSED = 128
WIDEST_HELD = 128  # outputs of which one program sums for the weight and takes the gradient of x
# Outputs of a tile that is summed over rows: Hopper's tensor cores multiply 64 rows at least, and
# those that multiply fewer keep the other operand in the registers of every warp.
LEAST_SUMMED = 64
FILL = 2  # programs per multiprocessor that the forward pass is shared out among
# Bytes of a weight that one program holds in blocks. Hopper has 227 KB of shared memory for a
# program, and three blocks of 64 rows of 16-bit x take 48.
MOST_HELD = 160 * 2**10
# Of the kernel that adds up: small tiles, for there are few, and many groups at a time.
FINISH = {"BLOCK_G": 128, "BLOCK_C": 32, "BLOCK_N": 8}
MOST_PARTS = 1024  # of what sums to the norm's gradients, at a time
FAR = 2**23  # numbers between rows, from which on offsets within a tile leave 32 bits


class Problem(NamedTuple):
    """The sizes of one call."""

    rows: int
    channels: int
    outs: int


def is_fused(weight: torch.Tensor) -> bool:
    """Whether both passes multiply in kernels of their own, rather than through torch."""
    return why_not_fused(*weight.shape, weight.dtype) is None


def why_not_fused(outs: int, channels: int, dtype: torch.dtype) -> str | None:
    """What of a weight the fused kernels cannot take, in words; None where they take it."""
    if dtype not in HALVES:
        return f"{str(dtype).removeprefix('torch.')} operands"
    if channels > WIDEST_FUSED:
        return f"rows of {channels} channels, more than {WIDEST_FUSED}"
    return f"{outs} outputs, {FAR} or more" if outs >= FAR else None


def is_held(problem: Problem) -> bool:
    """Whether one kernel of the backward pass does for x and for the parameters."""
    return problem.outs <= WIDEST_HELD


def near_rows(x: torch.Tensor) -> torch.Tensor:
    """``as_rows``, copied where rows lie too far apart for the kernels."""
    flat = as_rows(x)
    return flat if flat.stride(0) < FAR else flat.contiguous()


def config_of(kernel: str, problem: Problem, weight: torch.Tensor) -> Found:
    """The block sizes a fused kernel runs with for a problem, and where they are from."""
    sizes = (("C", padded(problem.channels)), ("O", problem.outs), ("M", problem.rows))
    return lookup(kernel, weight.device, 8 * weight.dtype.itemsize, sizes)


def described(x: torch.Tensor, weight: torch.Tensor) -> tuple[str, ...]:
    """What both passes of a call run, with block sizes and where those are from."""
    rows = x.numel() // x.shape[-1]
    problem = Problem(rows, *reversed(weight.shape))
    why = why_not_fused(*weight.shape, weight.dtype)
    if why is None:
        names = (FORWARD, BACKWARD) if is_held(problem) else (FORWARD, GRAD_X, PRODUCT)
        found = {kernel: config_of(kernel, problem, weight) for kernel in names}
    else:
        found = {k: config_of_rows(k, x, rows, problem.channels) for k in (NORMALISE, GRADIENT)}
    lines = [f"{kernel}: {f.config} ({f.source})" for kernel, f in found.items()]
    if why is None:
        if hopper.is_hopper(x.device) and not is_held(problem):
            sizes = problem.outs, problem.channels, weight.dtype
            output = hopper.why_not_forward(x, *sizes, (FORWARD,))
            gradients = hopper.why_not(x, *sizes, GRADIENTS)
            lines.append(f"layer_norm_linear.hopper: output {in_words(output)}")
            lines.append(f"layer_norm_linear.hopper: gradients {in_words(gradients)}")
        return tuple(lines)
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
    flat, weight = near_rows(x), near_rows(weight)
    norm_weight, norm_bias, bias = packed(norm_weight), packed(norm_bias), packed(bias)
    if is_fused(weight):
        out = torch.empty((flat.shape[0], outs), dtype=weight.dtype, device=x.device)
        why_not = hopper.why_not_forward(flat, outs, channels, weight.dtype, (FORWARD,))
        on_hopper = not why_not and readable(flat, weight)
        run = hopper.launch_forward if on_hopper else launch_forward
        run(flat, norm_weight, norm_bias, weight, bias, out, stats, eps)
        return out.view(shape), stats
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
    added: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The gradients asked for of x, norm_weight, norm_bias, weight and bias, in this order.

    Args:
        added: of the shape of x, what is added to its gradient; None for nothing.
    """
    operands = (x, norm_weight, norm_bias, weight, bias)
    if not grad.numel():
        return [
            torch.zeros(t.shape, dtype=t.dtype, device=t.device)
            for t, one in zip(operands, asked, strict=True)
            if one
        ]
    norms = packed(norm_weight), packed(norm_bias)
    run = _fused_backward if is_fused(weight) else _backward_by_products
    added = near_rows(added) if asked[0] and added is not None else None
    found = run(
        near_rows(grad), near_rows(x), *norms, near_rows(weight), stats, added, tuple(asked)
    )
    return [
        as_operand(value, t) for t, value, one in zip(operands, found, asked, strict=True) if one
    ]


Gradients = tuple[torch.Tensor | None, ...]


def _fused_backward(grad, x, norm_weight, norm_bias, weight, stats, added, asked) -> Gradients:
    """One kernel or two for x and sums over rows, and one for the parameters."""
    for_x, for_norm_weight, for_norm_bias, for_weight, for_bias = asked
    outs, channels = weight.shape
    if (
        for_x
        and (for_norm_weight or for_norm_bias or for_weight or for_bias)
        and not hopper.why_not(x, outs, channels, weight.dtype, GRADIENTS)
        and readable(grad, x, weight)
    ):
        return _hopper_backward(grad, x, norm_weight, norm_bias, weight, stats, added, asked)
    problem = Problem(x.shape[0], channels, outs)
    kernel = BACKWARD if is_held(problem) else PRODUCT
    plan = _plan(problem, config_of(kernel, problem, weight).config, x.device)
    for_norms = for_norm_weight or for_norm_bias
    totals = for_norm_bias or for_bias or (for_weight and norm_bias is not None)

    def sums(wanted: bool, *shape: int) -> torch.Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=x.device) if wanted else None

    grad_x = x.new_empty(x.shape) if for_x else None
    parts = (
        sums(for_norms or for_weight or for_bias, plan.groups, outs, channels),
        sums(totals, plan.groups, outs),
        sums(for_norms, 2, plan.groups * plan.slices, channels),
    )
    products = parts[0]
    if kernel == BACKWARD:
        launch_backward(grad, x, norm_weight, weight, stats, added, grad_x, *parts)
    else:
        if grad_x is not None:
            launch_grad_x(grad, x, norm_weight, weight, stats, added, grad_x)
        if products is not None:
            launch_product(grad, x, weight, stats, *parts)
    if products is None:
        return grad_x, None, None, None, None
    found = _parameters(norm_weight, norm_bias, weight, asked)
    of_norms = (None, None) if parts[2] is None else (parts[2][0], parts[2][1])
    launch_finish(products, parts[1], *of_norms, norm_weight, norm_bias, *found)
    return grad_x, found[2], found[3], found[0], found[1]


def _hopper_backward(grad, x, norm_weight, norm_bias, weight, stats, added, asked) -> Gradients:
    """One kernel for x and sums over rows, and one for the parameters."""
    outs, channels = weight.shape
    plan = hopper.plan_of(outs, x.device)

    def sums(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    grad_x = x.new_empty(x.shape)
    parts = (
        sums(plan.groups, outs, channels),
        sums(plan.groups, outs),
        sums(8 * (plan.programs(outs) - plan.for_x), channels),
        sums(8 * plan.for_x, channels),
    )
    hopper.launch(grad, x, norm_weight, weight, stats, added, grad_x, *parts, plan)
    found = _parameters(norm_weight, norm_bias, weight, asked)
    launch_finish(*parts, norm_weight, norm_bias, *found)
    return grad_x, found[2], found[3], found[0], found[1]


def _parameters(norm_weight, norm_bias, weight, asked) -> Gradients:
    """Room for the gradients asked for of weight, bias, and the norm's two."""
    _, for_norm_weight, for_norm_bias, for_weight, for_bias = asked

    def of(wanted: bool, operand: torch.Tensor | None, *shape: int) -> torch.Tensor | None:
        if not wanted or operand is None:
            return None
        return torch.empty(shape, dtype=operand.dtype, device=operand.device)

    outs, channels = weight.shape
    return (
        of(for_weight, weight, outs, channels),
        of(for_bias, weight, outs),
        of(for_norm_weight, norm_weight, channels),
        of(for_norm_bias, norm_bias, channels),
    )


def _backward_by_products(
    grad, x, norm_weight, norm_bias, weight, stats, added, asked
) -> Gradients:  # fmt: skip
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
        if added is not None:
            grad_x += added
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


def launch_backward(
    grad, x, norm_weight, weight, stats, added, grad_x, products, totals, norms
) -> Any:  # fmt: skip
    """Fill ``grad_x``, ``products``, ``totals`` and ``norms`` where they are not None."""
    tensors = (grad, x, norm_weight, weight, stats, added, grad_x, products, totals, norms)
    return _launch_rows(backward_kernel, BACKWARD, tensors, x, weight, added)


def launch_grad_x(grad, x, norm_weight, weight, stats, added, grad_x) -> Any:
    """Fill ``grad_x``."""
    tensors = (grad, x, norm_weight, weight, stats, added, grad_x)
    return _launch_rows(grad_x_kernel, GRAD_X, tensors, x, weight, added)


def launch_product(grad, x, weight, stats, products, totals, norms) -> Any:
    """Fill ``products``, and ``totals`` and ``norms`` where they are not None."""
    return _launch_rows(
        product_kernel, PRODUCT, (grad, x, weight, stats, products, totals, norms), x, weight
    )


def _launch_rows(
    kernel, name: str, tensors, x: torch.Tensor, weight: torch.Tensor,
    added: torch.Tensor | None = None,
) -> Any:  # fmt: skip
    """Launch a kernel of the backward pass, whose programs walk over groups of rows."""
    problem = Problem(*x.shape, weight.shape[0])
    config = config_of(name, problem, weight).config
    launcher = _rows(
        kernel, name, config, problem, x.device, tensors[0].stride(0), x.stride(0),
        weight.stride(0), 0 if added is None else added.stride(0),
        tuple(layout(t) for t in tensors),
    )  # fmt: skip
    with on(x.device):
        return launcher(*tensors)


def launch_finish(
    products, totals, of_weight, of_bias, norm_weight, norm_bias, *found
) -> Any:  # fmt: skip
    """Fill the gradients ``found`` of weight, bias and the norm's two, where they are not None."""
    tensors = (products, totals, of_weight, of_bias, norm_weight, norm_bias, *found)
    parts = tuple(0 if t is None else t.shape[0] for t in (of_weight, of_bias))
    launcher = _finish(
        finish_kernel, tuple(products.shape), parts, products.device,
        tuple(layout(t) for t in tensors),
    )  # fmt: skip
    with on(products.device):
        return launcher(*tensors)


class Plan(NamedTuple):
    """How a kernel of the backward pass shares out its work."""

    blocks: dict[str, int]
    slices: int  # blocks of outputs, each with a program
    groups: int  # of rows
    per_group: int  # blocks of rows


@lru_cache(maxsize=4096)
def _plan(problem: Problem, config: Config, device: torch.device, sliced: bool = True) -> Plan:
    blocks = _fitted(config, problem)
    wanted = blocks.pop("WAVES") * multiprocessors(device)
    if sliced:
        blocks["BLOCK_O"] = max(blocks["BLOCK_O"], LEAST_SUMMED)
    slices = cdiv(problem.outs, blocks["BLOCK_O"]) if sliced else 1
    of_rows = cdiv(problem.rows, blocks["BLOCK_M"])
    per_group = cdiv(of_rows, max(1, min(of_rows, wanted // slices)))
    return Plan(blocks, slices, cdiv(of_rows, per_group), per_group)


@lru_cache(maxsize=4096)
def _forward(
    kernel: Any, config: Config, problem: Problem, device: torch.device, eps: float,
    x: Layout, norm_weight: Layout | None, norm_bias: Layout | None, weight: Layout,
    bias: Layout | None,
) -> Launcher:  # fmt: skip
    rows, _, outs = problem
    blocks = _fitted(config, problem)
    wanted = bool(blocks.pop("HELD", 0))
    of_rows, of_outs = cdiv(rows, blocks["BLOCK_M"]), cdiv(outs, blocks["BLOCK_O"])
    most = FILL * multiprocessors(device)
    splits = min(of_outs, cdiv(most, of_rows))
    per_program = cdiv(of_outs, splits)
    splits = cdiv(of_outs, per_program)
    # Where programs share rows, each has outputs of its own.
    held_bytes = of_outs * blocks["BLOCK_O"] * blocks["BLOCK_C"] * weight[1].itemsize
    room = splits == 1 and x[1] in HALVES and held_bytes <= MOST_HELD
    held = of_outs == 1 or (wanted and room)
    if of_outs > 1:  # beside such a program no other has room
        most = multiprocessors(device)
    programs = min(of_rows, most) if held else of_rows * splits
    even = outs % blocks["BLOCK_O"] == 0
    constants = {"HELD": of_outs if held else 0, "EVEN_O": even, **blocks}
    numbers = (x[0][0], weight[0][0], eps, rows, outs, of_rows, per_program, splits)
    return Launcher(kernel, programs, numbers, constants, config.options)


@lru_cache(maxsize=4096)
def _rows(
    kernel: Any, name: str, config: Config, problem: Problem, device: torch.device,
    stride_g: int, stride_x: int, stride_w: int, stride_a: int, layouts: tuple[Layout | None, ...],
) -> Launcher:  # fmt: skip
    plan = _plan(problem, config, device, sliced=name != GRAD_X)
    rows, _, outs = problem
    block_o = plan.blocks["BLOCK_O"]
    own = {GRAD_X: {"STEPS": cdiv(outs, block_o)}, PRODUCT: {"SLICES": plan.slices}}
    constants = {**own.get(name, {}), "EVEN_O": outs % block_o == 0, **plan.blocks}
    of_rows = cdiv(rows, plan.blocks["BLOCK_M"])
    of_added = () if name == PRODUCT else (stride_a,)
    numbers = (stride_g, stride_x, stride_w, *of_added, rows, outs, of_rows, plan.per_group)
    return Launcher(kernel, plan.groups * plan.slices, numbers, constants, config.options)


@lru_cache(maxsize=4096)
def _finish(
    kernel: Any, shape: tuple[int, int, int], parts: tuple[int, int], device: torch.device,
    layouts: tuple[Layout | None, ...],
) -> Launcher:  # fmt: skip
    groups, outs, channels = shape
    most = min(MOST_PARTS, power_of_two(max(parts)))
    constants = {"C": channels, **FINISH, "BLOCK_P": most}
    programs = outs * cdiv(channels, FINISH["BLOCK_C"])
    if parts != (0, 0):
        programs += cdiv(channels, FINISH["BLOCK_N"])
    options = {"num_warps": 4, "num_stages": 1}
    return Launcher(kernel, programs, (groups, *parts, outs), constants, options)


def _fitted(config: Config, problem: Problem) -> dict[str, int]:
    """The block sizes of a table, no larger than the problem, and whole rows."""
    blocks = {"BLOCK_O": WIDEST_HELD, **config.blocks}
    for name, size in (("BLOCK_M", problem.rows), ("BLOCK_O", problem.outs)):
        blocks[name] = min(blocks[name], max(SMALLEST_BLOCK, power_of_two(size)))
    return {**blocks, "C": problem.channels, "BLOCK_C": padded(problem.channels)}
