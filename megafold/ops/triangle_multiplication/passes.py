"""Triangle multiplication on the host: memory, the order of the kernels, and products by torch.

Between forward and backward a and b are kept, beside the statistics of both norms. The backward
pass has one buffer: a little more than two tensors of the size of z, in which everything that is
one after the other takes the place of what is no longer needed. Its layout, in channels of all
pairs, with ``gap`` a part of C::

    [ 0 .. gap )       [ gap .. C )    [ C .. C + gap )    [ C + gap .. 2 C + gap )
                   x, then its gradient                     scratch of grad_output
      the gradient of a                 scratch of          the gradient of b
                                        grad_input

The gradient of a moves ``gap`` channels down: as many at a time are multiplied, and what is
written lies where the products before have read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megafold.ops.layer_norm.launch import as_rows
from megafold.ops.sizes import cdiv
from megafold.ops.triangle_multiplication import launch
from megafold.ops.triangle_multiplication.launch import Problem

# Of what the kernels write for the gradients of the weights: about what an L2 cache keeps.
SCRATCH_BYTES = 24 * 2**20
CHUNK_STEP = 256  # pairs that chunks begin at multiples of: whole blocks, aligned
MOST_PARTS = 4  # that the channels are multiplied in

OPERANDS = (
    "z", "norm_in_weight", "norm_in_bias", "p_in_weight", "g_in_weight",
    "norm_out_weight", "norm_out_bias", "p_out_weight", "g_out_weight",
)  # fmt: skip
INNER = (*OPERANDS[:5], "g_out_weight")  # whose gradients come out of grad_input

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
    outgoing: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output ``[B, N, N, C]`` in the dtype of the weights, and what backward needs.

    That is: a and b, channels first, ``[2 C, M]``; and the statistics of z and of x, fp32
    ``[2, 2, M]``.
    """
    problem = _problem(z)
    of, channels, pairs = p_in_weight, problem.channels, problem.pairs
    out = torch.empty(z.shape, dtype=of.dtype, device=z.device)
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
        problem, x, rows, *norm_in, *norm_out, p_out, g_out, stats[0], out, stats[1], eps
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
    edges: torch.Tensor,
    stats: torch.Tensor,
    outgoing: bool,
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
    found = run(as_rows(grad))
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
        self.work = self._empty(2 * self.channels + self.gap, self.pairs)
        self.found: dict[str, torch.Tensor] = {}

    def __call__(self, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gradients by name: all that are wanted, and perhaps some that came with them."""
        inner = self._asks(*INNER)
        # The gradient of z takes the place of what goes into it by way of the gates.
        grad_gate = None
        if inner:
            grad_gate = self._empty(self.pairs, self.channels, dtype=self.operands["z"].dtype)
        self._through_output(grad, grad_gate)
        if inner:
            self._through_product()
            self._through_input(grad_gate)
        return self.found

    def _through_output(self, grad: torch.Tensor, grad_gate: torch.Tensor | None) -> None:
        """The gradient of x where x was, those of the gates, and of the parameters behind x."""
        o, channels = self.operands, self.channels
        x = self.work[self.gap : self.gap + channels]
        _multiply(self.edges, self.problem, self.outgoing, x)
        of_weight = self._asks("p_out_weight")
        sums = None
        if self._asks("norm_out_weight", "norm_out_bias"):
            programs = launch.programs_of(launch.GRAD_OUTPUT, self.problem, self.weight)
            sums = self._empty(programs, 2, channels, dtype=torch.float32)
        scratch, step = None, self.pairs
        if of_weight:
            scratch, step = self._scratch(self.work[channels + self.gap :], 2 * channels)
        products = []
        for first, rows in _chunks(self.pairs, step):
            grad_u = y = None
            if of_weight:
                grad_u, y = scratch[: 2 * rows * channels].view(2, rows, channels)
            launch.launch_grad_output(
                self.problem, grad, x, o["z"], o["norm_in_weight"], o["norm_in_bias"],
                o["norm_out_weight"], o["norm_out_bias"], o["p_out_weight"], o["g_out_weight"],
                *self.stats, x if grad_gate is not None else None, grad_gate, grad_u, y, sums,
                first, rows,
            )  # fmt: skip
            if of_weight:
                product = self._empty(channels, channels)
                products.append(torch.mm(grad_u.t(), y, out=product))
        if sums is not None:
            self._found_norm("norm_out", sums)
        if of_weight:
            self.found["p_out_weight"] = _total(products)

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

    def _through_input(self, grad_gate: torch.Tensor) -> None:
        """The gradients of z, of the norm in front, and of the weights behind it."""
        o, channels = self.operands, self.channels
        of_weights = self._asks("p_in_weight", "g_in_weight", "g_out_weight")
        sums = None
        if self._asks("norm_in_weight", "norm_in_bias"):
            programs = launch.programs_of(launch.GRAD_INPUT, self.problem, self.weight)
            sums = self._empty(programs, 2, channels, dtype=torch.float32)
        scratch, step = None, self.pairs
        if of_weights:
            scratch, step = self._scratch(self.work[channels : channels + self.gap], 6 * channels)
        products = []
        for first, rows in _chunks(self.pairs, step):
            of_projected = n = None
            if of_weights:
                both = scratch[: 6 * channels * rows].view(6 * channels, rows)
                of_projected, n = both[: 5 * channels], both[5 * channels :]
            launch.launch_grad_input(
                self.problem, self.work, grad_gate, o["z"], self.mask, o["norm_in_weight"],
                o["norm_in_bias"], o["p_in_weight"], o["g_in_weight"], o["g_out_weight"],
                self.stats[0], grad_gate if self._asks("z") else None, of_projected, n, sums,
                self.gap, first, rows,
            )  # fmt: skip
            if of_weights:
                product = self._empty(5 * channels, channels)
                products.append(torch.mm(of_projected, n.t(), out=product))
        self.found["z"] = grad_gate
        if sums is not None:
            self._found_norm("norm_in", sums)
        if of_weights:
            sizes = (2 * channels, 2 * channels, channels)
            names = ("p_in_weight", "g_in_weight", "g_out_weight")
            # Copies, for the results of an operator may share no memory.
            apart = (t.clone() for t in _total(products).split(sizes))
            self.found |= dict(zip(names, apart, strict=True))

    def _found_norm(self, name: str, sums: torch.Tensor) -> None:
        """Add up the programs' shares of a norm's parameters, fp32 ``[programs, 2, C]``."""
        for i, parameter in enumerate(("weight", "bias")):
            self.found[f"{name}_{parameter}"] = sums[:, i].sum(dim=0)

    def _asks(self, *names: str) -> bool:
        return not self.wanted.isdisjoint(names)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.weight.dtype, device=self.weight.device)

    def _scratch(self, spare: torch.Tensor, per_pair: int) -> tuple[torch.Tensor, int]:
        """Memory for ``per_pair`` numbers of each pair of a chunk, and how many pairs those are.

        What is spare of the buffer, where that is not much less than there should be.
        """
        enough = SCRATCH_BYTES // self.weight.element_size() // per_pair
        step = CHUNK_STEP * max(1, enough // CHUNK_STEP)
        there = CHUNK_STEP * (spare.numel() // per_pair // CHUNK_STEP)
        if 2 * there >= min(step, self.pairs):
            return spare.reshape(-1), min(there, step)
        return self._empty(per_pair * min(step, self.pairs)), step


def parts(problem: Problem, size: int) -> int:
    """In how many parts the channels are multiplied, so that one is not much of the memory."""
    found, of_z = 1, problem.pairs * problem.channels * size
    while found < MOST_PARTS and 3 * of_z // (4 * found) >= SCRATCH_BYTES:
        found *= 2
    return found


def _chunks(pairs: int, step: int) -> Iterator[tuple[int, int]]:
    """First pair and number of pairs of every chunk."""
    return ((first, min(step, pairs - first)) for first in range(0, pairs, step))


def _multiply(edges: torch.Tensor, problem: Problem, outgoing: bool, x: torch.Tensor) -> None:
    """Fill x ``[C, M]`` with the product of a and b over triangles.

    (Given where to write, products have the dtype of their operands under autocast, too.)
    """
    a, b = (_matrices(t, problem) for t in edges.chunk(2))
    left, right = (a, b.transpose(1, 2)) if outgoing else (a.transpose(1, 2), b)
    torch.bmm(left, right, out=_matrices(x, problem))


def _total(products: list[torch.Tensor]) -> torch.Tensor:
    """The sum of the chunks' products, in order and in fp32."""
    if len(products) == 1:
        return products[0]
    return torch.stack(products).sum(dim=0, dtype=torch.float32)


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
