"""Block sizes of attention that are worth trying."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megafold.ops.evo_attention import launch
from megafold.ops.precision import TF32_BITS
from megafold.ops.tuning import Config
from megafold.ops.tuning.candidates import Candidates, per_thread

# More registers for one tile of logits than this spill; fewer leave the tensor cores idle.
TILE_REGISTERS = (8, 64)


def candidates(kernel: str, bits: int) -> Candidates | None:
    """What is worth trying for a kernel on operands of ``bits`` bits."""
    tensor_cores = bits in (16, TF32_BITS)
    if kernel not in launch.KERNELS:
        return None
    if bits == 16:
        queries, keys, stages = (64, 128), (32, 64, 128), (1, 2, 3)
    elif bits == TF32_BITS:
        queries, keys, stages = (64, 128), (16, 32, 64), (1, 2)
    else:
        queries, keys, stages = (16, 32, 64), (16, 32, 64), (1, 2)
    if kernel == launch.GRAD_KV:
        queries, keys = keys, queries
    blocks = {"BLOCK_Q": queries, "BLOCK_K": keys}
    if kernel != launch.GRAD_BIAS:
        blocks = {"ROWS": (1, 2, 4), **blocks}
    if kernel == launch.GRAD_KV:
        blocks["KEYS_FIRST"] = (0, 1)
    # More programs at a time hide more waiting; NVIDIA's compiler can be held to fewer registers.
    limits = (None, 96, 128, 168) if tensor_cores and torch.version.hip is None else (None,)
    return Candidates(blocks, stages=stages, registers=limits, sensible=_fills_registers)


def _fills_registers(config: Config, sizes: Mapping[str, int]) -> bool:
    low, high = TILE_REGISTERS
    return low <= per_thread(config, config.blocks["BLOCK_Q"], config.blocks["BLOCK_K"]) <= high
