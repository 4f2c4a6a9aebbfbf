"""The blocks against their equations written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import one_hot

from megafold import ops
from megafold.model.attention import AttentionPairBias
from megafold.model.blocks import Blocks, recomputed
from megafold.model.dropout import dropout_mask, repeating, shared_mask
from megafold.model.embedders import RelativePosition, RelativePositionEncoding
from megafold.model.msa import OuterProductMean, PairWeightedAveraging
from megafold.model.triangle import TriangleAttention
from megafold.model.windows import AtomWindows
from tests.model.seeds import seeded
from tests.numerics import DEVICE


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Give a module weights that hide nothing: no zeros, double precision."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(), dtype=torch.float64)


def test_triangle_attention_around_the_starting_node_is_its_equation():
    n, c, heads = 7, 8, 2
    block = randomise(TriangleAttention(c, heads, starting=True))
    z, mask = draw(n, n, c), torch.rand(n, n, generator=seeded()) < 0.7
    zn = block.layer_norm(z)
    q, k, v, g = (
        f(zn).unflatten(-1, (heads, -1))
        for f in (block.linear_q, block.linear_k, block.linear_v, block.linear_g)
    )
    b = block.linear_b(zn)
    expected = torch.zeros(n, n, heads, c // heads, dtype=z.dtype)
    for i in range(n):
        for j in range(n):
            logits = (q[i, j] * k[i]).sum(-1) / (c // heads) ** 0.5 + b[j]  # [k, H]
            logits = logits.masked_fill(~mask[i][:, None], -torch.inf)
            if mask[i].any():
                weight = torch.softmax(logits, 0)
                expected[i, j] = (weight[..., None] * v[i]).sum(0)
    expected = block.linear_out((torch.sigmoid(g) * expected).flatten(-2))
    torch.testing.assert_close(block(z, mask), expected)


def test_the_ending_node_is_the_starting_node_of_the_transposed_pair():
    n, c, heads = 6, 8, 2
    starting = randomise(TriangleAttention(c, heads, starting=True))
    ending = TriangleAttention(c, heads, starting=False).double()
    ending.load_state_dict(starting.state_dict())
    z, mask = draw(n, n, c), torch.rand(n, n, generator=seeded()) < 0.7
    expected = starting(z.transpose(0, 1), mask.T).transpose(0, 1)
    torch.testing.assert_close(ending(z, mask), expected)


def test_windowed_attention_is_full_attention_with_a_band_mask():
    atoms, c, c_pair, heads = 75, 8, 4, 2
    block = randomise(AttentionPairBias(c, c_pair, heads, c_s=c))
    a, s = draw(2, atoms, c), draw(1, atoms, c)
    mask = torch.rand(atoms, generator=seeded()) < 0.9
    pair = draw(atoms, atoms, c_pair)
    windows = AtomWindows.of(mask)
    index = torch.arange(atoms)
    rows = windows.queries(index[None]).squeeze(1)  # [W, 32]
    columns = windows.keys(index[None]).squeeze(1)  # [W, 128]
    got = block(a, pair[rows[:, :, None], columns[:, None]], mask, s, windows)

    start = index // 32 * 32
    for atom in range(atoms):
        band = mask & (index >= start[atom] - 48) & (index < start[atom] + 80)
        expected = block(a, pair, band, s)[:, atom]
        torch.testing.assert_close(got[:, atom], expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("c_s", [None, 6], ids=["plain", "conditioned"])
def test_attention_adds_its_update_to_the_residual_it_is_given(c_s, backend):
    block = randomise(AttentionPairBias(16, 4, 2, c_s=c_s)).float().to(DEVICE)
    a, residual, pair = (
        draw(*shape).float().to(DEVICE) for shape in ((3, 5, 16), (3, 5, 16), (5, 5, 4))
    )
    mask = torch.tensor([True, True, False, True, True], device=DEVICE)
    s = None if c_s is None else draw(1, 5, c_s).float().to(DEVICE)
    with ops.use("torch"):
        expected = residual + block(a, pair, mask, s)
    with ops.use(backend):
        torch.testing.assert_close(block(a, pair, mask, s, residual=residual), expected)


def test_windows_split_and_merge():
    x = torch.arange(70.0)[None, :, None]
    windows = AtomWindows.of(torch.ones(70, dtype=torch.bool))
    assert torch.equal(windows.merge(windows.queries(x)), x)
    keys = windows.keys(x)[:, 0, :, 0]
    assert keys.shape == (3, 128)
    assert keys[1, 0] == 0  # window 1 looks from atom 32 - 48 = -16: beyond the start
    assert keys[1, 16] == 0
    assert keys[1, 17] == 1
    assert not windows.key_mask[1, :16].any()
    assert windows.key_mask[1, 16:86].all()
    assert not windows.key_mask[1, 86:].any()


def test_relative_positions_are_the_linear_layer_over_one_hot_classes(batch):
    chains = (torch.arange(batch.num_tokens) >= 30).long()
    two_chains = dataclasses.replace(batch, asym_id=chains, sym_id=chains)
    relative = RelativePosition.of(two_chains)
    encoding = randomise(RelativePositionEncoding(5))
    features = torch.cat(
        [
            one_hot(relative.residue, 66),
            one_hot(relative.token, 66),
            relative.same_entity[..., None],
            one_hot(relative.chain, 6),
        ],
        dim=-1,
    ).double()
    torch.testing.assert_close(encoding(relative), encoding.linear(features))


def test_relative_position_classes(batch):
    chains = (torch.arange(batch.num_tokens) >= 30).long()
    relative = RelativePosition.of(dataclasses.replace(batch, asym_id=chains, sym_id=chains))
    same_residue = batch.residue_index[0] == batch.residue_index[1]
    assert not same_residue
    assert relative.residue[0, 0] == 32
    assert relative.residue[1, 0] == 33
    assert relative.residue[0, 40] == 65  # other chain
    assert relative.token[0, 1] == 65  # other residue
    assert relative.chain[0, 1] == 5  # same chain
    assert relative.chain[40, 0] == 3  # one copy further


def test_outer_product_mean_averages_over_the_rows_that_are_there():
    rows, n, c_m, c_z, c = 4, 5, 6, 3, 2
    block = randomise(OuterProductMean(c_m, c_z, c))
    m, mask = draw(rows, n, c_m), torch.rand(rows, n, generator=seeded()) < 0.6
    a, b = block.ab(m).chunk(2, dim=-1)
    for i in range(n):
        for j in range(n):
            both = mask[:, i] & mask[:, j]
            outer = (a[both, i, :, None] * b[both, j, None, :]).sum(0) / max(int(both.sum()), 1)
            expected = block.linear_out(outer.flatten())
            torch.testing.assert_close(block(m, mask)[i, j], expected)


def test_pair_weighted_averaging_ignores_masked_tokens():
    block = randomise(PairWeightedAveraging(6, 4, 2, 3))
    m, z = draw(3, 5, 6), draw(5, 5, 4)
    mask = torch.tensor([True, True, True, False, True])
    changed = m.clone()
    changed[:, 3] += 1.0
    kept = mask.nonzero().squeeze(1)
    torch.testing.assert_close(block(changed, z, mask)[:, kept], block(m, z, mask)[:, kept])


def test_shared_dropout_is_the_same_along_its_axis_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(50, 400, 8)
    dropped = x * dropout_mask(x, 0.25, 0, training=True)
    assert torch.equal(dropped[0], dropped[7])
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(dropped.mean() - 1.0) < 0.05
    assert dropout_mask(x, 0.25, 0, training=False) is None


def test_dropout_is_drawn_once_where_a_call_is_repeated():
    x, inner, outer = torch.ones(40, 3), [], []

    def call():
        found = [shared_mask(x, 0.5, 1)]
        with repeating(inner_of[-1]):
            found.append(shared_mask(x, 0.5, 1))
        return torch.cat(found)

    inner_of = [inner]
    with repeating(outer):
        first = call()
    inner_of.append([])  # what is repeated within is a new call
    with repeating(outer):
        assert torch.equal(call(), first)
    assert torch.equal(torch.cat(outer), first)
    assert torch.equal(inner[0], outer[1])
    assert not torch.equal(call(), first)


def test_a_recomputed_block_has_the_gradient_of_its_own_dropout():
    x = torch.linspace(0.1, 1.0, 60).view(20, 3).requires_grad_()
    calls = []

    def block(x):
        calls.append(1)
        torch.rand(len(calls))  # as many other numbers are drawn each time
        return x.sin() * shared_mask(x, 0.5, 1)

    out = recomputed(block, x)
    torch.manual_seed(1)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, (out / x.sin() * x.cos()).detach())
    assert len(calls) == 2
    assert 0 < (grad == 0).sum() < grad.numel()


def test_what_stands_in_for_parameters_does_so_where_a_block_is_recomputed():
    block = torch.nn.Linear(3, 3)
    x, other = draw(4, 3).requires_grad_(), draw(3, 3).requires_grad_()

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = Blocks([block], checkpointing=True)

        def forward(self, x):
            return self.blocks.run(self.blocks[0], x).sin()

    given = {"blocks.0.weight": other, "blocks.0.bias": draw(3)}
    out = torch.func.functional_call(Stack().double(), given, (x,))
    (grad,) = torch.autograd.grad(out.sum(), x)
    expected = torch.nn.functional.linear(x, other, given["blocks.0.bias"]).cos() @ other
    torch.testing.assert_close(grad, expected)


def test_the_order_of_alignment_rows_does_not_matter(model, batch):
    """All rows are taken, so nothing is drawn: the trunk averages over them."""
    g = seeded()
    n = batch.num_tokens
    msa = torch.cat([batch.msa[:1], torch.randint(0, 32, (5, n), generator=g)])
    deep = dataclasses.replace(
        batch,
        msa=msa,
        msa_mask=torch.rand(6, n, generator=g) < 0.8,
        has_deletion=torch.zeros(6, n),
        deletion_value=torch.rand(6, n, generator=g),
    )
    order = torch.tensor([0, 4, 2, 5, 1, 3])
    rows = {name: getattr(deep, name)[order] for name in
            ("msa", "msa_mask", "has_deletion", "deletion_value")}  # fmt: skip
    one = model(deep, generator=seeded(), cycles=1).z
    two = model(dataclasses.replace(deep, **rows), generator=seeded(), cycles=1).z
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(one, model(batch, generator=seeded(), cycles=1).z, atol=1e-3)
