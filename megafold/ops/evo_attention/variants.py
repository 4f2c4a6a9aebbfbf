"""The kernels of EvoAttention as calls have them compiled, found out without compiling them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from megafold.ops.evo_attention import hopper, launch
from megafold.ops.evo_attention.folding import PARTS
from megafold.ops.hopper import DEVICES, recording
from megafold.ops.precision import IEEE, TF32, TF32_BITS, name_of, products_in
from megafold.ops.recording import distinct, recorded
from megafold.ops.tuning import Config, Entry, tables, use_config
from megafold.ops.tuning.candidates import block_names
from megafold.ops.tuning.table import DEFAULT
from megafold.ops.variants import KernelVariant

# Triangle attention; of the default table two widths, the usual one and the largest, but all in
# TF32. bf16 stands for fp16 as well: the two compile alike.
HEADS, TOKENS = 4, 384
WIDTHS = (32, 128)
OPERANDS = {
    32: (torch.float32, IEEE),
    TF32_BITS: (torch.float32, TF32),
    16: (torch.bfloat16, IEEE),
}


def variants() -> list[KernelVariant]:
    """Every kernel with the block sizes of every table, for compiling ahead of time."""
    default = [e for e in tables()[DEFAULT] if e.kernel in launch.KERNELS]
    default = [e for e in default if e.sizes["D"] in WIDTHS or e.bits == TF32_BITS]
    found = [_shipped(e, f"D{e.sizes['D']}") for e in default]
    sharing: dict[int, list[str]] = {}  # devices that have one table
    for device, entries in tables().items():
        sharing.setdefault(id(entries), []).append(device)
    for devices in sharing.values():
        if devices != [DEFAULT]:
            ours = [e for e in tables()[devices[0]] if e.kernel in launch.KERNELS]
            named = [_shipped(e, f"{_key(e.sizes)} {devices[0]}") for e in ours]
            found += [replace(v, devices=tuple(devices)) for v in distinct(named)]
    return found + _on_hopper()


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

    def call() -> None:
        scale, asked = q.shape[-1] ** -0.5, (True, True, True, pair_bias is not None)
        out, stats = launch.forward(q, k, v, mask, pair_bias, scale)
        launch.backward(out, q, k, v, mask, pair_bias, out, stats, scale, asked)

    name = name_of(q.dtype, q.device)
    with use_config(kernel, config):
        launched = {v.name: v for v in recorded(call, name)}
    if f"{kernel} {name}" not in launched:
        raise LookupError(f"a call on q {tuple(q.shape)} does not launch {kernel}")
    return launched[f"{kernel} {name}"]


# What Hopper's own kernels are compiled for: both dtypes, each width, and each number of groups;
# rows that share a bias (also of one walk over the keys), and one that has its own. Rows, tokens,
# heads, width.
HOPPER = (
    (TOKENS, TOKENS, 4, 32),
    (TOKENS, 128, 4, 32),
    (256, 256, 4, 32),
    (TOKENS, TOKENS, 4, 64),
    (1024, 1024, 4, 32),
    (1, 2048, 16, 32),
    (1, 1536, 16, 24),  # two blocks of keys a group; three programs a multiprocessor forward
)


def _on_hopper() -> list[KernelVariant]:
    """The kernels that run on Hopper GPUs alone, and those that prepare operands for them."""
    if not hopper.has_gluon():
        return []
    found = []
    for rows, tokens, heads, width in HOPPER:
        for dtype in PARTS:
            q = torch.empty(1, rows, tokens, heads, width, dtype=dtype, device="meta")
            mask = torch.empty(1, rows, tokens, dtype=torch.bool, device="meta")
            bias = torch.empty(1, heads, tokens, tokens, dtype=torch.float32, device="meta")

            def call(q=q, mask=mask, bias=bias) -> None:
                out, stats = launch.forward(q, q, q, mask, bias, 1.0)
                launch.backward(out, q, q, q, mask, bias, out, stats, 1.0, (True,) * 4)

            with recording():
                launched = recorded(call, f"{name_of(dtype)} S{rows} N{tokens} D{width}")
            known = [v for v in launched if v.name.split()[0] not in launch.KERNELS]
            found += [replace(v, devices=DEVICES) for v in known]
    return distinct(found)


def _shipped(entry: Entry, key: str) -> KernelVariant:
    """An entry of a table at the sizes it was measured at; a default one on triangle attention."""
    (dtype, precision), width = OPERANDS[entry.bits], entry.sizes["D"]
    rows, queries, keys = (entry.sizes.get(name, TOKENS) for name in "RNK")
    q = torch.empty(1, rows, queries, HEADS, width, dtype=dtype, device="meta")
    k = torch.empty(1, rows, keys, HEADS, width, dtype=dtype, device="meta")
    mask = torch.empty(1, rows, keys, dtype=torch.bool, device="meta")
    bias = torch.empty(1, HEADS, queries, keys, dtype=torch.float32, device="meta")
    config = Config(entry.blocks, entry.num_warps, entry.num_stages, entry.max_registers)
    with products_in(precision):
        of = variant(entry.kernel, config, q, k, k, mask, bias)
    return replace(of, name=f"{of.name} {key}")


def _key(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{name}{size}" for name, size in sizes.items())
