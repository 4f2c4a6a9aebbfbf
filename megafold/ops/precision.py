"""How products of fp32 are computed: in full, or in TF32 where torch's own setting allows it.

Operands go by a name, which is that of their dtype or, where fp32 is multiplied in TF32, "tf32".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

IEEE, TF32 = "ieee", "tf32"  # as ``tl.dot`` calls them
TF32_BITS = 19  # one of sign, 8 of exponent, 10 of mantissa
META = torch.device("meta")

_everywhere: str | None = None


def precision_of(dtype: torch.dtype, device: torch.device) -> str:
    """How kernels multiply operands of a dtype on a device: "ieee" or "tf32".

    Only NVIDIA's GPUs have TF32. Calls that are recorded on the device ``meta`` are such GPUs'.
    """
    if dtype != torch.float32:
        return IEEE
    if _everywhere is not None:
        return _everywhere
    return TF32 if _has_tf32(device) and allows_tf32() else IEEE


def allows_tf32() -> bool:
    """Whether torch's setting lets fp32 products be computed in TF32, however it was made.

    What torch.compile has compiled keeps the choice of implementation that it found.

    ``fp32_precision`` follows the older ``allow_tf32`` and ``set_float32_matmul_precision``, but
    not the other way round: once it has been set, reading those is an error.
    """
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # from PyTorch 2.9
    return matmul.allow_tf32 if precision is None else precision == TF32


# As `torch.compiler.assume_constant_result` marks it, which would import Triton. Dynamo of PyTorch
# 2.11 cannot read the setting itself.
allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def in_full_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether operands of a dtype are fp32 that no TF32 shortens."""
    return dtype == torch.float32 and precision_of(dtype, device) == IEEE


def bits_of(dtype: torch.dtype, device: torch.device) -> int:
    """How many bits of an operand are multiplied: 16, 32, or 19 in TF32."""
    return TF32_BITS if precision_of(dtype, device) == TF32 else 8 * dtype.itemsize


def name_of(dtype: torch.dtype, device: torch.device = META) -> str:
    """The name of operands: "float32", "tf32", "bfloat16", "float16"."""
    tf32 = precision_of(dtype, device) == TF32
    return TF32 if tf32 else str(dtype).removeprefix("torch.")


def reason(dtype: torch.dtype, device: torch.device) -> str:
    """For fp32: how it is multiplied on a device and why, in words; else nothing."""
    if dtype != torch.float32:
        return ""
    how = "in TF32" if precision_of(dtype, device) == TF32 else "in full"
    if _everywhere is not None:
        return f"fp32 products {how}, as asked for"
    if not _has_tf32(device):
        return f"fp32 products {how}, for there is no TF32 on {device.type}"
    allows = "allows" if allows_tf32() else "does not allow"
    return f"fp32 products {how}, for torch.backends.cuda.matmul {allows} TF32"


def adopt(name: str) -> torch.dtype:
    """The dtype of operands of a name; fp32 products of this process are then as it says."""
    if name in ("float32", TF32):
        torch.set_float32_matmul_precision("high" if name == TF32 else "highest")
        return torch.float32
    return getattr(torch, name)


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Let kernels multiply fp32 in one way, whatever torch's setting; for the whole process.

    For recording calls, and for the interpreter, which then rounds operands as TF32 does.
    """
    global _everywhere
    before, _everywhere = _everywhere, precision
    try:
        yield
    finally:
        _everywhere = before


def _has_tf32(device: torch.device) -> bool:
    return device.type in ("cuda", "meta") and torch.version.hip is None
