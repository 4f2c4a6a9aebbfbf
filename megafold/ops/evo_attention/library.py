"""EvoAttention as PyTorch operators: what torch.compile, autograd and opcheck see of it.

Registered operators go through PyTorch's dispatcher several times, which takes longer than the
kernels of one small attention. So a call that nobody traces takes the short way: an
``autograd.Function`` with the same forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from megafold.ops.evo_attention import launch

_LIBRARY = torch.library.Library("megafold", "FRAGMENT")
_LIBRARY.define(
    "evo_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? pair_bias, float scale) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(
    "evo_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, "
    "Tensor? pair_bias, Tensor out, Tensor stats, float scale, bool[] asked) -> Tensor[]"
)
_LIBRARY.impl("evo_attention", launch.forward, "CompositeExplicitAutograd")
_LIBRARY.impl("evo_attention_backward", launch.backward, "CompositeExplicitAutograd")


@torch.library.register_fake("megafold::evo_attention", lib=_LIBRARY)
def _(q, k, v, mask, pair_bias, scale):
    batch, rows, queries, heads, _ = q.shape
    stats = q.new_empty((2, batch * rows, heads, queries), dtype=torch.float32)
    return q.new_empty(q.shape), stats


@torch.library.register_fake("megafold::evo_attention_backward", lib=_LIBRARY)
def _(grad, q, k, v, mask, pair_bias, out, stats, scale, asked):
    return [t.new_empty(t.shape) for t, one in zip((q, k, v, pair_bias), asked, strict=True) if one]


def _save(ctx, inputs, output) -> None:
    q, k, v, mask, pair_bias, ctx.scale = inputs
    out, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, mask, pair_bias, out, stats)


def _gradients(ctx, grad: torch.Tensor | None, _stats: None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    q, k, v, mask, pair_bias, out, stats = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    asked = [wanted[0], wanted[1], wanted[2], wanted[4]]
    # With a graph of the backward pass: the operator, which refuses a second derivative.
    traced = torch.is_grad_enabled() or _traced(grad)
    backward = torch.ops.megafold.evo_attention_backward if traced else launch.backward
    found = iter(backward(grad, q, k, v, mask, pair_bias, out, stats, ctx.scale, asked))
    of_q, of_k, of_v, of_bias = (next(found) if one else None for one in asked)
    return of_q, of_k, of_v, None, of_bias, None


def _no_double_backward(ctx, *grads: Sequence[torch.Tensor]) -> None:
    raise NotImplementedError(
        "evo_attention's Triton kernels have no second derivative; "
        'compute it with the PyTorch implementation: with megafold.ops.use("torch")'
    )


torch.library.register_autograd(
    "megafold::evo_attention", _gradients, setup_context=_save, lib=_LIBRARY
)
torch.library.register_autograd(
    "megafold::evo_attention_backward", _no_double_backward, lib=_LIBRARY
)


_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


class _Attention(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        # Not in a `setup_context`: with one, PyTorch inspects the signature in every call.
        output = launch.forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)


def _traced(*tensors: torch.Tensor | None) -> bool:
    """Whether something has to see the operator itself: a compiler, a mode, a kind of tensor."""
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or not all(type(tensor) in _PLAIN for tensor in tensors)
    )


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    pair_bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attention by the kernels; arguments validated, of one half type or fp32."""
    call = (
        torch.ops.megafold.evo_attention if _traced(q, k, v, mask, pair_bias) else _Attention.apply
    )
    return call(q, k, v, mask, pair_bias, scale)[0]
