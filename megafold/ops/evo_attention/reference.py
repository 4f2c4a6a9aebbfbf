"""The equation of EvoAttention in plain PyTorch."""

from __future__ import annotations

import torch


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    pair_bias: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention with a pair bias, the logits materialised: ``[B, S, H, Nq, Nk]`` numbers.

    ``out[b,s,i,h] = sum_j softmax_j(scale q[b,s,i,h] . k[b,s,j,h] + bias[b,h,i,j]) v[b,s,j,h]``
    over the keys j that ``mask[b,s,j]`` allows; zeros where it allows none. Logits and softmax
    are fp32 for half inputs, fp64 for fp64 inputs. Arguments as in
    :func:`megafold.ops.evo_attention`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # The small operand is scaled, not the logits, and what follows works on the logits in
    # place: they are the big tensor here.
    logits = torch.matmul((q * scale).transpose(2, 3), k.permute(0, 1, 3, 4, 2))
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if pair_bias is not None:
        logits += pair_bias[:, None]
    attends = None
    if mask is not None:
        attends = mask.any(dim=-1, keepdim=True)
        # A row that attends to nothing is left unmasked here and set to zero below:
        # a softmax over nothing but -inf would be NaN, and so would its gradient.
        blocked = torch.zeros(mask.shape, dtype=logits.dtype, device=mask.device)
        blocked.masked_fill_(~mask & attends, float("-inf"))
        logits += blocked[:, :, None, None, :]
    weights = torch.softmax(logits, dim=-1).to(v.dtype)
    out = torch.matmul(weights, v.transpose(2, 3)).transpose(2, 3).contiguous()
    if attends is not None:
        out = out.masked_fill(~attends[..., None, None], 0.0)
    return out
