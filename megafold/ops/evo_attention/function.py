"""EvoAttention: the public function, its validation and the choice of implementation."""

from __future__ import annotations

import torch

from megafold.ops import dispatch
from megafold.ops.checks import autocast, check_floats, check_mask, described
from megafold.ops.evo_attention.reference import reference

NAME = "evo_attention"
WIDEST = 128  # head width that a tile of the kernels holds


def evo_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    pair_bias: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention over keys with a learned bias per pair, shared by many rows.

    ``out[b,s,i,h] = sum_j softmax_j(scale q[b,s,i,h] . k[b,s,j,h] + bias[b,h,i,j]) v[b,s,j,h]``

    One operator for triangle attention (S = rows; the ending node by transposed views),
    attention with pair bias (S = 1), MSA row and column attention, windows of atoms
    (B = windows) and many diffusion samples on one bias (S = samples).

    Args:
        q: ``[B, S, Nq, H, D]``, fp32, bf16, fp16 (or fp64); any strides, also expanded; D at
            most 128.
        k, v: ``[B, S, Nk, H, D]``, dtype of q.
        mask: bool ``[B or 1, S or 1, Nk]``, True = attend. None attends everywhere.
        pair_bias: ``[B or 1, H, Nq, Nk]``, dtype of q or fp32, finite. Shared over S, and over
            B where it is 1; its gradient is summed accordingly.
        scale: of the dot products; None means ``D ** -0.5``.

    Returns:
        ``[B, S, Nq, H, D]``, contiguous, dtype of q. Where the mask allows no key, zeros, with
        zero gradients. Under ``torch.autocast``: computed from operands in the autocast dtype
        (logits and softmax in fp32) and returned in it, like ``torch.matmul``; fp64 is left alone.

    Raises:
        TypeError, ValueError: naming the argument, its shape or dtype, and what was expected.

    Algorithms 14 and 15 (triangle attention) and 24 (attention with pair bias) of AlphaFold 3,
    without projections and gates.
    """
    check(q, k, v, mask, pair_bias, scale=scale)
    if dispatch.choose(NAME, q).implementation == "torch":
        return reference(q, k, v, mask, pair_bias, scale=scale)
    # Imported on first use: kernels compile (or are interpreted) as the environment then says.
    from megafold.ops.evo_attention.library import attend

    q, k, v = (autocast(t) for t in (q, k, v))
    if pair_bias is not None and pair_bias.dtype == torch.float64:  # beside autocast only
        pair_bias = pair_bias.float()
    return attend(q, k, v, mask, pair_bias, q.shape[-1] ** -0.5 if scale is None else scale)


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    pair_bias: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> None:
    """Raise TypeError or ValueError where the arguments are not a valid call."""
    check_floats(NAME, {"q": q, "k": k, "v": v}, {"pair_bias": pair_bias}, fp32=("pair_bias",))
    if q.dim() != 5 or not 0 < q.shape[-1] <= WIDEST:
        raise ValueError(
            f"{NAME}: q has shape {tuple(q.shape)}, expected [B, S, Nq, H, D] with D from 1 to "
            f"{WIDEST}"
        )
    batch, rows, queries, heads, width = q.shape
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != 5 or tensor.shape[:2] != q.shape[:2] or tensor.shape[3:] != q.shape[3:]:
            raise ValueError(
                f"{NAME}: {name} has shape {tuple(tensor.shape)}, expected [B, S, Nk, H, D] = "
                f"({batch}, {rows}, Nk, {heads}, {width}) for {described('q', q)}"
            )
    keys = k.shape[2]
    if v.shape[2] != keys:
        raise ValueError(
            f"{NAME}: v has shape {tuple(v.shape)}, expected Nk = {keys} as in {described('k', k)}"
        )
    if mask is not None:
        check_mask(NAME, mask, q)
        if mask.dim() != 3 or not (
            mask.shape[0] in (batch, 1) and mask.shape[1] in (rows, 1) and mask.shape[2] == keys
        ):
            raise ValueError(
                f"{NAME}: mask has shape {tuple(mask.shape)}, expected [B or 1, S or 1, Nk] = "
                f"({batch} or 1, {rows} or 1, {keys}) for {described('q', q)}"
            )
    if pair_bias is not None and tuple(pair_bias.shape) not in (
        (batch, heads, queries, keys),
        (1, heads, queries, keys),
    ):
        raise ValueError(
            f"{NAME}: pair_bias has shape {tuple(pair_bias.shape)}, expected "
            f"[B or 1, H, Nq, Nk] = ({batch} or 1, {heads}, {queries}, {keys}) "
            f"for {described('q', q)}"
        )


def _configs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    pair_bias: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[str, ...]:
    """The block sizes of every kernel this call would run, and where they are from."""
    from megafold.ops.evo_attention import hopper, launch
    from megafold.ops.hopper import in_words
    from megafold.ops.precision import reason

    q = autocast(q)
    problem = launch.Problem.of(q, k, pair_bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ready = (
        hopper.why_not_forward(problem, q, pair_bias, (launch.FORWARD,)),
        hopper.why_not_backward(problem, q, pair_bias, scale, launch.GRADIENTS),
    )
    products = reason(q.dtype, q.device)
    products = products and f"; {products}"
    lines = []
    for kernel in launch.KERNELS:
        if kernel == launch.GRAD_BIAS and (pair_bias is None or problem.rows_per_bias == 1):
            continue  # the kernel for q writes the gradient of a bias that no rows share
        found = launch.config_of(kernel, problem, q)
        lines.append(f"{kernel}: {found.config} ({found.source}){products}")
    if hopper.is_hopper(q.device):
        for which, why_not in zip(("forward pass", "gradients"), ready, strict=True):
            lines.append(f"evo_attention.hopper: {which} {in_words(why_not)}")
    return tuple(lines)


dispatch.register(
    dispatch.Operator(NAME, evo_attention, check, "forward and backward are kernels", _configs)
)
