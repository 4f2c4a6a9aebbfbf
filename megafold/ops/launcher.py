"""Launch a Triton kernel again and again without Triton's search for what it has compiled.

Before every launch Triton looks at every argument to find the variant it has compiled; with the
strides of five tensors that takes longer than a small kernel runs. A :class:`Launcher` is for
calls whose arguments are alike in all that Triton looks at: the first launch goes through
Triton, the others go straight to the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from megafold.ops.interpreter import interpreted, replace_language_once

Layout = tuple[tuple[int, ...], torch.dtype, bool]

_HERE = nullcontext()
ALIGNMENT = 16  # bytes; Triton compiles another variant for pointers that are less aligned
# Whether launches are recorded and nothing runs (`megafold.ops.recording`): tensors then need no
# memory.
recording = False


class Launcher:
    """A kernel with its grid and every argument that is no tensor.

    Args:
        kernel: a ``@triton.jit`` function; its parameters are tensors, numbers, constants, in
            this order.
        programs: size of the grid, which has one dimension.
        numbers: the arguments between the tensors and the constants.
        constants: the ``tl.constexpr`` arguments by name.
        options: ``num_warps`` and the like.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        numbers: tuple[float | int, ...],
        constants: Mapping[str, Any],
        options: Mapping[str, int],
    ) -> None:
        self.kernel, self.grid = kernel, (programs, 1, 1)
        self.numbers, self.constants, self.options = numbers, constants, options
        ordered = [constants[name] for name in kernel.arg_names if name in constants]
        self._rest = (*numbers, *ordered)
        self._compiled: Any = None
        if interpreted():
            replace_language_once()

    def __call__(self, *tensors: torch.Tensor | None) -> Any:
        """Launch on the current device and stream; returns what Triton compiled.

        Args:
            tensors: alike, from call to call, in their :func:`layout`.
        """
        if self._compiled is None:  # always so in the interpreter, which compiles nothing
            self._compiled = self.kernel[self.grid](
                *tensors, *self.numbers, **self.constants, **self.options
            )
        else:
            self._compiled[self.grid](*tensors, *self._rest)
        return self._compiled


def layout(tensor: torch.Tensor | None) -> Layout | None:
    """All of a tensor, beside its shape, that decides which compiled kernel fits."""
    if tensor is None:
        return None
    return tensor.stride(), tensor.dtype, tensor.data_ptr() % ALIGNMENT == 0


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` the one that kernels are launched on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)
