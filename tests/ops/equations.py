"""The equations once more, written out by hand: what the references are compared with."""

from __future__ import annotations

import torch


def layer_norm(x, weight=None, bias=None, eps=1e-5):
    """Layer normalisation over the last dimension, from its definition."""
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    normalised = centred / (variance + eps).sqrt()
    if weight is not None:
        normalised = normalised * weight
    return normalised if bias is None else normalised + bias


def evo_attention(q, k, v, mask=None, pair_bias=None, scale=None):
    """Attention with a pair bias; exponentials of allowed keys over their sum."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * torch.einsum("bsihd,bsjhd->bshij", q, k)
    if pair_bias is not None:
        logits = logits + pair_bias.unsqueeze(1)
    allowed = torch.ones_like(logits)
    if mask is not None:
        allowed = allowed * mask[:, :, None, None, :]
    terms = torch.exp(logits - logits.detach().amax(dim=-1, keepdim=True)) * allowed
    total = terms.sum(dim=-1, keepdim=True)
    weights = terms / total.where(total > 0, torch.ones_like(total))
    return torch.einsum("bshij,bsjhd->bsihd", weights, v)


def layer_norm_linear(x, norm_weight, norm_bias, weight, bias=None, eps=1e-5):
    """A linear layer of the normalised x."""
    out = torch.einsum("...c,oc->...o", layer_norm(x, norm_weight, norm_bias, eps), weight)
    return out if bias is None else out + bias


def gated_linear(x, gate, weight, residual=None, dropout=None):
    """The gate, the projection, dropout and the residual around Algorithms 14 and 15."""
    out = torch.einsum("...c,oc->...o", x / (1 + torch.exp(-gate)), weight)
    out = out if dropout is None else dropout * out
    return out if residual is None else residual + out


def gated(x, gate, residual=None):
    """Either gate of Algorithm 24, with the residual of Algorithm 23."""
    out = x / (1 + torch.exp(-gate))
    return out if residual is None else residual + out


def transition(x, norm_weight, norm_bias, weight_gate, weight_value, weight_out, eps=1e-5):
    """Algorithm 11."""
    n = layer_norm(x, norm_weight, norm_bias, eps)
    gate = torch.einsum("...c,hc->...h", n, weight_gate)
    value = torch.einsum("...c,hc->...h", n, weight_value)
    swish = gate / (1 + torch.exp(-gate))
    return torch.einsum("...h,ch->...c", swish * value, weight_out)


def triangle_multiplication(
    z,
    mask,
    norm_in_weight,
    norm_in_bias,
    p_in_weight,
    g_in_weight,
    norm_out_weight,
    norm_out_bias,
    p_out_weight,
    g_out_weight,
    outgoing=True,
    eps=1e-5,
    dropout=None,
    residual=False,
):
    """Algorithms 12 and 13, a and b from their own halves of the weights."""
    c = z.shape[-1]
    n = layer_norm(z, norm_in_weight, norm_in_bias, eps)

    def gated(p, g):
        return torch.sigmoid(n @ g.T) * (n @ p.T)

    a = gated(p_in_weight[:c], g_in_weight[:c])
    b = gated(p_in_weight[c:], g_in_weight[c:])
    if mask is not None:
        a, b = (t.where(mask.unsqueeze(-1), torch.zeros_like(t)) for t in (a, b))
    if outgoing:
        update = (a.unsqueeze(2) * b.unsqueeze(1)).sum(dim=3)  # [B, i, j, k, C]
    else:
        update = (a.unsqueeze(3) * b.unsqueeze(2)).sum(dim=1)  # [B, k, i, j, C]
    update = layer_norm(update, norm_out_weight, norm_out_bias, eps)
    update = torch.sigmoid(n @ g_out_weight.T) * (update @ p_out_weight.T)
    update = update if dropout is None else dropout * update
    return z + update if residual else update


def adaptive_layer_norm(a, s, norm_weight_s, weight_gate, bias_gate, weight_shift, eps=1e-5):
    """Algorithm 26."""
    n = layer_norm(s, norm_weight_s, None, eps)
    gate = n @ weight_gate.T
    if bias_gate is not None:
        gate = gate + bias_gate
    return torch.sigmoid(gate) * layer_norm(a, eps=eps) + n @ weight_shift.T


def conditioned_transition(
    a,
    s,
    norm_weight_s,
    norm_weight_gate,
    norm_bias_gate,
    norm_weight_shift,
    weight_gate,
    weight_value,
    weight_out,
    weight_scale,
    bias_scale,
    eps=1e-5,
):
    """Algorithm 25."""
    n = adaptive_layer_norm(
        a, s, norm_weight_s, norm_weight_gate, norm_bias_gate, norm_weight_shift, eps
    )
    gate = n @ weight_gate.T
    b = gate / (1 + torch.exp(-gate)) * (n @ weight_value.T)
    scale = s @ weight_scale.T
    if bias_scale is not None:
        scale = scale + bias_scale
    return b @ weight_out.T / (1 + torch.exp(-scale))


def triangle_attention(
    z,
    mask,
    norm_weight,
    norm_bias,
    q_weight,
    k_weight,
    v_weight,
    b_weight,
    g_weight,
    out_weight,
    starting=True,
    eps=1e-5,
    dropout=None,
    residual=False,
):
    """Algorithms 14 and 15; the ending node's edges are those of the starting node, transposed."""
    n = layer_norm(z, norm_weight, norm_bias, eps)
    if not starting:
        n, mask = n.transpose(1, 2), None if mask is None else mask.transpose(1, 2)
    heads = b_weight.shape[0]
    q, k, v = ((n @ w.T).unflatten(-1, (heads, -1)) for w in (q_weight, k_weight, v_weight))
    out = evo_attention(q, k, v, mask, (n @ b_weight.T).permute(0, 3, 1, 2)).flatten(-2)
    update = (torch.sigmoid(n @ g_weight.T) * out) @ out_weight.T
    update = update if starting else update.transpose(1, 2)
    update = update if dropout is None else dropout * update
    return z + update if residual else update
