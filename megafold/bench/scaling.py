"""How an operator's memory and work grow with the size of its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megafold.bench import memory
from megafold.bench.cases import Case, Inputs, differentiable

SEED = 20


@dataclass(frozen=True)
class Footprint:
    """Memory of one case, in bytes, with the implementation in force."""

    case: Case
    inputs: int  # all tensor arguments
    saved: int  # kept by autograd for the backward pass, beyond the inputs
    peak: int  # most in use during forward and backward, beyond the inputs


def leaves(case: Case, device: torch.device | str, dtype: torch.dtype) -> Inputs:
    """Inputs of a case that require gradients, as in training."""
    inputs = case.make_inputs(device, dtype, torch.Generator().manual_seed(SEED))
    for tensor in differentiable(inputs).values():
        tensor.requires_grad_()
    return inputs


def kept_bytes(case: Case, device: torch.device | str, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps for the backward pass of a case, beyond its inputs."""
    inputs = leaves(case, device, dtype)
    return memory.saved_bytes(lambda: case.run(inputs), inputs.values())


def footprint(case: Case, device: torch.device | str, dtype: torch.dtype) -> Footprint:
    """Measure the memory of one training call of a case."""
    inputs = leaves(case, device, dtype)
    tensors = [t for t in inputs.values() if t is not None]

    def training_call() -> tuple[torch.Tensor, ...]:
        out = case.run(inputs)
        return torch.autograd.grad(out.sum(), [t for t in tensors if t.requires_grad])

    return Footprint(
        case=case,
        inputs=memory.tensor_bytes(tensors),
        saved=kept_bytes(case, device, dtype),
        peak=memory.peak_bytes(training_call, device),
    )


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power with which ``values`` grow: the slope of a line through the logarithms.

    Raises:
        ValueError: fewer than two points, or one that is not positive.
    """
    if len(sizes) != len(values) or len(sizes) < 2:
        raise ValueError(f"need two points or more, got {len(sizes)} sizes, {len(values)} values")
    if min(*sizes, *values) <= 0:
        raise ValueError("every size and value must be positive")
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def terms(
    sizes: Sequence[float], values: Sequence[float], powers: Sequence[int]
) -> dict[int, float]:
    """The coefficients of ``values = sum_p c_p size^p``, by least squares.

    Each point counts by its relative deviation, so that small sizes are not drowned out.
    """
    n, y = np.asarray(sizes, float), np.asarray(values, float)
    columns = np.stack([n**power / y for power in powers], axis=1)
    solution = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)[0]
    return {power: float(c) for power, c in zip(powers, solution, strict=True)}
