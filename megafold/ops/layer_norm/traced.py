"""Whether a call has to go through PyTorch's dispatcher."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


def traced(*tensors: torch.Tensor | None) -> bool:
    """Whether something has to see the operator itself: a compiler, a mode, a kind of tensor."""
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or not all(type(tensor) in _PLAIN for tensor in tensors)
    )
