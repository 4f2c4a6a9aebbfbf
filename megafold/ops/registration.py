"""Operators of two passes as PyTorch sees them: torch.compile, autograd and ``opcheck``.

A registered operator goes through PyTorch's dispatcher several times, which takes longer than the
kernels of a small call. So a call that nobody traces takes the short way: an
``autograd.Function`` on the same two passes, or without gradients the forward pass itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

_LIBRARY = torch.library.Library("megafold", "FRAGMENT")
CONSTANT = ("mask", "dropout")  # operands without a gradient
_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))

Outputs = torch.Tensor | tuple[torch.Tensor, ...]  # the output alone, or with what is kept


@dataclass(frozen=True)
class Passes:
    """An operator's two passes on the host, and what goes in and out, as schemas write it.

    ``forward(*operands, *options)`` returns the output and what is kept; if that is nothing, the
    output itself. ``backward(grad, *operands, *kept, *some options, asked)`` returns the gradients
    asked for, of the operands that can have one, in their order; the output is the first kept
    where it is.
    """

    name: str
    operands: Sequence[str]  # "Tensor x", "Tensor? norm_weight"; "mask", "dropout": no gradient
    options: Sequence[str]  # "float eps"
    kept: Sequence[str]  # "Tensor stats": what forward returns beside the output
    forward: Callable[..., Outputs]
    backward: Callable[..., list[torch.Tensor]]
    fake: Callable[..., Outputs]  # what forward returns, not computed
    for_backward: Sequence[str] = ()  # names of the options that backward takes
    keeps_output: bool = False
    # The operand that the rest is added to. Its gradient is that of the output, so that it is not
    # kept, and backward neither takes nor answers for it.
    added: str | None = None
    laid_out: Sequence[str] = ()  # whose gradients lie in memory as they do; others contiguous


def register(of: Passes) -> Callable[..., Any]:
    """Register ``megafold::<name>`` and ``megafold::<name>_backward``.

    Returns:
        What calls the forward pass by the shortest way: ``(*operands, *options)`` to what that
        returns.
    """
    names = [operand.split()[-1] for operand in of.operands]
    kept_operands = [i for i, name in enumerate(names) if name != of.added]
    with_gradient = [i for i in kept_operands if names[i] not in CONSTANT]
    added = None if of.added is None else names.index(of.added)
    many, options = len(names), [option.split()[-1] for option in of.options]
    passed_on = [options.index(name) for name in of.for_backward]
    out = ["Tensor out"] if of.keeps_output else []
    results = ", ".join(["Tensor"] * (1 + len(of.kept)))
    _LIBRARY.define(f"{of.name}({', '.join((*of.operands, *of.options))}) -> ({results})")
    operands = [of.operands[i] for i in kept_operands]
    given = ["Tensor grad", *operands, *out, *of.kept, *(of.options[i] for i in passed_on)]
    _LIBRARY.define(f"{of.name}_backward({', '.join(given)}, bool[] asked) -> Tensor[]")
    _LIBRARY.impl(of.name, of.forward, "CompositeExplicitAutograd")
    _LIBRARY.impl(f"{of.name}_backward", of.backward, "CompositeExplicitAutograd")
    as_operator = getattr(torch.ops.megafold, of.name)
    backward_as_operator = getattr(torch.ops.megafold, f"{of.name}_backward")

    def fake_gradients(grad: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
        *tensors, asked = rest
        given = dict(zip(kept_operands, tensors, strict=False))
        return [
            torch.empty_like(given[i])
            if names[i] in of.laid_out
            else given[i].new_empty(given[i].shape)
            for i, one in zip(with_gradient, asked, strict=True)
            if one
        ]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        result, *kept = output if of.kept else (output,)
        if added is not None and inputs[added] is not None:
            ctx.added_dtype = inputs[added].dtype
        ctx.passed_on = [inputs[many + i] for i in passed_on]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        operands = (inputs[i] for i in kept_operands)
        ctx.save_for_backward(*operands, *([result] if of.keeps_output else []), *kept)

    def gradients(ctx: Any, grad: torch.Tensor | None, *_kept: None) -> tuple[Any, ...]:
        found: list[torch.Tensor | None] = [None] * (many + len(options))
        if grad is not None:
            asked = [ctx.needs_input_grad[i] for i in with_gradient]
            if any(asked):
                # With a graph of the backward pass: the operator, which refuses a second
                # derivative.
                seen = torch.is_grad_enabled() or traced(grad)
                backward = backward_as_operator if seen else of.backward
                computed = iter(backward(grad, *ctx.saved_tensors, *ctx.passed_on, asked))
                for i, one in zip(with_gradient, asked, strict=True):
                    if one:
                        found[i] = next(computed)
            if added is not None and ctx.needs_input_grad[added]:
                found[added] = grad.to(ctx.added_dtype)
        return tuple(found)

    def no_second_derivative(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{of.name}'s Triton kernels have no second derivative; "
            'compute it with the PyTorch implementation: with megafold.ops.use("torch")'
        )

    class ShortWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            # Not in a `setup_context`: with one, PyTorch inspects the signature in every call.
            output = of.forward(*inputs)
            save(ctx, inputs, output)
            return output

        backward = staticmethod(gradients)

    own, its_backward = f"megafold::{of.name}", f"megafold::{of.name}_backward"
    torch.library.register_fake(own, of.fake, lib=_LIBRARY)
    torch.library.register_fake(its_backward, fake_gradients, lib=_LIBRARY)
    torch.library.register_autograd(own, gradients, setup_context=save, lib=_LIBRARY)
    torch.library.register_autograd(its_backward, no_second_derivative, lib=_LIBRARY)

    def call(*inputs: Any) -> Any:
        operands = inputs[:many]
        if traced(*operands):
            return as_operator(*inputs)
        if differentiated(*operands):
            return ShortWay.apply(*inputs)
        return of.forward(*inputs)

    return call


def traced(*tensors: torch.Tensor | None) -> bool:
    """Whether something has to see the operator itself: a compiler, a mode, a kind of tensor."""
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or not all(type(tensor) in _PLAIN for tensor in tensors)
    )


def differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd has to see the call, if only to refuse it (it has no forward mode)."""
    return forward_ad._current_level >= 0 or has_gradient(*tensors)


def has_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a call has a backward pass that something may be kept for."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
