"""What a shipped kernel is compiled with: block sizes are data, not decorators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KernelVariant:
    """One Triton kernel with the types and block sizes it is shipped with.

    This is all that ahead-of-time compilation needs (``megafold.bench.compile``).
    """

    name: str  # "swiglu_forward bfloat16"
    kernel: Any  # the @triton.jit function
    signature: Mapping[str, str]  # argument name -> Triton type ("*bf16", "i64", "constexpr")
    constants: Mapping[str, Any]  # the constexpr arguments
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None  # per thread, NVIDIA only
    # Whole numbers that 16 divides in the call it stands for: Triton compiles them apart.
    multiples_of_16: frozenset[str] = frozenset()
    devices: tuple[str, ...] = ()  # those whose table it is from; none: it ships for every GPU
