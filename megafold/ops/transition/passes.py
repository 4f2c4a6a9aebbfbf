"""The transition's forward and backward pass, for both plans: chunks, products, sums."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from megafold.ops.checks import autocast_enabled
from megafold.ops.hopper import readable
from megafold.ops.precision import in_full_fp32
from megafold.ops.sizes import cdiv
from megafold.ops.transition import hopper, launch
from megafold.ops.transition.elementwise import (
    swiglu_backward_kernel,
    swiglu_forward_kernel,
)
from megafold.ops.transition.launch import Problem

# The library may add up all terms of a product in fp32 one by one, and the error grows with how
# many one sum takes. Eager's narrower products it may split in parts by itself. So it is given no
# fewer than these at a time, in so many parts at most.
TERMS = 64
MOST_PARTS = 4


def forward(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    gate: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    eps: float | None,
    residual: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output ``[..., C]`` and the statistics of the norm, fp32 ``[2, M]``.

    Args:
        x: ``[..., C]``, any strides, any dtype that Triton takes.
        gate, value, out: ``[H, C]``, ``[H, C]``, ``[C, H]`` of the dtype that products have.
        eps: of the norm; None: there is none, and no statistics.
        residual: whether x is added to the update.
    """
    problem = Problem.of(x, gate)
    y = torch.empty(x.shape, dtype=dtype_of(x, gate, residual), device=x.device)
    norm = eps is not None
    stats = torch.empty((2 * norm, problem.rows), dtype=torch.float32, device=x.device)
    if not problem.rows or not problem.hidden:
        return _without_update(y, x, residual), stats.zero_()
    flat_x, flat_y = by_rows(x), by_rows(y)
    norm_weight, norm_bias, gate, value, out = _contiguous(norm_weight, norm_bias, gate, value, out)
    if launch.fused(problem.channels, gate.dtype):
        parameters = norm_weight, norm_bias, gate, value, out
        of_norm = stats if norm else None
        launch.launch_forward(flat_x, *parameters, flat_y, of_norm, eps, residual)
        return y, stats
    both = torch.cat([gate, value])  # one product
    with as_given(x.device):
        for rows in _chunks(flat_x, gate, problem.channels * norm + 2 * problem.hidden):
            of_x = _part(flat_x, rows)
            normalised = _normalised(of_x, gate.dtype, norm)
            if norm:
                of_stats = stats if of_x is flat_x else stats[:, rows]
                launch.launch_norm_forward(of_x, norm_weight, norm_bias, normalised, of_stats, eps)
            pairs = _product(normalised, both.t())
            activation = pairs[:, : problem.hidden]  # in gate's place
            launch.launch_swiglu(swiglu_forward_kernel, pairs, activation)
            added = of_x if residual else None
            _product_into(_part(flat_y, rows), activation, out.t(), added)
            del normalised, pairs, activation  # before the next chunk's are made
    return y, stats


def forward_keeping(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    gate: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    eps: float | None,
    residual: bool = False,
) -> tuple[torch.Tensor, ...]:
    """By products, all rows at once: the output, and what :func:`backward_from_kept` needs.

    Returns:
        The output ``[..., C]``; the norm's statistics, fp32 ``[2, M]``; the normalised rows
        ``[M, C]`` (without a norm neither); gate and value of each row, ``[M, 2 H]``; their
        weights as one, ``[2 H, C]``.
    """
    problem, norm = Problem.of(x, gate), eps is not None
    y = torch.empty(x.shape, dtype=dtype_of(x, gate, residual), device=x.device)
    stats = torch.empty((2 * norm, problem.rows), dtype=torch.float32, device=x.device)
    both = torch.cat([gate, value])
    normalised = gate.new_empty((problem.rows * norm, problem.channels))
    if not problem.rows or not problem.hidden:
        pairs = gate.new_empty((problem.rows, 2 * problem.hidden))
        zeros = stats.zero_(), normalised.zero_()
        return _without_update(y, x, residual), *zeros, pairs, both
    flat_x = by_rows(x)
    norm_weight, norm_bias, out = _contiguous(norm_weight, norm_bias, out)
    if norm:
        launch.launch_norm_forward(flat_x, norm_weight, norm_bias, normalised, stats, eps)
    with as_given(x.device):
        pairs = _product(normalised if norm else flat_x.to(gate.dtype), both.t())
        activation = gate.new_empty((problem.rows, problem.hidden))
        launch.launch_swiglu(swiglu_forward_kernel, pairs, activation)
        _product_into(by_rows(y), activation, out.t(), flat_x if residual else None)
    return y, stats, normalised, pairs, both


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    gate: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    eps: float | None,
    residual: bool,
    asked: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradients asked for of x, both of the norm's and the three weights, in this order."""
    problem = Problem.of(x, gate)
    arguments = (x, norm_weight, norm_bias, gate, value, out)
    if not problem.rows or not problem.hidden:
        return _gradients_without_update(grad, arguments, residual, asked)
    grad_x = _empty(x) if asked[0] else None
    flat_grad_x = None if grad_x is None else by_rows(grad_x)
    parameters = _contiguous(norm_weight, norm_bias, gate, value, out)
    plan = _fused_backward if launch.fused(problem.channels, gate.dtype) else _products_backward
    of_parameters = plan(
        by_rows(x),
        parameters,
        stats if eps is not None else None,
        eps,
        by_rows(grad),
        residual,
        flat_grad_x,
        asked[1:],
    )
    found = zip(arguments, (grad_x, *of_parameters), asked, strict=True)
    return [_as(gradient, of.dtype) for of, gradient, one in found if one]


def backward_from_kept(
    grad: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    gate: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    normalised: torch.Tensor,
    pairs: torch.Tensor,
    both: torch.Tensor,
    residual: bool,
    asked: Sequence[bool],
    *,
    last: bool = False,
    room: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """What :func:`backward` returns, from what :func:`forward_keeping` did.

    Args:
        last: nobody needs ``pairs`` after this: their gradients are written over them.
        room: without a norm: what the gradient of x is written over, ``[M, C]`` in its dtype; or
            None.
    """
    problem, norm = Problem.of(x, gate), stats.shape[0] > 0
    arguments = (x, norm_weight, norm_bias, gate, value, out)
    if not problem.rows or not problem.hidden:
        return _gradients_without_update(grad, arguments, residual, asked)
    for_x, for_weight, for_bias, for_gate, for_value, for_out = asked
    flat_x, upstream = by_rows(x), by_rows(grad)
    flat_grad = _as(upstream, gate.dtype)
    added = upstream if residual and for_x else None
    norm_weight, out = _contiguous(norm_weight, out)
    of_x = of_both = of_out = sums = None
    with as_given(x.device):
        activation = _product(flat_grad, out)  # its gradient, until the kernel replaces it
        of_pairs = pairs if last else _empty(pairs)
        launch.launch_swiglu(swiglu_backward_kernel, pairs, activation, of_pairs)
        if for_out:
            of_out = _plus_product(None, flat_grad, activation)
        del activation
        if for_gate or for_value:
            of_both = _plus_product(None, of_pairs, normalised if norm else flat_x.to(gate.dtype))
        if for_x and not norm:
            of_x = room
            if room is None:
                of_x = torch.empty(flat_x.shape, dtype=x.dtype, device=x.device)
            _product_into(of_x, of_pairs, both, added)
        elif for_x or for_weight or for_bias:
            of_x = _product(of_pairs, both)  # of the normalised rows
    del of_pairs, flat_grad
    if of_x is not None and norm:
        of_normalised = of_x
        if of_x.dtype != x.dtype:
            of_x = torch.empty(flat_x.shape, dtype=x.dtype, device=x.device)
        _, sums = launch.launch_norm_backward(
            of_normalised, flat_x, norm_weight, stats, added, of_x if for_x else None,
            for_weight or for_bias,
        )  # fmt: skip
    of_parameters = _apart(arguments[1:5], of_both, sums, asked[1:5])
    of_x = of_x.view(x.shape) if for_x else None
    return [g for g, one in zip((of_x, *of_parameters, of_out), asked, strict=True) if one]


Parameters = Sequence[torch.Tensor | None]  # the norm's weight and bias; of gate, value and output


def _fused_backward(
    x: torch.Tensor,
    parameters: Parameters,
    stats: torch.Tensor | None,
    eps: float | None,
    grad: torch.Tensor,
    residual: bool,
    grad_x: torch.Tensor | None,
    asked: Sequence[bool],
) -> list[torch.Tensor | None]:
    """By kernels alone: fill ``grad_x``; the gradients of the parameters that are asked for."""
    _, _, gate, value, out = parameters
    problem, size = Problem.of(x, gate), gate.element_size()
    normalised = hidden = partial = None
    of_weights = any(asked[2:])
    if (
        of_weights
        and grad_x is not None
        and not hopper.why_not(problem, x, gate.dtype, launch.GRAD_ROWS, launch.GRAD_WEIGHTS)
        and readable(x, grad, gate, value, out)
    ):
        return _hopper_backward(x, parameters, stats, grad, residual, grad_x, asked)
    plan = launch.RowsPlan.of(problem, x.device, gate.dtype)
    # Without gradients of weights nothing is written but the results.
    per_row = (problem.channels + 3 * problem.hidden) * size * of_weights
    spare = int(launch.SCRATCH_OF_X * x.numel() * size)
    parts = list(launch.chunks(problem.rows, per_row, spare, plan.wave))
    sums = plan.sums(x) if any(asked[:2]) else None
    if of_weights:  # what is hidden of a chunk; each takes the place of the one before
        longest = parts[0].stop
        by_units = launch.WeightsPlan.of(problem, longest, x.device, gate.dtype)
        partial = by_units.partial(gate)
        hidden = gate.new_empty((longest, 3 * problem.hidden))
        if stats is not None:
            normalised = gate.new_empty((longest, problem.channels))
    for rows in parts:
        here = slice(0, rows.stop - rows.start)
        of_x, upstream, of_grad_x = (_part(t, rows) for t in (x, grad, grad_x))
        of_grad = _as(upstream, gate.dtype)
        added = upstream.contiguous() if residual and grad_x is not None else None
        of_hidden, of_normalised = _part(hidden, here), _part(normalised, here)
        of_stats = stats if of_x is x or stats is None else stats[:, rows]
        launch.launch_grad_rows(
            plan, of_x, *parameters, of_stats, of_grad, added, of_grad_x, sums, of_normalised,
            of_hidden, rows.start,
        )  # fmt: skip
        if of_weights:
            right = of_x.to(gate.dtype) if of_normalised is None else of_normalised
            first = rows.start == 0
            launch.launch_grad_weights(by_units, of_hidden, right, of_grad, partial, first)
    return _reduced(problem, parameters, partial, sums, asked)


def _hopper_backward(
    x: torch.Tensor,
    parameters: Parameters,
    stats: torch.Tensor | None,
    grad: torch.Tensor,
    residual: bool,
    grad_x: torch.Tensor,
    asked: Sequence[bool],
) -> list[torch.Tensor | None]:
    """By Hopper's own kernels: what :func:`_fused_backward` does, where weights are asked for.

    All rows at once, for what is hidden is computed twice and never in memory.
    """
    _, _, gate, value, out = parameters
    problem = Problem.of(x, gate)
    normalised = sums = None
    if stats is not None:
        normalised = gate.new_empty(x.shape)
    if any(asked[:2]):
        many = hopper.sums_of(problem.rows, x.device)
        sums = x.new_empty((many, 2, problem.channels), dtype=torch.float32)
    hopper.launch_grad_rows(x, *parameters, stats, grad, grad_x, sums, normalised, residual)
    splits = hopper.splits_of(problem.rows, problem.hidden, x.device)
    shape = splits, 3 * problem.hidden, problem.channels
    partial = x.new_empty(shape, dtype=torch.float32)
    rows = x if normalised is None else normalised
    hopper.launch_grad_weights(rows, grad, gate, value, out, partial)
    return _reduced(problem, parameters, partial, sums, asked)


def _reduced(
    problem: Problem,
    parameters: Parameters,
    partial: torch.Tensor | None,
    sums: torch.Tensor | None,
    asked: Sequence[bool],
) -> list[torch.Tensor | None]:
    """The gradients asked for of the parameters, from what kernels left of them."""
    found = [_empty(p) if one else None for p, one in zip(parameters, asked, strict=True)]
    if partial is not None or sums is not None:
        of_weight, of_bias, *of_products = found
        launch.launch_reduce(problem, partial, sums, *of_products, of_weight, of_bias)
    return found


def _products_backward(
    x: torch.Tensor,
    parameters: Parameters,
    stats: torch.Tensor | None,
    eps: float | None,
    grad: torch.Tensor,
    residual: bool,
    grad_x: torch.Tensor | None,
    asked: Sequence[bool],
) -> list[torch.Tensor | None]:
    """By the library's products: what :func:`_fused_backward` does."""
    norm_weight, norm_bias, gate, value, out = parameters
    problem = Problem.of(x, gate)
    for_weight, for_bias, for_gate, for_value, for_out = asked
    both = torch.cat([gate, value])
    sums: list[torch.Tensor] = []  # of each chunk, for the norm's weight and bias
    of_both: torch.Tensor | None = None  # [2 H, C], for the weights of gate and value
    of_out: torch.Tensor | None = None
    with as_given(x.device):
        for rows in _chunks(x, gate, problem.channels + 3 * problem.hidden):
            of_x, upstream = _part(x, rows), _part(grad, rows)
            of_grad = _as(upstream, gate.dtype)
            added = upstream if residual and grad_x is not None else None
            of_stats = stats if of_x is x or stats is None else stats[:, rows]
            normalised = _normalised(of_x, gate.dtype, stats is not None)
            if stats is not None:
                launch.launch_norm_forward(of_x, norm_weight, norm_bias, normalised, None, eps)
            pairs = _product(normalised, both.t())
            activation = _product(of_grad, out)  # its gradient, until the kernel replaces it
            launch.launch_swiglu(swiglu_backward_kernel, pairs, activation, pairs)
            if for_gate or for_value:
                of_both = _plus_product(of_both, pairs, normalised)
            if for_out:
                of_out = _plus_product(of_out, of_grad, activation)
            if stats is None and grad_x is not None:
                _product_into(_part(grad_x, rows), pairs, both, added)
            elif grad_x is not None or for_weight or for_bias:
                # The normalised rows have been multiplied: their gradient takes their place.
                _product_into(normalised, pairs, both)
                _, of_chunk = launch.launch_norm_backward(
                    normalised, of_x, norm_weight, of_stats, added, _part(grad_x, rows),
                    for_weight or for_bias,
                )  # fmt: skip
                if of_chunk is not None:
                    sums.append(of_chunk)
            del normalised, pairs, activation, of_grad  # before the next chunk's are made
    together = torch.cat(sums) if len(sums) > 1 else next(iter(sums), None)
    return [*_apart(parameters[:4], of_both, together, asked[:4]), of_out]


def _apart(
    parameters: Parameters,
    of_both: torch.Tensor | None,
    sums: torch.Tensor | None,
    asked: Sequence[bool],
) -> list[torch.Tensor | None]:
    """The gradients asked for of the norm's parameters, of gate and of value.

    Tensors of their own, for results of an operator share no memory, in the parameters' dtypes.
    """
    found = [_empty(p) if one else None for p, one in zip(parameters, asked, strict=True)]
    if of_both is not None or sums is not None:
        of_weight, of_bias, of_gate, of_value = found
        launch.launch_split(of_both, sums, of_gate, of_value, of_weight, of_bias)
    return found


def dtype_of(x: torch.Tensor, gate: torch.Tensor, residual: bool) -> torch.dtype:
    """The dtype of the output, for weights as they are multiplied."""
    return torch.promote_types(x.dtype, gate.dtype) if residual else gate.dtype


def _without_update(y: torch.Tensor, x: torch.Tensor, residual: bool) -> torch.Tensor:
    """The output where there are no rows or nothing hidden."""
    return y.copy_(x) if residual else y.zero_()


def _gradients_without_update(
    grad: torch.Tensor,
    arguments: Sequence[torch.Tensor | None],
    residual: bool,
    asked: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradients asked for, of x first, for what :func:`_without_update` returns."""
    found = [_empty(t).zero_() for t, one in zip(arguments, asked, strict=True) if one]
    if residual and asked[0]:
        found[0].copy_(grad)
    return found


def gate_rows_backward(
    grad: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, *, last: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x and gate, ``[M, C]``, for that of ``sigmoid(gate) * x``.

    Args:
        last: nobody needs x after this: its gradient is written over it.

    Returns:
        Both; and the sum over rows of the second, ``[C]`` in its dtype.
    """
    grad_x, grad_gate = x if last else _empty(x), _empty(gate)
    _, sums = launch.launch_gate_rows_backward(by_rows(grad), x, gate, grad_x, grad_gate)
    total = grad_gate.new_empty(gate.shape[1:])
    launch.launch_split(None, sums, None, None, total, None)
    return grad_x, grad_gate, total


def by_rows(x: torch.Tensor) -> torch.Tensor:
    """``[M, C]`` with neighbours of a row neighbours in memory; a copy only where it must be."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _part(flat: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """A chunk of rows; the tensor itself where that is all of them."""
    if flat is None:
        return None
    return flat if rows.stop - rows.start == flat.shape[0] else flat[rows]


def _contiguous(*parameters: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Parameters as the kernels read them; their copies are small."""
    return [None if p is None else p.contiguous() for p in parameters]


def _chunks(flat_x: torch.Tensor, gate: torch.Tensor, elements_per_row: int):
    size = gate.element_size()
    most = max(launch.SCRATCH_OF_PRODUCTS, flat_x.numel() * size)
    return launch.chunks(flat_x.shape[0], elements_per_row * size, most)


def _normalised(x: torch.Tensor, dtype: torch.dtype, norm: bool) -> torch.Tensor:
    """Where normalised rows go; the rows themselves where there is no norm."""
    return torch.empty(x.shape, dtype=dtype, device=x.device) if norm else x.to(dtype)


def _plus_product(
    total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """``total + left^T right``; from the second chunk on the total is kept in fp32."""
    if total is None:
        return _product(left.t(), right)
    if left.dtype == torch.float32:
        for terms in _parts(right.shape[0], left.device):
            total.addmm_(left[terms].t(), right[terms])
        return total
    return _as(total, torch.float32).add_(torch.mm(left.t(), right))


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left right``, in their dtype."""
    result = left.new_empty((left.shape[0], right.shape[1]))
    _product_into(result, left, right)
    return result


def _product_into(
    result: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    added: torch.Tensor | None = None,
) -> None:
    """``left right`` into a tensor of any dtype, with ``added`` where that is not None."""
    alike = result.dtype == left.dtype
    if left.dtype == torch.float32 and alike:
        first, *others = _parts(right.shape[0], left.device)
        torch.mm(left[:, first], right[first], out=result)
        for terms in others:
            result.addmm_(left[:, terms], right[terms])
        if added is not None:  # last: each part would be rounded to the digits of the whole
            result.add_(added)
    elif added is None:
        if alike:
            torch.mm(left, right, out=result)
        else:
            result.copy_(_product(left, right))
    elif alike and added.dtype == left.dtype:
        torch.addmm(added, left, right, out=result)
    else:
        torch.add(added, _product(left, right), out=result)


def _parts(terms: int, device: torch.device) -> list[slice]:
    """The terms that a sum in fp32 takes at a time: all, where TF32 errs more than any sum."""
    most = MOST_PARTS if in_full_fp32(torch.float32, device) else 1
    step = max(TERMS, cdiv(terms, most))
    return [slice(start, start + step) for start in range(0, terms, step)]


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _empty(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def as_given(device: torch.device) -> AbstractContextManager[object]:
    """Products in the dtype of their operands, also where the caller is under autocast."""
    if not autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
