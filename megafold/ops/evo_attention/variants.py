"""The kernels of EvoAttention as one call has them compiled: types, constants, block sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from megafold.ops.evo_attention import launch
from megafold.ops.evo_attention.backward import grad_bias_kernel, grad_kv_kernel, grad_q_kernel
from megafold.ops.evo_attention.forward import forward_kernel
from megafold.ops.evo_attention.launch import Problem
from megafold.ops.tuning import Config, Entry, tables
from megafold.ops.tuning.table import DEFAULT
from megafold.ops.variants import KernelVariant

FUNCTIONS = {
    launch.FORWARD: forward_kernel,
    launch.GRAD_Q: grad_q_kernel,
    launch.GRAD_KV: grad_kv_kernel,
    launch.GRAD_BIAS: grad_bias_kernel,
}

# Triangle attention; of the default table two widths, the usual one and the largest. bf16 stands
# for fp16 as well: the two compile alike.
HEADS, TOKENS = 4, 384
WIDTHS = (32, 128)
DTYPES = {32: torch.float32, 16: torch.bfloat16}

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
}
_Values = dict[str, torch.Tensor | int | float | None]


def variants() -> list[KernelVariant]:
    """Every kernel with the block sizes of every table, for compiling ahead of time."""
    found: list[KernelVariant] = []
    for device, entries in tables().items():
        ours = [e for e in entries if e.kernel in FUNCTIONS]
        if device == DEFAULT:
            found += [_shipped(e, f"D{e.sizes['D']}") for e in ours if e.sizes["D"] in WIDTHS]
            continue
        named = [_shipped(e, f"{_key(e.sizes)} {device}") for e in ours]
        found += [replace(v, devices=(device,)) for v in _distinct(named)]
    return found


def block_names(kernel: str) -> tuple[str, ...]:
    """The block arguments of a kernel, as its configurations name them.

    Raises:
        ValueError: unknown kernel.
    """
    for entry in tables()[DEFAULT]:
        if entry.kernel == kernel and kernel in FUNCTIONS:
            return tuple(entry.blocks)
    raise ValueError(f"unknown kernel {kernel!r}; choose one of {launch.KERNELS}")


def variant(
    kernel: str,
    problem: Problem,
    dtype: torch.dtype,
    config: Config,
    *,
    has_mask: bool = True,
    has_bias: bool = True,
) -> KernelVariant:
    """One kernel as a call on contiguous tensors has it compiled, with every gradient asked for.

    Args:
        kernel: one of ``launch.KERNELS``.
        problem: the sizes of the call.
        dtype: of q, k, v and the gradient; statistics and bias are fp32.
        config: every block argument of the kernel.

    Raises:
        ValueError: unknown kernel, or other block arguments than it has.
    """
    names = block_names(kernel)
    if set(config.blocks) != set(names):
        raise ValueError(f"{kernel} has the blocks {names}, not {tuple(config.blocks)}")
    function = FUNCTIONS[kernel]
    values = _arguments(problem, dtype, has_mask, has_bias)
    alone = has_bias and problem.rows_per_bias == 1
    if kernel == launch.GRAD_Q and not alone:
        values["p_grad_bias"] = None  # a kernel of its own sums it
    q, mask, bias = values["p_q"], values["p_mask"], values["p_bias"]
    blocks = launch._fitted(config.blocks, problem)
    constants = launch._constants(problem, q, mask, bias, blocks)
    asked = {"STORE_Q": True, "STORE_K": True, "STORE_V": True, "STORE_BIAS": alone}
    constants |= {name: asked[name] for name in function.arg_names if name in asked}

    signature, multiples = {}, set()
    for name in function.arg_names:
        signature[name] = "constexpr" if name in constants else _type(values[name])
        if signature[name] == "constexpr":
            constants.setdefault(name, values.get(name))
        elif isinstance(values[name], int) and values[name] % 16 == 0:
            multiples.add(name)
    return KernelVariant(
        name=f"{kernel} {str(dtype).removeprefix('torch.')}",
        kernel=function,
        signature=signature,
        constants=constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        max_registers=config.max_registers,
        multiples_of_16=frozenset(multiples),
    )


def _shipped(entry: Entry, key: str) -> KernelVariant:
    """An entry of a table at the sizes it was measured at; a default one on triangle attention."""
    rows, queries, keys = (entry.sizes.get(name, TOKENS) for name in "RNK")
    problem = Problem(1, rows, queries, keys, HEADS, entry.sizes["D"], rows_per_bias=rows)
    config = Config(entry.blocks, entry.num_warps, entry.num_stages, entry.max_registers)
    of = variant(entry.kernel, problem, DTYPES[entry.bits], config)
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


def _type(value: torch.Tensor | int | float | None) -> str:
    """The type Triton compiles for; what it knows when it compiles (None, 1) is a constant."""
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1:
        return "constexpr"
    return "i32" if value < 2**31 else "i64"


def _arguments(problem: Problem, dtype: torch.dtype, has_mask: bool, has_bias: bool) -> _Values:
    """What a launch passes, by the names of the kernels' arguments; tensors without memory."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    batch, rows, heads, width = problem.batch, problem.rows, problem.heads, problem.width
    q = empty(batch, rows, problem.queries, heads, width)
    k = empty(batch, rows, problem.keys, heads, width)
    mask = empty(batch, rows, problem.keys, of=torch.bool) if has_mask else None
    bias = None
    if has_bias:
        bias = empty(problem.biases, heads, problem.queries, problem.keys, of=torch.float32)
    statistics = empty(problem.total_rows, heads, problem.queries, of=torch.float32)
    values: _Values = {
        "p_q": q, "p_k": k, "p_v": k, "p_mask": mask, "p_bias": bias, "p_out": q,
        "p_stats": statistics, "p_delta": statistics, "p_grad": q,
        "p_grad_q": q, "p_grad_k": k, "p_grad_v": k, "p_grad_bias": bias,
        "biases": problem.biases, "rows_per_group": problem.rows_per_bias,
    }  # fmt: skip
    for letter, tensor in (("q", q), ("k", k), ("v", k), ("g", q)):
        names = (f"stride_{letter}{axis}" for axis in "bsnhd")
        values.update(zip(names, tensor.stride(), strict=True))
    mask_names = ("stride_mb", "stride_ms", "stride_mk")
    values.update(zip(mask_names, launch._mask_strides(mask), strict=True))
    bias_names = ("stride_bb", "stride_bh", "stride_bq", "stride_bk")
    values.update(zip(bias_names, launch._bias_strides(bias), strict=True))
    names = ("rows", "rows_per_bias", "stride_inverse", "queries", "keys", "heads", "width")
    values["scale"], *sizes = launch._scalars(problem, width**-0.5)
    values.update(zip(names, sizes, strict=True))
    return values
