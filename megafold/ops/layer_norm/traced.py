"""Which of PyTorch's machinery a call has to go through: its dispatcher, autograd, neither."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


def traced(*tensors: torch.Tensor | None) -> bool:
    """Whether something has to see the operator itself: a compiler, a mode, a kind of tensor."""
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or not all(type(tensor) in _PLAIN for tensor in tensors)
    )


def differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd has to see the call, if only to refuse it (it has no forward mode)."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
