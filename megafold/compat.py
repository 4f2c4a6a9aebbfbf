"""EvoAttention under the names and in the layouts of other libraries, for code written for them.

- :func:`DS4Sci_EvoformerAttention`: DeepSpeed
- :func:`triangle_attention`: NVIDIA's cuEquivariance
- :func:`TritonEvoformer`: the code published with the paper

Each passes views of its arguments to :func:`megafold.ops.evo_attention`; nothing is expanded, and
nothing copied but a mask that is not boolean. What holds for all three, and differs from the
originals: any head width D up to 128 and any length; fp32, bf16, fp16, and fp64 in PyTorch; a bias
may be fp32 beside bf16 or fp16 inputs; where every key is masked the result is zero, as are its
gradients; the same input gives the same bits, the gradient of the bias included;
``megafold.ops.use`` switches the implementation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megafold import ops
from megafold.ops.checks import check_floats, check_shape, described

__all__ = ["DS4Sci_EvoformerAttention", "TritonEvoformer", "triangle_attention"]

MASKED = -1e4  # an additive mask leaves a key out from here on down; between it and 0 is no mask


def DS4Sci_EvoformerAttention(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    biases: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """``deepspeed.ops.deepspeed4science.DS4Sci_EvoformerAttention``, for any GPU or a CPU.

    ``softmax(Q K^T / sqrt(D) + biases[0] + biases[1]) V`` for each of the heads H.

    Args:
        Q: ``[B, S, L, H, D]``; without biases ``[*, L, H, D]``.
        K, V: the same, where the length may be another.
        biases: at most two, each of which may be None or absent. ``biases[0]``
            ``[B, S, 1, 1, L]`` is the mask: 0 where a key is attended to, ``-inf`` or at most -1e4
            where it is not; or boolean, True = attend. ``biases[1]`` ``[B, 1, H, L, L]`` is the
            pair bias, finite, in the dtype of Q or fp32, and gets its gradient.

    Returns:
        The shape and dtype of Q, contiguous.

    Raises:
        TypeError, ValueError: naming the argument. Also for a ``biases[0]`` that is no mask (any
            other value, or a gradient asked for): the original would add it to the logits.

    Looking at the values of a mask that is not boolean waits for the GPU, once a call. A boolean
    mask does not, and is what CUDA graphs and ``torch.compile(fullgraph=True)`` need.

    The original runs on NVIDIA GPUs, for bf16 and fp16, lengths over 16 and, with gradients, D up
    to 64; it adds ``biases[0]`` to the logits, so that a row in which a finite mask leaves no key
    is the mean over all of them.
    """
    name = "DS4Sci_EvoformerAttention"
    if len(biases) > 2:
        raise ValueError(f"{name}: biases must be at most two, got {len(biases)}")
    mask, pair_bias = (*biases, None, None)[:2]
    if mask is None and pair_bias is None:
        check_floats(name, {"Q": Q, "K": K, "V": V})
        if min(t.dim() for t in (Q, K, V)) < 3:
            raise ValueError(f"{name}: Q has shape {tuple(Q.shape)}, expected [*, L, H, D]")
        rows = (t.reshape(1, -1, *t.shape[-3:]) for t in (Q, K, V))
        return ops.evo_attention(*rows).reshape(Q.shape)
    return _evoformer(name, Q, K, V, mask, pair_bias, ("biases[0]", "biases[1]"))


def TritonEvoformer(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    res_mask: torch.Tensor | None,
    pair_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``TritonEvoformer`` of the paper's published code (arXiv 2506.20686).

    ``softmax(Q K^T / sqrt(D) + res_mask + pair_bias) V`` for each of the heads H.

    Args:
        Q: ``[B, S, N, H, D]``.
        K, V: the same, where the length may be another.
        res_mask: ``[B, S, 1, 1, N]``, either boolean (True = attend) or additive: 0 where a key
            is attended to, ``-inf`` or at most -1e4 where it is not. None attends everywhere.
        pair_bias: ``[B, 1, H, N, N]``, finite, in the dtype of Q or fp32; None adds nothing.

    Returns:
        The shape and dtype of Q, contiguous: tokens before heads, so that the heads are merged
        by ``.flatten(-2)``, never by a reshape to ``[B, S, H, N, D]``.

    Raises:
        TypeError, ValueError: naming the argument. Also for a ``res_mask`` of ones and zeros that
            is not boolean, which the original adds to the logits, so that it masks nothing.

    An additive mask is looked at once a call, and that waits for the GPU, as in
    :func:`DS4Sci_EvoformerAttention`; a boolean one is not.

    The original needs mask and bias, sums the gradient of the bias in an order that changes from
    run to run, and gives NaN where a row's first block of keys is masked with -inf.
    """
    return _evoformer("TritonEvoformer", Q, K, V, res_mask, pair_bias, ("res_mask", "pair_bias"))


def triangle_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_aux: bool = False,
    *,
    kv_lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """``cuequivariance_torch.triangle_attention`` (its version 0.13), for any GPU or a CPU.

    Args:
        q: ``[B, N, H, Q, D]``; for one batch also ``[N, H, Q, D]``, and the others alike.
        k, v: ``[B, N, H, K, D]``.
        bias: ``[B, 1, H, Q, K]``, finite, cast to fp32 where it is not in the dtype of q.
        mask: ``[B, N, 1, 1, K]``, True = attend; of another dtype it is cast to bool, as the
            original does: what is not zero is attended to.
        scale: of the dot products; None means ``D ** -0.5``.
        return_aux, kv_lengths: refused.

    Returns:
        ``[B, N, H, Q, D]`` in the dtype of q, also for inputs without a batch. It is a view with
        queries before heads in memory, as the projection after it wants them.

    Raises:
        NotImplementedError: ``return_aux`` or ``kv_lengths`` is given.
        TypeError, ValueError: naming the argument, its shape or dtype, and what was expected.

    The original needs an NVIDIA GPU, runs PyTorch where its kernels do not take the dtype or D,
    and by its equation gives the mean over all keys where every one is masked.
    """
    name = "triangle_attention"
    if return_aux:
        raise NotImplementedError(
            f"{name}: return_aux is not available: megafold's kernels keep no log-sum-exp and "
            "maximum in cuEquivariance's form; leave it out to get the output alone"
        )
    if kv_lengths is not None:
        raise NotImplementedError(
            f"{name}: kv_lengths is not available; "
            "give mask=torch.arange(K, device=kv_lengths.device) < kv_lengths"
        )
    check_floats(name, {"q": q, "k": k, "v": v})
    check_floats(name, {"bias": bias})
    if q.dim() not in (4, 5):
        raise ValueError(
            f"{name}: q has shape {tuple(q.shape)}, expected [B, N, H, Q, D] or [N, H, Q, D]"
        )
    _check_tensor(name, "mask", mask)
    batched = (None if t is None else t[None] if t.dim() == 4 else t for t in (q, k, v, bias, mask))
    q, k, v, bias, mask = batched
    batch, rows, heads, queries, width = q.shape
    keys = k.shape[-2] if k.dim() > 1 else 0
    of = described("q", q)
    for argument, tensor in (("k", k), ("v", v)):
        shape = (batch, rows, heads, keys, width)
        check_shape(name, argument, tensor, shape, "[B, N, H, K, D]", of)
    check_shape(name, "bias", bias, (batch, 1, heads, queries, keys), "[B, 1, H, Q, K]", of)
    check_shape(name, "mask", mask, (batch, rows, 1, 1, keys), "[B, N, 1, 1, K]", of)
    if bias.dtype not in (q.dtype, torch.float32):
        bias = bias.float()
    out = ops.evo_attention(
        *(t.transpose(2, 3) for t in (q, k, v)),
        None if mask is None else mask[:, :, 0, 0].bool(),
        bias[:, 0],
        scale=scale,
    )
    return out.transpose(2, 3)


def _evoformer(
    function: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    names: tuple[str, str],
) -> torch.Tensor:
    """Attention in the layout ``[B, S, N, H, D]``; ``names`` are those of mask and bias."""
    mask_name, bias_name = names
    check_floats(function, {"Q": q, "K": k, "V": v}, {bias_name: bias}, fp32=(bias_name,))
    for name, tensor in (("Q", q), ("K", k), ("V", v)):
        if tensor.dim() != 5:
            raise ValueError(
                f"{function}: {name} has shape {tuple(tensor.shape)}, expected [B, S, N, H, D]"
            )
    batch, rows, queries, heads, _ = q.shape
    keys = k.shape[2]
    _check_tensor(function, mask_name, mask)
    of = f"{described('Q', q)} and {described('K', k)}"
    check_shape(function, mask_name, mask, (batch, rows, 1, 1, keys), "[B, S, 1, 1, N]", of)
    check_shape(function, bias_name, bias, (batch, 1, heads, queries, keys), "[B, 1, H, N, N]", of)
    return ops.evo_attention(
        q,
        k,
        v,
        None if mask is None else _attended(function, mask_name, mask, bias_name),
        None if bias is None else bias[:, 0],
    )


def _attended(function: str, name: str, mask: torch.Tensor, bias_name: str) -> torch.Tensor:
    """The boolean mask ``[B, S, N]`` (True = attend) that an additive or boolean mask means."""
    mask = mask[:, :, 0, 0]
    if mask.dtype == torch.bool:
        return mask
    if mask.requires_grad:
        raise ValueError(
            f"{function}: {name} requires a gradient, but it is a mask and gets none; "
            f"detach it, or give what is learned as {bias_name}"
        )
    attended = mask == 0
    neither = ~(attended | (mask <= MASKED))
    if neither.any():  # waits for the GPU
        raise ValueError(
            f"{function}: {name} has the value {mask[neither][0].item():g}, and a mask is 0 where "
            f"a key is attended to and at most {MASKED:g} or -inf where it is not; give a mask of "
            f"ones and zeros as {name}.bool(), and what is to be added to the logits as {bias_name}"
        )
    return attended


def _check_tensor(function: str, name: str, value: torch.Tensor | None) -> None:
    if value is not None and not isinstance(value, torch.Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")
