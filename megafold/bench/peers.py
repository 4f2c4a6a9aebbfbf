"""What a user could run instead: implementations of an operator from elsewhere in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megafold import ops
from megafold.bench.accuracy import Function
from megafold.bench.cases import Case, Inputs


class Unavailable(Exception):
    """This implementation does not compute this operator."""


def implementation(name: str, case: Case) -> Function:
    """The function from inputs to output that the implementation ``name`` runs.

    Args:
        name: ``"megafold"`` (whatever ``ops.use`` says), ``"eager"`` (the reference),
            ``"compile"`` (the reference under torch.compile), ``"sdpa"``
            (``scaled_dot_product_attention``, its mask materialised) or ``"flex"``
            (FlexAttention).

    Raises:
        ValueError: unknown name.
        Unavailable: it does not compute this operator.
    """
    if name not in PEERS:
        raise ValueError(f"unknown implementation {name!r}; choose one of {tuple(PEERS)}")
    return PEERS[name](case)


def _megafold(case: Case) -> Function:
    return case.run


def _eager(case: Case) -> Function:
    return case.run_reference


def _compile(case: Case) -> Function:
    return torch.compile(case.run_reference, dynamic=False)


def _sdpa(case: Case) -> Function:
    if case.op != "evo_attention":
        raise Unavailable(f"scaled_dot_product_attention does not compute {case.op}")

    def run(inputs: Inputs) -> torch.Tensor:
        q, k, v = (inputs[name].flatten(0, 1).transpose(1, 2) for name in "qkv")
        batch, rows = inputs["q"].shape[:2]
        bias = inputs["pair_bias"].to(q.dtype)[:, None].expand(batch, rows, -1, -1, -1)
        mask = inputs["mask"].expand(batch, rows, -1)[:, :, None, None, :]
        logits_added = bias.masked_fill(~mask, float("-inf")).flatten(0, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=logits_added)
        return out.transpose(1, 2).unflatten(0, (batch, rows))

    return run


def _flex(case: Case) -> Function:
    if case.op != "evo_attention":
        raise Unavailable(f"FlexAttention does not compute {case.op}")
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def run(inputs: Inputs) -> torch.Tensor:
        batch, rows = inputs["q"].shape[:2]
        mask = inputs["mask"].expand(batch, rows, -1).flatten(0, 1)
        bias = inputs["pair_bias"].expand(batch, -1, -1, -1)

        def score(logit, b, h, i, j):
            return torch.where(mask[b, j], logit + bias[b // rows, h, i, j], -float("inf"))

        q, k, v = (inputs[name].flatten(0, 1).transpose(1, 2) for name in "qkv")
        out = compiled(q, k, v, score_mod=score)
        return out.transpose(1, 2).unflatten(0, (batch, rows))

    return run


PEERS: dict[str, Callable[[Case], Function]] = {
    "megafold": _megafold,
    "eager": _eager,
    "compile": _compile,
    "sdpa": _sdpa,
    "flex": _flex,
}


def peers_of(op: str) -> tuple[str, ...]:
    """The implementations that compute an operator, by name."""
    return tuple(PEERS) if op == "evo_attention" else ("megafold", "eager", "compile")


def backend_in_force(case: Case, inputs: Inputs) -> ops.Choice:
    """What ``"megafold"`` runs for this case, and why."""
    return ops.explain(case.op, **inputs, **case.options)
