"""The transition's forward and backward pass, for both plans: chunks, products, sums."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from megafold.ops.checks import autocast_enabled
from megafold.ops.transition import launch
from megafold.ops.transition.elementwise import (
    gate_backward_kernel,
    gate_forward_kernel,
    swiglu_backward_kernel,
    swiglu_forward_kernel,
)
from megafold.ops.transition.launch import Problem


def forward(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    gate: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    eps: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output ``[..., C]`` and the statistics of the norm, fp32 ``[2, M]``.

    Args:
        x: ``[..., C]``, any strides, any dtype that Triton takes.
        gate, value, out: ``[H, C]``, ``[H, C]``, ``[C, H]`` of the dtype that products have.
        eps: of the norm; None: there is none, and no statistics.
    """
    problem = Problem.of(x, gate)
    y = torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    norm = eps is not None
    stats = torch.empty((2 * norm, problem.rows), dtype=torch.float32, device=x.device)
    if not problem.rows or not problem.hidden:
        return y.zero_(), stats.zero_()
    flat_x, flat_y = _by_rows(x), _by_rows(y)
    norm_weight, norm_bias, gate, value, out = _contiguous(norm_weight, norm_bias, gate, value, out)
    if launch.fused(problem.channels, gate.dtype):
        parameters = norm_weight, norm_bias, gate, value, out
        launch.launch_forward(flat_x, *parameters, flat_y, stats if norm else None, eps)
        return y, stats
    with _as_given(x.device):
        for rows in _chunks(flat_x, gate, problem.channels * norm + 2 * problem.hidden):
            of_x = _part(flat_x, rows)
            normalised = _normalised(of_x, gate.dtype, norm)
            if norm:
                of_stats = stats if of_x is flat_x else stats[:, rows]
                launch.launch_norm_forward(of_x, norm_weight, norm_bias, normalised, of_stats, eps)
            hidden = F.linear(normalised, gate)
            values = F.linear(normalised, value)
            launch.launch_elementwise(swiglu_forward_kernel, hidden, values, hidden)
            torch.mm(hidden, out.t(), out=_part(flat_y, rows))
            del normalised, hidden, values  # before the next chunk's are made
    return y, stats


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
    asked: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradients asked for of x, both of the norm's and the three weights, in this order."""
    problem = Problem.of(x, gate)
    arguments = (x, norm_weight, norm_bias, gate, value, out)
    if not problem.rows or not problem.hidden:
        return [_empty(t).zero_() for t, one in zip(arguments, asked, strict=True) if one]
    for_x, for_weight, for_bias, *for_products = asked
    grad_x = _empty(x) if for_x else None
    totals: list[torch.Tensor | None] = [None, None, None]
    sums: torch.Tensor | None = None  # fp32 [2, C], for the norm's weight and bias
    one_chunk = _fused_chunk if launch.fused(problem.channels, gate.dtype) else _products_chunk
    flat_x, flat_grad = _by_rows(x), _by_rows(grad)
    flat_grad_x = None if grad_x is None else _by_rows(grad_x)
    parameters = _contiguous(norm_weight, norm_bias, gate, value, out)
    per_row = 2 * problem.channels + 3 * problem.hidden
    if one_chunk is _fused_chunk and not any(for_products):
        per_row = 0  # nothing is written but the result
    with _as_given(x.device):
        for rows in _chunks(flat_x, gate, per_row):
            of_x, of_grad = _part(flat_x, rows), _part(flat_grad, rows)
            of_stats = None
            if eps is not None:
                of_stats = stats if of_x is flat_x else stats[:, rows]
            normalised, hidden, of_chunk = one_chunk(
                of_x,
                parameters,
                of_stats,
                eps,
                of_grad,
                None if flat_grad_x is None else _part(flat_grad_x, rows),
                for_weight or for_bias,
                any(for_products),
            )
            if of_chunk is not None:
                of_chunk = of_chunk.sum(dim=0)
                sums = of_chunk if sums is None else sums.add_(of_chunk)
            if hidden is not None:
                totals = _plus_products(totals, for_products, normalised, of_grad, hidden)
            del normalised, hidden  # before the next chunk's are made
    of_norm = (None, None)
    if sums is not None:  # results of an operator share no memory
        dtype = x.dtype if norm_weight is None else norm_weight.dtype
        of_norm = (sums[0].to(dtype, copy=True), sums[1].to(dtype, copy=True))
    found = zip(arguments, (grad_x, *of_norm, *totals), asked, strict=True)
    return [_as(gradient, of.dtype) for of, gradient, one in found if one]


Hidden = Sequence[torch.Tensor]  # the activation and the gradients of gate and value, [rows, H]


def _fused_chunk(
    x, parameters, stats, eps, grad, grad_x, want_sums, want_hidden
) -> tuple[torch.Tensor | None, Hidden | None, torch.Tensor | None]:
    """By the fused kernel: what :func:`_products_chunk` gives, where it is wanted."""
    normalised = hidden = None
    dtype, units = parameters[2].dtype, parameters[2].shape[0]
    if want_hidden:
        normalised = _normalised(x, dtype, stats is not None)
        hidden = torch.empty((3, x.shape[0], units), dtype=dtype, device=x.device)
    written = None if stats is None else normalised
    _, sums = launch.launch_grad_rows(
        x, *parameters, stats, grad, grad_x, want_sums, written, hidden
    )
    return normalised, None if hidden is None else hidden.unbind(), sums


def _products_chunk(
    x, parameters, stats, eps, grad, grad_x, want_sums, want_hidden
) -> tuple[torch.Tensor, Hidden, torch.Tensor | None]:
    """Fill ``grad_x`` for a chunk of rows, by products.

    Returns the normalised rows, what is hidden, and sums ``[programs, 2, C]`` for the norm's
    weight and bias.
    """
    norm_weight, norm_bias, gate, value, out = parameters
    normalised = _normalised(x, gate.dtype, stats is not None)
    if stats is not None:
        launch.launch_norm_forward(x, norm_weight, norm_bias, normalised, None, eps)
    of_gate, of_value = F.linear(normalised, gate), F.linear(normalised, value)
    activation = torch.mm(grad, out)  # its gradient, until the kernel replaces it
    launch.launch_elementwise(swiglu_backward_kernel, activation, of_gate, of_value)
    hidden = (activation, of_gate, of_value)
    if grad_x is None and not want_sums:
        return normalised, hidden, None
    of_normalised = torch.mm(of_gate, gate).addmm_(of_value, value)
    sums = None
    if stats is not None:
        _, sums = launch.launch_norm_backward(
            of_normalised, x, norm_weight, stats, grad_x, want_sums
        )
    else:
        grad_x.copy_(of_normalised)
    return normalised, hidden, sums


def gate_forward(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``sigmoid(gate) * x``, both contiguous; gate is repeated along the leading dimensions."""
    out = _empty(x)
    if x.numel():
        launch.launch_elementwise(gate_forward_kernel, x, gate, out, period=gate.numel())
    return out


def gate_backward(
    grad: torch.Tensor, x: torch.Tensor, gate: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and gate for that of :func:`gate_forward`'s result."""
    grad_x, grad_gate = _empty(x), _empty(x)
    if not x.numel():
        return grad_x, torch.zeros_like(gate)
    launch.launch_elementwise(
        gate_backward_kernel, grad.contiguous(), x, gate, grad_x, grad_gate, period=gate.numel()
    )
    if gate.numel() == x.numel():
        return grad_x, grad_gate.view(gate.shape)
    return grad_x, grad_gate.view(-1, *gate.shape).sum(dim=0)


def _by_rows(x: torch.Tensor) -> torch.Tensor:
    """``[M, C]`` with neighbours of a row neighbours in memory; a copy only where it must be."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _part(flat: torch.Tensor, rows: slice) -> torch.Tensor:
    """A chunk of rows; the tensor itself where that is all of them."""
    return flat if rows.stop - rows.start == flat.shape[0] else flat[rows]


def _contiguous(*parameters: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Parameters as the kernels read them; their copies are small."""
    return [None if p is None else p.contiguous() for p in parameters]


def _chunks(flat_x: torch.Tensor, gate: torch.Tensor, elements_per_row: int):
    size = gate.element_size()
    return launch.chunks(flat_x.shape[0], elements_per_row * size, flat_x.numel() * size)


def _normalised(x: torch.Tensor, dtype: torch.dtype, norm: bool) -> torch.Tensor:
    """Where normalised rows go; the rows themselves where there is no norm."""
    return torch.empty(x.shape, dtype=dtype, device=x.device) if norm else x.to(dtype)


def _plus_products(
    totals: Sequence[torch.Tensor | None],
    asked: Sequence[bool],
    normalised: torch.Tensor,
    grad: torch.Tensor,
    hidden: Hidden,
) -> list[torch.Tensor | None]:
    """The gradients of the three weights with a chunk's share added, where they are asked for."""
    activation, of_gate, of_value = hidden
    products = (of_gate, normalised), (of_value, normalised), (grad, activation)
    return [
        _plus_product(total, *product) if one else None
        for total, one, product in zip(totals, asked, products, strict=True)
    ]


def _plus_product(
    total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """``total + left^T right``; from the second chunk on the total is kept in fp32."""
    if total is None:
        return torch.mm(left.t(), right)
    if left.dtype == torch.float32:
        return total.addmm_(left.t(), right)
    return _as(total, torch.float32).add_(torch.mm(left.t(), right))


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _empty(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _as_given(device: torch.device) -> AbstractContextManager[object]:
    """Products in the dtype of their operands, also where the caller is under autocast."""
    if not autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
