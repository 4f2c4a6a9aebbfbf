"""The best a device could do: the longer of its arithmetic and its memory traffic."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megafold.bench.cases import Case
from megafold.bench.measure import time_call


@dataclass(frozen=True)
class Device:
    """Peak rates of one device, dense (no structured sparsity)."""

    name: str
    tflops: dict[str, float]  # dtype -> 10^12 floating point operations per second
    gb_per_s: float  # 10^9 bytes per second to and from its memory
    source: str


# float32 without TF32, which PyTorch does not use unless asked to; on AMD by matrix instructions.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            "A100 SXM 80 GB",
            {"float32": 19.5, "bfloat16": 312.0, "float16": 312.0},
            2039.0,
            "NVIDIA A100 Tensor Core GPU datasheet",
        ),
        Device(
            "H100 SXM",
            {"float32": 67.0, "bfloat16": 989.5, "float16": 989.5},
            3350.0,
            "NVIDIA H100 Tensor Core GPU datasheet, half of the figures given with sparsity",
        ),
        Device(
            "H200 SXM",
            {"float32": 67.0, "bfloat16": 989.5, "float16": 989.5},
            4800.0,
            "NVIDIA H200 Tensor Core GPU datasheet, half of the figures given with sparsity",
        ),
        Device(
            "MI250 (one of its two dies)",
            {"float32": 45.3, "bfloat16": 181.0, "float16": 181.0},
            1638.4,
            "AMD Instinct MI250 data sheet, half of the figures of the package",
        ),
        Device(
            "MI300X",
            {"float32": 163.4, "bfloat16": 1307.4, "float16": 1307.4},
            5300.0,
            "AMD Instinct MI300X data sheet",
        ),
    )
}

# What torch.cuda.get_device_name() says, in part -> name in DEVICES.
_KNOWN_AS = {
    "A100-SXM4-80GB": "A100 SXM 80 GB",
    "H100 80GB HBM3": "H100 SXM",
    "H200": "H200 SXM",
    "MI250": "MI250 (one of its two dies)",
    "MI300X": "MI300X",
}


def device_peaks(device: torch.device | str, dtype: torch.dtype) -> Device:
    """Peak rates of a device: those of its data sheet, or measured here where there is none.

    What ``source`` says tells the two apart. A CPU is always measured.
    """
    device = torch.device(device)
    known = known_peaks(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known or measured_peaks(device, dtype)


def known_peaks(name: str) -> Device | None:
    """Peak rates by a device's name, as records have it; None where there is no data sheet."""
    for part, known in _KNOWN_AS.items():
        if part in name:
            return DEVICES[known]
    return None


def measured_peaks(device: torch.device | str, dtype: torch.dtype, size: int = 1024) -> Device:
    """Peak rates measured now: one large matrix product, and one copy of 64 MB."""
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    product = time_call(lambda: a @ b, device, seconds=0.2)
    source = torch.ones(64 * 10**6 // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), device, seconds=0.2)
    return Device(
        name=str(device),
        tflops={str(dtype).removeprefix("torch."): 2 * size**3 / product.ms / 1e9},
        gb_per_s=2 * source.numel() * dtype.itemsize / copy.ms / 1e6,
        source=f"measured: product of {size} x {size} matrices, copy of 64 MB",
    )


def bound_ms(case: Case, direction: str, dtype: torch.dtype, device: Device) -> float:
    """The time below which this case cannot run on ``device``, in milliseconds.

    Raises:
        KeyError: no peak rate is known for this dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in device.tflops:
        raise KeyError(f"no peak rate for {name} on {device.name}; known: {tuple(device.tflops)}")
    arithmetic = case.flops(direction) / device.tflops[name] / 1e9
    traffic = case.bytes(direction, dtype) / device.gb_per_s / 1e6
    return max(arithmetic, traffic)
