"""What a call launches: every kernel with its arguments, run or recorded without being run.

Recorded, on tensors of the device ``meta``, is how a kernel is known as a call has it compiled
where there is no GPU; run, it is how one kernel of a call is launched again by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from megafold.ops import launcher as launcher_module
from megafold.ops.launcher import Launcher
from megafold.ops.variants import KernelVariant

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    launcher: Launcher
    tensors: tuple[torch.Tensor | None, ...]
    compiled: Any  # by Triton; None where nothing ran, and in the interpreter

    @property
    def kernel(self) -> str:
        """The kernel as tables of block sizes name it: folder and function, transition.forward."""
        function = self.launcher.kernel.fn
        operator = function.__module__.split(".")[-2]
        return f"{operator}.{function.__name__.removesuffix('_kernel')}"

    def again(self) -> Any:
        """Launch it once more, on the same tensors."""
        return self.launcher(*self.tensors)

    def variant(self, called: str) -> KernelVariant:
        """The kernel as this launch has it compiled, under a name of its own."""
        of = self.launcher
        names, constants = of.kernel.arg_names, dict(of.constants)
        signature, multiples = {}, set()
        for name, value in zip(names, (*self.tensors, *of.numbers), strict=False):
            signature[name] = _type(value)
            if signature[name] == "constexpr":
                constants[name] = value
            elif isinstance(value, int) and value % 16 == 0:
                multiples.add(name)
        return KernelVariant(
            name=called,
            kernel=of.kernel,
            signature={name: signature.get(name, "constexpr") for name in names},
            constants={
                argument: constants[argument] for argument in names if argument in constants
            },
            num_warps=of.options["num_warps"],
            num_stages=of.options.get("num_stages", 1),
            max_registers=of.options.get("maxnreg"),
            multiples_of_16=frozenset(multiples),
        )


@contextmanager
def launches(*, run: bool) -> Iterator[list[Launch]]:
    """Every launch inside, in order. For the whole process: not beside a call in another thread.

    Args:
        run: whether the kernels run; if not, the operators take tensors of the device ``meta``.
    """
    found: list[Launch] = []
    launch = Launcher.__call__

    def kept(of: Launcher, *tensors: torch.Tensor | None) -> Any:
        compiled = launch(of, *tensors) if run else None
        found.append(Launch(of, tensors, compiled))
        return compiled

    with (
        mock.patch.object(Launcher, "__call__", kept),
        mock.patch.object(launcher_module, "recording", not run),
    ):
        yield found


def recorded(call: Callable[[], object], name: str = "") -> list[KernelVariant]:
    """Every kernel that ``call`` launches, as it has it compiled, in the order of first launch.

    The host's own code runs, so that what is compiled here is what is launched there.

    Args:
        call: what launches them, on tensors of the device ``meta``.
        name: follows that of the kernel in the name of each variant.
    """
    with launches(run=False) as found:
        call()
    variants: dict[Launcher, KernelVariant] = {}
    for launch in found:
        if launch.launcher in variants:
            continue
        earlier = any(v.kernel is launch.launcher.kernel for v in variants.values())
        words = (launch.kernel, name, "again" if earlier else "")
        variants[launch.launcher] = launch.variant(" ".join(word for word in words if word))
    return list(variants.values())


def distinct(variants: Iterable[KernelVariant]) -> list[KernelVariant]:
    """Without those that compile to the same as one before them."""
    first: dict[tuple[object, ...], KernelVariant] = {}
    for v in variants:
        options = (v.num_warps, v.num_stages, v.max_registers, v.multiples_of_16)
        first.setdefault((v.kernel, *v.signature.items(), *v.constants.items(), *options), v)
    return list(first.values())


def _type(value: object) -> str:
    """The type Triton compiles for; what it knows when it compiles (None, 1) is a constant."""
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if hasattr(value, "block_shape"):  # as TMA reads a tensor: Gluon's descriptor
        element = _POINTERS[value.base.dtype].removeprefix("*")
        block = ", ".join(str(size) for size in value.block_shape)
        return f"tensordesc<{element}[{block}],{value.layout!r}>"
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1:
        return "constexpr"
    return "i32" if value < 2**31 else "i64"
