"""Triangle multiplication on the host: memory, the order of the kernels, and products by torch.

Between forward and backward a and b are kept, beside the statistics of both norms. The backward
pass has one buffer: a little more than two tensors of the size of z, in which everything that is
one after the other takes the place of what is no longer needed. Its layout, in channels of all
pairs, with ``gap`` a part of C::

    [ 0 .. gap )       [ gap .. C )    [ C .. C + gap )    [ C + gap .. 2 C + gap )
                   x, then its gradient                     sums of weights_out
      the gradient of a                sums of weights_in   the gradient of b

With dropout the gradient of the update lies where that of b will, and the sums of weights_out are
in front of x. The gradient of a moves ``gap`` channels down: as many at a time are multiplied, and
what is written lies where the products before have read.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from megafold.ops.launcher import ALIGNMENT
from megafold.ops.layer_norm.launch import as_rows
from megafold.ops.sizes import cdiv
from megafold.ops.sums import add_sums
from megafold.ops.triangle_multiplication import launch
from megafold.ops.triangle_multiplication.dropout import Dropout, as_read, multiply
from megafold.ops.triangle_multiplication.function import dtype_of
from megafold.ops.triangle_multiplication.launch import Problem

# A part of the channels is no smaller: room for the sums of the weights' gradients, which take
# 16.5 MiB where 132 multiprocessors have 128 rows and as many channels each, or twice 64.
PART_BYTES = 17 * 2**20
MOST_PARTS = 4  # that the channels are multiplied in

OPERANDS = (
    "z", "norm_in_weight", "norm_in_bias", "p_in_weight", "g_in_weight",
    "norm_out_weight", "norm_out_bias", "p_out_weight", "g_out_weight",
)  # fmt: skip
NORM_IN, NORM_OUT = OPERANDS[1:3], OPERANDS[5:7]
WEIGHTS_IN, WEIGHTS_OUT = OPERANDS[3:5], OPERANDS[7:]

Operands = dict[str, torch.Tensor | None]


def forward(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    norm_in_weight: torch.Tensor | None,
    norm_in_bias: torch.Tensor | None,
    p_in_weight: torch.Tensor,
    g_in_weight: torch.Tensor,
    norm_out_weight: torch.Tensor | None,
    norm_out_bias: torch.Tensor | None,
    p_out_weight: torch.Tensor,
    g_out_weight: torch.Tensor,
    dropout: torch.Tensor | None,
    outgoing: bool,
    eps: float,
    residual: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output ``[B, N, N, C]``, and what backward needs.

    That is: a and b, channels first, ``[2 C, M]``; and the statistics of z and of x, fp32
    ``[2, 2, M]``.
    """
    problem = _problem(z)
    of, channels, pairs = p_in_weight, problem.channels, problem.pairs
    out = torch.empty(z.shape, dtype=dtype_of(z, of.dtype, residual), device=z.device)
    edges = torch.empty((2 * channels, pairs), dtype=of.dtype, device=z.device)
    stats = torch.empty((2, 2, pairs), dtype=torch.float32, device=z.device)
    if not pairs:
        return out, edges, stats
    rows, mask = as_rows(z), _flat(mask)
    norm_in = _packed(norm_in_weight), _packed(norm_in_bias)
    norm_out = _packed(norm_out_weight), _packed(norm_out_bias)
    p_in, g_in, p_out, g_out = (
        w.contiguous() for w in (p_in_weight, g_in_weight, p_out_weight, g_out_weight)
    )
    launch.launch_project(problem, rows, mask, *norm_in, p_in, g_in, edges, stats[0], eps)
    x = torch.empty((channels, pairs), dtype=of.dtype, device=z.device)
    _multiply(edges, problem, outgoing, x)
    launch.launch_output(
        problem, x, rows, *norm_in, *norm_out, p_out, g_out, stats[0], as_read(dropout, z.shape),
        residual, out, stats[1], eps,
    )  # fmt: skip
    return out, edges, stats


def backward(
    grad: torch.Tensor,
    z: torch.Tensor,
    mask: torch.Tensor | None,
    norm_in_weight: torch.Tensor | None,
    norm_in_bias: torch.Tensor | None,
    p_in_weight: torch.Tensor,
    g_in_weight: torch.Tensor,
    norm_out_weight: torch.Tensor | None,
    norm_out_bias: torch.Tensor | None,
    p_out_weight: torch.Tensor,
    g_out_weight: torch.Tensor,
    dropout: torch.Tensor | None,
    edges: torch.Tensor,
    stats: torch.Tensor,
    outgoing: bool,
    residual: bool,
    asked: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradients asked for of :data:`OPERANDS`, in this order."""
    given = (
        z, norm_in_weight, norm_in_bias, p_in_weight, g_in_weight,
        norm_out_weight, norm_out_bias, p_out_weight, g_out_weight,
    )  # fmt: skip
    operands = dict(zip(OPERANDS, given, strict=True))
    wanted = [name for name, one in zip(OPERANDS, asked, strict=True) if one]
    if not grad.numel():
        return [torch.zeros_like(operands[name]) for name in wanted]
    problem = _problem(z)
    ready = {
        name: _packed(t) if t is None or t.dim() == 1 else t.contiguous()
        for name, t in operands.items()
        if name != "z"
    }
    ready["z"] = as_rows(z)
    run = _Backward(problem, ready, _flat(mask), edges, stats, outgoing, frozenset(wanted))
    found = run(as_rows(grad), as_read(dropout, z.shape), residual)
    return [found[name].view(operands[name].shape).to(operands[name].dtype) for name in wanted]


class _Backward:
    """One backward pass: its operands, its buffer, and the gradients it has found."""

    def __init__(
        self,
        problem: Problem,
        operands: Operands,  # z as rows, the others with numbers side by side
        mask: torch.Tensor | None,
        edges: torch.Tensor,
        stats: torch.Tensor,
        outgoing: bool,
        wanted: frozenset[str],
    ) -> None:
        self.problem, self.operands, self.mask = problem, operands, mask
        self.edges, self.stats, self.outgoing, self.wanted = edges, stats, outgoing, wanted
        self.channels, self.pairs = problem.channels, problem.pairs
        self.weight = operands["p_in_weight"]
        self.gap = cdiv(self.channels, parts(problem, self.weight.element_size()))
        self.work = self._empty((2 * self.channels + self.gap, self.pairs), self.weight.dtype)
        self.found: dict[str, torch.Tensor] = {}

    def __call__(
        self, grad: torch.Tensor, dropout: Dropout, residual: bool
    ) -> dict[str, torch.Tensor]:
        """Gradients by name: all that are wanted, and perhaps some that came with them."""
        of_z = self._asks("z", *NORM_IN)
        inner = of_z or self._asks(*WEIGHTS_IN)
        # The gradient of z takes the place of what goes into it by way of the gates.
        z = self.operands["z"]
        grad_gate = self._empty((self.pairs, self.channels), z.dtype) if of_z else None
        if dropout.tensor is None:
            self._through_output(grad, grad_gate, inner, self.work[self.channels + self.gap :])
        else:
            of_update = self.work[self.channels + self.gap :].view(self.pairs, self.channels)
            multiply(grad, dropout, self.problem.tokens, of_update)
            self._through_output(of_update, grad_gate, inner, self.work[: self.gap])
        if inner:
            self._through_product()
            self._through_input(grad_gate, grad if residual else None)
        return self.found

    def _through_output(
        self,
        grad: torch.Tensor,  # of the update
        grad_gate: torch.Tensor | None,
        inner: bool,
        spare: torch.Tensor,  # of the buffer
    ) -> None:
        """The gradient of x where x was, those of the gates, and of the parameters behind x."""
        o, channels, problem = self.operands, self.channels, self.problem
        x = self.work[self.gap : self.gap + channels]
        _multiply(self.edges, problem, self.outgoing, x)
        operands = (
            grad, x, o["z"], o["norm_in_weight"], o["norm_in_bias"], o["norm_out_weight"],
            o["norm_out_bias"], o["p_out_weight"], o["g_out_weight"], *self.stats,
        )  # fmt: skip
        if self._asks(*WEIGHTS_OUT):
            weights = o["p_out_weight"], o["g_out_weight"]
            own = launch.own(launch.WEIGHTS_OUT, problem, o["z"], *weights, grad, x)
            splits = launch.splits_of(launch.WEIGHTS_OUT, problem, self.weight, own)
            sums = self._sums(spare, splits, 2, channels, channels)
            launch.launch_weights_out(problem, *operands, sums, own)
            self._find(WEIGHTS_OUT, sums)
        if inner or self._asks(*NORM_OUT):
            grad_x = x if inner else None
            weights = o["p_out_weight"], o["g_out_weight"]
            own = self._asks(*NORM_OUT) and None not in (grad_x, grad_gate)
            own = own and launch.own(launch.GRAD_X, problem, o["z"], *weights, grad, x, grad_gate)
            sums = self._norm_sums(NORM_OUT, launch.GRAD_X, own)
            launch.launch_grad_x(problem, *operands, grad_x, grad_gate, sums, own)
            self._find(NORM_OUT, sums)

    def _through_product(self) -> None:
        """The gradients of a and b for that of x, part by part of the channels."""
        a, b = (_matrices(t, self.problem) for t in self.edges.chunk(2))
        work, batch, behind = _matrices(self.work, self.problem), self.problem.batch, self.channels
        for start in range(0, self.channels, self.gap):
            many = min(self.gap, self.channels - start)
            part = slice(batch * start, batch * (start + many))
            of_x = work[batch * (start + self.gap) :][: batch * many]
            of_a = work[part]
            of_b = work[batch * (behind + self.gap + start) :][: batch * many]
            if self.outgoing:  # x = a b^T
                torch.bmm(of_x, b[part], out=of_a)
                torch.bmm(of_x.transpose(1, 2), a[part], out=of_b)
            else:  # x = a^T b
                torch.bmm(b[part], of_x.transpose(1, 2), out=of_a)
                torch.bmm(a[part], of_x, out=of_b)

    def _through_input(
        self,
        grad_gate: torch.Tensor | None,
        past: torch.Tensor | None,  # the gradient of z that comes past the update
    ) -> None:
        """The gradients of z, of the norm in front, and of the weights behind it."""
        o, channels, problem = self.operands, self.channels, self.problem
        of_norm = o["z"], self.mask, o["norm_in_weight"], o["norm_in_bias"]
        weights = o["p_in_weight"], o["g_in_weight"]
        if self._asks(*WEIGHTS_IN):
            own = launch.own(launch.WEIGHTS_IN, problem, o["z"], *weights, self.work)
            splits = launch.splits_of(launch.WEIGHTS_IN, problem, self.weight, own)
            spare = self.work[channels : channels + self.gap]
            sums = self._sums(spare, splits, 2, 2 * channels, channels)
            launch.launch_weights_in(
                problem, self.work, *of_norm, *weights, self.stats[0], sums, self.gap, own
            )
            self._find(WEIGHTS_IN, sums)
        if grad_gate is not None:
            grad_z = grad_gate if self._asks("z") else None
            weights = *weights, o["g_out_weight"]
            own = self._asks(*NORM_IN) and grad_z is not None
            own = own and launch.own(launch.GRAD_Z, problem, o["z"], *weights, self.work, grad_z)
            sums = self._norm_sums(NORM_IN, launch.GRAD_Z, own)
            launch.launch_grad_z(
                problem, self.work, grad_gate, *of_norm, *weights, self.stats[0],
                None if grad_z is None else past, grad_z, sums, self.gap, own,
            )  # fmt: skip
            self._find(NORM_IN, sums)
            self.found["z"] = grad_gate

    def _find(self, names: Sequence[str], sums: torch.Tensor | None) -> None:
        """Add up ``[many, 2, ..]``, what the programs found for two parameters, in order."""
        if sums is None:
            return
        for i, name in enumerate(names):
            if self._asks(name):  # each in memory of its own, as results of an operator must be
                self.found[name] = self._empty(sums.shape[2:], self.operands[name].dtype)
                add_sums(sums[:, i], self.found[name])

    def _asks(self, *names: str) -> bool:
        return not self.wanted.isdisjoint(names)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.weight.device)

    def _norm_sums(self, names: Sequence[str], kernel: str, own: bool) -> torch.Tensor | None:
        """Memory for what a kernel's programs sum for a norm, where that is asked for."""
        if not self._asks(*names):
            return None
        many = launch.sums_of(kernel, self.problem, self.weight, own)
        return self._empty((many, 2, self.channels), torch.float32)

    def _sums(self, spare: torch.Tensor, *shape: int) -> torch.Tensor:
        """Memory for sums in fp32: what is spare of the buffer, where that is enough."""
        flat = spare.view(-1)
        begin = -flat.storage_offset() % ALIGNMENT  # numbers: no less aligned than bytes need
        end = begin + prod(shape) * torch.float32.itemsize // flat.element_size()
        if end > flat.numel():
            return self._empty(shape, torch.float32)
        return flat[begin:end].view(torch.float32).view(shape)


def parts(problem: Problem, size: int) -> int:
    """In how many parts the channels are multiplied, so that one is not much of the memory."""
    found, of_z = 1, problem.pairs * problem.channels * size
    while found < MOST_PARTS and of_z // (2 * found) >= PART_BYTES:
        found *= 2
    return found


def _multiply(edges: torch.Tensor, problem: Problem, outgoing: bool, x: torch.Tensor) -> None:
    """Fill x ``[C, M]`` with the product of a and b over triangles.

    (Given where to write, products have the dtype of their operands under autocast, too.)
    """
    a, b = (_matrices(t, problem) for t in edges.chunk(2))
    left, right = (a, b.transpose(1, 2)) if outgoing else (a.transpose(1, 2), b)
    torch.bmm(left, right, out=_matrices(x, problem))


def _problem(z: torch.Tensor) -> Problem:
    return Problem(z.shape[0], z.shape[1], z.shape[3])


def _matrices(t: torch.Tensor, problem: Problem) -> torch.Tensor:
    """A tensor with channels first as matrices ``[C B, N, N]``, a view."""
    return t.view(-1, problem.tokens, problem.tokens)


def _flat(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.reshape(-1).contiguous()


def _packed(vector: torch.Tensor | None) -> torch.Tensor | None:
    """A vector with its numbers side by side."""
    return vector if vector is None or vector.stride(0) == 1 else vector.contiguous()
