"""Smooth lDDT as a loss (Algorithm 27), without a tensor over copies and pairs of atoms.

With 48 copies of 6,000 atoms that tensor would have 1.7 billion entries, and autograd would
keep several. Here value and gradient are worked out together, so that the backward pass is a
multiplication: by a kernel on a GPU, and elsewhere, or where ``megafold.ops.use("torch")`` says
so, for a block of rows at a time.

Shape letters: S noised copies, A atoms, R rows of a block, C atoms near one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megafold import ops

THRESHOLDS = (0.5, 1.0, 2.0, 4.0)  # angstrom
# Entries of one block's tensors [S, R, C]; about ten of them live at a time.
BLOCK_ENTRIES = 1 << 22
_MAX_ROWS = 128


def smooth_lddt(
    x: torch.Tensor, true: torch.Tensor, resolved: torch.Tensor, radius: torch.Tensor
) -> torch.Tensor:
    """One minus the smooth lDDT of each copy.

    Args:
        x: Predicted ``[S, A, 3]`` angstrom; the only argument with a gradient.
        true: ``[A, 3]`` angstrom.
        resolved: ``[A]`` bool, atoms whose true position is known.
        radius: ``[A]`` angstrom, how far each atom looks for its neighbours in the truth.

    Returns:
        ``[S]``, float32 (float64 for float64 x); 0 where there is no pair to look at.

    The mean is over ordered pairs of different resolved atoms. Cannot be differentiated twice.
    """
    if x.dim() != 3 or x.shape[1:] != true.shape or true.shape[-1] != 3:
        raise ValueError(
            f"x must be [S, A, 3] and true [A, 3], got {tuple(x.shape)} and {tuple(true.shape)}"
        )
    if resolved.shape != true.shape[:1] or radius.shape != true.shape[:1]:
        raise ValueError(
            f"resolved and radius must be [{true.shape[0]}], got "
            f"{tuple(resolved.shape)} and {tuple(radius.shape)}"
        )
    x = x if x.dtype == torch.float64 else x.float()
    return _SmoothLDDT.apply(x, true.to(x.dtype), resolved, radius.to(x.dtype))


class _SmoothLDDT(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, true, resolved, radius):
        wants_gradient = ctx.needs_input_grad[0]
        sums = _sums if _by_blocks(x) else _kernel_sums
        score, found, gradient = sums(x, true, resolved, radius, wants_gradient)
        pairs = found.clamp(min=1.0)
        if wants_gradient:
            ctx.save_for_backward(gradient.mul_(-1.0 / pairs))
        return torch.where(found > 0, 1.0 - score / pairs, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        (gradient,) = ctx.saved_tensors
        return grad[:, None, None] * gradient, None, None, None


def _by_blocks(x: torch.Tensor) -> bool:
    """Whether PyTorch does it: always in fp64, which the kernel does not take."""
    if x.dtype != torch.float32 or not x.numel() or ops.backend() == "torch":
        return True
    return not x.is_cuda and ops.backend() != "triton"


def _kernel_sums(*args):
    # Imported on first use: kernels compile (or are interpreted) as the environment then says.
    from megafold.model import smooth_lddt_kernel

    return smooth_lddt_kernel.sums(*args)


def _sums(x, true, resolved, radius, wants_gradient):
    """Sum of scores ``[S]`` over near ordered pairs, their number, gradient ``[S, A, 3]``."""
    samples, atoms, _ = x.shape
    score, pairs = x.new_zeros(samples), x.new_zeros(())
    gradient = torch.zeros_like(x) if wants_gradient else None
    rows = max(1, min(_MAX_ROWS, BLOCK_ENTRIES // max(1, samples * atoms)))
    index = torch.arange(atoms, device=x.device)
    for begin in range(0, atoms, rows):
        block = slice(begin, min(begin + rows, atoms))
        distance = _distance(true[None, block], true[None])[0].squeeze(0)  # [R, A]
        both = resolved[block, None] & resolved & (index[block, None] != index)
        near = (distance < radius[block, None]) & both
        seen = near | ((distance < radius) & both)  # by either of the two
        columns = seen.any(0).nonzero().squeeze(1)  # atoms of a block lie close together
        if not len(columns):
            continue
        near, seen = near[:, columns], seen[:, columns]
        distance = distance[:, columns]
        weight = near.to(x.dtype)
        predicted, differences = _distance(x[:, block], x[:, columns])  # [S, R, C]
        error = predicted - distance
        slope = torch.zeros_like(error) if wants_gradient else None
        closeness = torch.zeros_like(error)
        for threshold in THRESHOLDS:
            part = torch.sigmoid(threshold - error.abs())
            closeness += part
            if wants_gradient:
                slope.addcmul_(part, part - 1.0)
        score += (closeness * weight).sum((1, 2)) / len(THRESHOLDS)
        pairs += weight.sum()
        if wants_gradient:
            # A pair counts once for each of its atoms that looks at the other.
            count = weight + (seen & (distance < radius[columns])).to(x.dtype)
            slope *= count / len(THRESHOLDS)
            slope *= error.sign_().div_(predicted)
            for axis, difference in enumerate(differences):
                gradient[:, block, axis] = (slope * difference).sum(-1)
    return score, pairs, gradient


def _distance(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Distances ``[S, R, C]`` of a ``[S, R, 3]`` to b ``[S, C, 3]``, and differences by axis."""
    differences = [a[:, :, None, axis] - b[:, None, :, axis] for axis in range(3)]
    squared = sum(difference.square() for difference in differences)
    return (squared + 1e-10).sqrt(), differences
