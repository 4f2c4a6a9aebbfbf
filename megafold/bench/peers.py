"""What a user could run instead: implementations of an operator from elsewhere in PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

from megafold import ops
from megafold.bench.accuracy import Function
from megafold.bench.cases import Case, Inputs


class Unavailable(Exception):
    """This implementation does not compute this case here, and the message says why."""


def implementation(name: str, case: Case) -> Function:
    """The function from inputs to output that the implementation ``name`` runs.

    Args:
        name: ``"megafold"`` (whatever ``ops.use`` says), ``"eager"`` (the reference),
            ``"compile"`` (the reference under torch.compile), ``"sdpa"``
            (``scaled_dot_product_attention``, its mask materialised), ``"flex"``
            (FlexAttention), or where they are installed ``"cuequivariance"``
            (``cuequivariance_torch.triangle_attention``, version 0.13) and ``"trifast"``
            (``trifast.triangle_attention``, version 0.1.13).

    Raises:
        ValueError: unknown name.
        Unavailable: it does not compute this case, or is not installed. The function that is
            returned raises it too, for inputs of a dtype that it does not compute.
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


def _cuequivariance(case: Case) -> Function:
    attention = _triangle_attention("cuequivariance_torch", case)

    def run(inputs: Inputs) -> torch.Tensor:
        q, k, v = (inputs[name].transpose(2, 3) for name in "qkv")  # [B, S, H, N, D]
        # Elsewhere it runs PyTorch, as its documentation says, and tells nobody.
        widest, step = (32, 4) if q.dtype == torch.float32 else (128, 8)
        if q.shape[-1] > widest or q.shape[-1] % step:
            raise Unavailable(f"cuEquivariance has no kernel for {q.dtype} and D {q.shape[-1]}")
        batch, rows = q.shape[:2]
        bias = inputs["pair_bias"].expand(batch, -1, -1, -1)[:, None]  # [B, 1, H, N, K]
        mask = inputs["mask"].expand(batch, rows, -1)[:, :, None, None]  # [B, S, 1, 1, K]
        try:
            return attention(q, k, v, bias, mask).transpose(2, 3)
        except ImportError as error:  # its kernels are a package of their own
            raise Unavailable(f"cuEquivariance's kernels do not load here: {error}") from error

    return run


def _trifast(case: Case) -> Function:
    attention = _triangle_attention("trifast", case)
    _, rows, queries, _, width = case.arguments["q"].shape
    keys = case.arguments["k"].shape[2]
    if not rows == queries == keys:
        raise Unavailable(
            f"trifast computes squares of pairs alone, not {rows} rows of {queries} x {keys}"
        )
    if width < 16 or width & (width - 1):
        raise Unavailable(f"trifast takes powers of two from 16 for D, not {width}")

    def run(inputs: Inputs) -> torch.Tensor:
        q, k, v = (inputs[name].permute(0, 3, 1, 2, 4) for name in "qkv")  # [B, H, N, N, D]
        batch = q.shape[0]
        bias = inputs["pair_bias"].expand(batch, -1, -1, -1)  # [B, H, N, N]
        left_out = ~inputs["mask"].expand(batch, rows, -1)  # [B, N, N], True = do not attend
        return attention(q, k, v, bias, left_out).permute(0, 2, 3, 1, 4)

    return run


def _triangle_attention(package: str, case: Case) -> Callable[..., torch.Tensor]:
    """The function of this name in a package that need not be installed."""
    if case.op != "evo_attention":
        raise Unavailable(f"{package} does not compute {case.op}")
    try:
        return importlib.import_module(package).triangle_attention
    except ImportError as error:
        raise Unavailable(f"{package} is not installed, or does not load: {error}") from error


PEERS: dict[str, Callable[[Case], Function]] = {
    "megafold": _megafold,
    "eager": _eager,
    "compile": _compile,
    "sdpa": _sdpa,
    "flex": _flex,
    "cuequivariance": _cuequivariance,
    "trifast": _trifast,
}


def peers_of(op: str) -> tuple[str, ...]:
    """The implementations that compute an operator, by name."""
    return tuple(PEERS) if op == "evo_attention" else ("megafold", "eager", "compile")


def backend_in_force(case: Case, inputs: Inputs) -> ops.Choice:
    """What ``"megafold"`` runs for this case, and why."""
    return ops.explain(case.op, **inputs, **case.options)
