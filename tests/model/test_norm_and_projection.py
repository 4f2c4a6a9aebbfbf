"""Where a LayerNorm feeds linear layers in one call: the same as one layer after another."""

from __future__ import annotations

import torch

from megafold import ops
from megafold.model.attention import AttentionPairBias
from megafold.model.heads import AtomHead
from tests.model.seeds import seeded


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Give a module weights that hide nothing: no zeros, double precision."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(), dtype=torch.float64)


def test_attention_projects_four_times_from_one_norm():
    tokens, c, c_pair, heads = 7, 12, 5, 3
    block = randomise(AttentionPairBias(c, c_pair, heads))
    a, pair = draw(2, tokens, c), draw(tokens, tokens, c_pair)
    mask = torch.arange(tokens) < 5
    normal = block.norm(a)
    q, k, v = (
        layer(normal).unflatten(-1, (heads, -1)).unsqueeze(0)
        for layer in (block.linear_q, block.linear_k, block.linear_v)
    )
    bias = block.pair_bias.linear(block.pair_bias.layer_norm(pair)).permute(2, 0, 1)
    out = ops.evo_attention(q, k, v, mask[None, None], bias.unsqueeze(0)).squeeze(0)
    gate = torch.sigmoid(block.linear_g(normal))
    expected = block.linear_out(gate * out.flatten(-2))
    torch.testing.assert_close(block(a, pair, mask), expected)
    asked = (block.norm.weight, block.linear_q.bias, block.linear_k.weight, block.linear_g.weight)
    grad = draw(2, tokens, c)
    found = torch.autograd.grad(block(a, pair, mask), asked, grad)
    for value, by_layers in zip(found, torch.autograd.grad(expected, asked, grad), strict=True):
        torch.testing.assert_close(value, by_layers)


def test_atom_head_has_weights_for_each_place_in_a_token():
    head = randomise(AtomHead(6, 4, 5))
    s, atom_to_token = draw(3, 6), torch.tensor([0, 0, 1, 2, 2, 2])
    place = [0, 1, 0, 0, 1, 2]
    normal = head.layer_norm(s)
    expected = [
        normal[token] @ head.weight[i] for token, i in zip(atom_to_token, place, strict=True)
    ]
    torch.testing.assert_close(head(s, atom_to_token), torch.stack(expected))
