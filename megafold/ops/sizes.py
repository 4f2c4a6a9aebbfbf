"""Small numbers of a launch: blocks that cover a size, powers of two, multiprocessors.

Triton's own functions for these are compiled ones that are called on the host, at 7 microseconds
a call; a launch needs several.
"""

from __future__ import annotations

from functools import lru_cache

import torch


def cdiv(number: int, divisor: int) -> int:
    """How many times ``divisor`` it takes to reach ``number``."""
    return -(-number // divisor)


def power_of_two(number: int) -> int:
    """The least power of two that is not less than ``number``; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()


OF_AN_H100 = 132


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU, where the interpreter runs.

    As many as an H100 has for tensors without memory, which stand for those of a GPU where what
    would be launched is recorded.
    """
    if device.type == "meta":
        return OF_AN_H100
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
