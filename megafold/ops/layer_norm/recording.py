"""Kernels as calls have them compiled, found out on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from megafold.ops.variants import KernelVariant

MULTIPROCESSORS = 132  # of an H100; how much a program does goes by their number

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
}


def recorded(
    call: Callable[[], object], launches: Mapping[ModuleType, tuple[str, ...]], name: str
) -> list[KernelVariant]:
    """Every kernel that ``call`` launches, as it has it compiled, in the order of first launch.

    The host's own code runs, with the kernels replaced, so that what is compiled here is what
    is launched there. Not beside a call in another thread.

    Args:
        call: what launches them, on tensors of the device ``meta``.
        launches: the modules of the host's code, with the kernels as they name them.
        name: follows that of the kernel in the name of each variant.
    """
    found: list[KernelVariant] = []
    with ExitStack() as stack:
        for module, kernels in launches.items():
            if hasattr(module, "multiprocessors"):
                stand_in = mock.patch.object(module, "multiprocessors")
                stack.enter_context(stand_in).return_value = MULTIPROCESSORS
            for kernel in kernels:
                recorder = _Recorder(getattr(module, kernel), name, found)
                stack.enter_context(mock.patch.object(module, kernel, recorder))
        call()
    return found


def distinct(variants: Iterable[KernelVariant]) -> list[KernelVariant]:
    """Without those that compile to the same as one before them."""
    first: dict[tuple[object, ...], KernelVariant] = {}
    for v in variants:
        options = (v.num_warps, v.num_stages, v.max_registers, v.multiples_of_16)
        first.setdefault((v.kernel, *v.signature.items(), *v.constants.items(), *options), v)
    return list(first.values())


class _Recorder:
    """Stands in for a kernel, and keeps what it is launched with."""

    def __init__(self, function: Any, name: str, found: list[KernelVariant]) -> None:
        self.function, self.arg_names = function, function.arg_names
        operator = function.fn.__module__.split(".")[-2]  # the folder
        kernel = function.fn.__name__.removesuffix("_kernel")
        self._name, self._found = f"{operator}.{kernel} {name}", found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., _Recorder]:
        return self._launch

    def _launch(self, *arguments: object, **named: Any) -> _Recorder:
        if not named:  # launched before: a `Launcher` goes straight to what is compiled
            return self
        constants = {name: v for name, v in named.items() if name in self.arg_names}
        signature, multiples = {}, set()
        for name, value in zip(self.arg_names, arguments, strict=False):
            signature[name] = _type(value)
            if signature[name] == "constexpr":
                constants[name] = value
            elif isinstance(value, int) and value % 16 == 0:
                multiples.add(name)
        earlier = sum(variant.kernel is self.function for variant in self._found)
        self._found.append(
            KernelVariant(
                name=f"{self._name} again" if earlier else self._name,
                kernel=self.function,
                signature={name: signature.get(name, "constexpr") for name in self.arg_names},
                constants={name: constants[name] for name in self.arg_names if name in constants},
                num_warps=named["num_warps"],
                num_stages=named["num_stages"],
                max_registers=named.get("maxnreg"),
                multiples_of_16=frozenset(multiples),
            )
        )
        return self


def _type(value: object) -> str:
    """The type Triton compiles for; what it knows when it compiles (None, 1) is a constant."""
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1:
        return "constexpr"
    return "i32" if value < 2**31 else "i64"
