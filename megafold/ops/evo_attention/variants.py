"""The kernels of EvoAttention as calls have them compiled, found out without compiling them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from megafold.ops.evo_attention import launch
from megafold.ops.tuning import Config, Entry, tables, use_config
from megafold.ops.tuning.table import DEFAULT
from megafold.ops.variants import KernelVariant

# Triangle attention; of the default table two widths, the usual one and the largest. bf16 stands
# for fp16 as well: the two compile alike.
HEADS, TOKENS = 4, 384
WIDTHS = (32, 128)
DTYPES = {32: torch.float32, 16: torch.bfloat16}
MULTIPROCESSORS = 132  # of an H100; some kernels get more or fewer rows by their number

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
}


def variants() -> list[KernelVariant]:
    """Every kernel with the block sizes of every table, for compiling ahead of time."""
    default = [e for e in tables()[DEFAULT] if e.kernel in launch.KERNELS]
    found = [_shipped(e, f"D{e.sizes['D']}") for e in default if e.sizes["D"] in WIDTHS]
    sharing: dict[int, list[str]] = {}  # devices that have one table
    for device, entries in tables().items():
        sharing.setdefault(id(entries), []).append(device)
    for devices in sharing.values():
        if devices != [DEFAULT]:
            ours = [e for e in tables()[devices[0]] if e.kernel in launch.KERNELS]
            named = [_shipped(e, f"{_key(e.sizes)} {devices[0]}") for e in ours]
            found += [replace(v, devices=tuple(devices)) for v in _distinct(named)]
    return found


def block_names(kernel: str) -> tuple[str, ...]:
    """The block arguments of a kernel, as its configurations name them.

    Raises:
        ValueError: unknown kernel.
    """
    for entry in tables()[DEFAULT]:
        if kernel in launch.KERNELS and entry.kernel == kernel:
            return tuple(entry.blocks)
    raise ValueError(f"unknown kernel {kernel!r}; choose one of {launch.KERNELS}")


def variant(
    kernel: str,
    config: Config,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    pair_bias: torch.Tensor | None = None,
) -> KernelVariant:
    """One kernel as a call on such tensors has it compiled, with every gradient asked for.

    Args:
        kernel: one of ``launch.KERNELS``.
        config: every block argument of the kernel.
        q, k, v, mask, pair_bias: as for ``megafold.ops.evo_attention``, on the device ``meta``.

    Raises:
        ValueError: unknown kernel, or other block arguments than it has.
        LookupError: such a call does not launch this kernel.
    """
    names = block_names(kernel)
    if set(config.blocks) != set(names):
        raise ValueError(f"{kernel} has the blocks {names}, not {tuple(config.blocks)}")
    with use_config(kernel, config):
        launched = _launches(q, k, v, mask, pair_bias)
    if kernel not in launched:
        raise LookupError(f"a call on q {tuple(q.shape)} does not launch {kernel}")
    function, constants = launched[kernel].function, dict(launched[kernel].constants)
    signature, multiples = {}, set()
    for name, value in zip(function.arg_names, launched[kernel].arguments, strict=False):
        signature[name] = _type(value)
        if signature[name] == "constexpr":
            constants[name] = value
        elif isinstance(value, int) and value % 16 == 0:
            multiples.add(name)
    return KernelVariant(
        name=f"{kernel} {str(q.dtype).removeprefix('torch.')}",
        kernel=function,
        signature={name: signature.get(name, "constexpr") for name in function.arg_names},
        constants={name: constants[name] for name in function.arg_names if name in constants},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        max_registers=config.max_registers,
        multiples_of_16=frozenset(multiples),
    )


class _Recorder:
    """Stands in for a kernel, and keeps what it is launched with."""

    def __init__(self, function: Any) -> None:
        self.function, self.arg_names = function, function.arg_names
        self.arguments: tuple[object, ...] | None = None  # None until it is launched
        self.constants: dict[str, object] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., _Recorder]:
        return self._launch

    def _launch(self, *arguments: object, **named: object) -> _Recorder:
        self.arguments = arguments
        self.constants = {name: v for name, v in named.items() if name in self.arg_names}
        return self


def _launches(q, k, v, mask, pair_bias) -> dict[str, _Recorder]:
    """What one forward and backward pass launches, by the names of the kernels.

    The host's own code runs, on tensors without memory and with the kernels replaced, so that
    what is compiled here is what is launched there. Not beside a call in another thread.
    """
    recorders = {kernel: _Recorder(getattr(launch, _function(kernel))) for kernel in launch.KERNELS}
    stand_ins = {_function(kernel): recorder for kernel, recorder in recorders.items()}
    scale = q.shape[-1] ** -0.5
    with mock.patch.multiple(launch, multiprocessors=lambda device: MULTIPROCESSORS, **stand_ins):
        out, stats = launch.forward(q, k, v, mask, pair_bias, scale)
        asked = (True, True, True, pair_bias is not None)
        launch.backward(out, q, k, v, mask, pair_bias, out, stats, scale, asked)
    return {kernel: r for kernel, r in recorders.items() if r.arguments is not None}


def _function(kernel: str) -> str:
    return f"{kernel.rpartition('.')[2]}_kernel"


def _shipped(entry: Entry, key: str) -> KernelVariant:
    """An entry of a table at the sizes it was measured at; a default one on triangle attention."""
    dtype, width = DTYPES[entry.bits], entry.sizes["D"]
    rows, queries, keys = (entry.sizes.get(name, TOKENS) for name in "RNK")
    q = torch.empty(1, rows, queries, HEADS, width, dtype=dtype, device="meta")
    k = torch.empty(1, rows, keys, HEADS, width, dtype=dtype, device="meta")
    mask = torch.empty(1, rows, keys, dtype=torch.bool, device="meta")
    bias = torch.empty(1, HEADS, queries, keys, dtype=torch.float32, device="meta")
    config = Config(entry.blocks, entry.num_warps, entry.num_stages, entry.max_registers)
    of = variant(entry.kernel, config, q, k, k, mask, bias)
    return replace(of, name=f"{of.name} {key}")


def _distinct(shipped: list[KernelVariant]) -> list[KernelVariant]:
    """Without those that compile to the same as one before them."""
    first: dict[tuple[object, ...], KernelVariant] = {}
    for v in shipped:
        options = (v.num_warps, v.num_stages, v.max_registers, v.multiples_of_16)
        first.setdefault((v.kernel, *v.signature.items(), *v.constants.items(), *options), v)
    return list(first.values())


def _key(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{name}{size}" for name, size in sizes.items())


def _type(value: object) -> str:
    """The type Triton compiles for; what it knows when it compiles (None, 1) is a constant."""
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1:
        return "constexpr"
    return "i32" if value < 2**31 else "i64"
