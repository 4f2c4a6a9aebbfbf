"""Autograd for operators whose backward pass writes over what they kept, where it is the last.

Gate and value are the most that a transition keeps. Where autograd frees them after the backward
pass anyhow, their gradients take their place; where it keeps the graph (``retain_graph``), or
where something sees the operator, whose arguments stay as they are, they have memory of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megafold.ops.registration import Passes, register, traced

# PyTorch's own compiled backward passes ask it, too. True outside of a backward pass.
_graph_stays = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def register_keeping(of: Passes) -> Callable[..., torch.Tensor]:
    """Register an operator as :func:`register` does, all of its operands with a gradient.

    Its backward pass takes ``last`` beside: whether it may write over what was kept.

    Returns:
        What calls it where :func:`has_gradient` says so: ``(*operands, *options)`` to the output.
    """
    many = len(of.operands)
    options = [option.split()[-1] for option in of.options]
    passed_on = [many + options.index(name) for name in of.for_backward]
    as_operator = register(of)
    backward_as_operator = getattr(torch.ops.megafold, f"{of.name}_backward")

    class ShortWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
            output, *kept = of.forward(*inputs)
            ctx.without = len(inputs) - many
            ctx.passed_on = [inputs[i] for i in passed_on]
            ctx.save_for_backward(*inputs[:many], *kept)
            return output

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            asked = list(ctx.needs_input_grad[:many])
            # With a graph of the backward pass: the operator, which refuses a second derivative.
            if torch.is_grad_enabled() or traced(grad):
                found = backward_as_operator(grad, *ctx.saved_tensors, *ctx.passed_on, asked)
            else:
                last = not _graph_stays()
                found = of.backward(grad, *ctx.saved_tensors, *ctx.passed_on, asked, last=last)
            computed = iter(found)
            return *(next(computed) if one else None for one in asked), *[None] * ctx.without

    def call(*inputs: Any) -> torch.Tensor:
        if traced(*inputs[:many]):
            return as_operator(*inputs)[0]
        return ShortWay.apply(*inputs)

    return call
