"""Blocks against the supplement's algorithms, written out plainly and densely in fp64.

What the operators compute is tested beside them; here it is how the model puts them together:
which input, which order, which gate.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm, one_hot

from megafold import data
from megafold.data.batch import pad_batch
from megafold.geometry import random_rotations
from megafold.model import losses, sampler
from megafold.model.template import C_FEATURES
from tests.model.seeds import seeded
from tests.model.test_fused import in_dtype, padded_batch


@pytest.fixture
def exact(model):
    return model.double()


@pytest.fixture(scope="module")
def peptide():
    """Six residues, a template, two padding tokens and five padding atoms, in fp64."""
    return in_dtype(padded_batch(), torch.float64, "cpu")


@pytest.fixture(scope="module")
def windowed(batch):
    """A peptide of several windows, with seven padding tokens and 45 padding atoms, in fp64."""
    padded = pad_batch(batch, batch.num_tokens + 7, batch.num_atoms + 45)
    assert padded.num_atoms > 128
    return in_dtype(padded, torch.float64, "cpu")


def randn(*shape):
    return torch.randn(shape, generator=seeded(), dtype=torch.float64)


def norm(x, m=None):
    """LayerNorm with the weights of ``m``, or with none."""
    return layer_norm(x, x.shape[-1:], getattr(m, "weight", None), getattr(m, "bias", None))


def norm_linear(x, m):
    return norm(x, m.layer_norm) @ m.linear.weight.T


def swiglu(x, m):
    gate = x @ m.linear_gate.weight.T
    return (gate * torch.sigmoid(gate) * (x @ m.linear_value.weight.T)) @ m.linear_out.weight.T


def transition(x, m):  # Algorithm 11
    return swiglu(norm(x, m.layer_norm), m)


def adaptive_norm(a, s, m):  # Algorithm 26
    s = norm(s, m.layer_norm_s)
    return torch.sigmoid(m.linear_gate(s)) * norm(a) + m.linear_shift(s)


def conditioned_transition(a, s, m):  # Algorithm 25
    return torch.sigmoid(m.linear_scale(s)) * swiglu(adaptive_norm(a, s, m.adaptive_layer_norm), m)


def attention_pair_bias(a, s, z, mask, m):  # Algorithm 24
    a = norm(a, m.norm) if s is None else adaptive_norm(a, s, m.norm)
    q, k, v, g = (layer(a) for layer in (m.linear_q, m.linear_k, m.linear_v, m.linear_g))
    bias = norm_linear(z, m.pair_bias)
    width = a.shape[-1] // m.heads
    out = []
    for h in range(m.heads):
        part = slice(h * width, (h + 1) * width)
        logits = q[..., part] @ k[..., part].transpose(-1, -2) / math.sqrt(width) + bias[..., h]
        weight = logits.masked_fill(~mask, -math.inf).softmax(-1)
        out.append(torch.sigmoid(g[..., part]) * (weight @ v[..., part]))
    out = m.linear_out(torch.cat(out, -1))
    return out if s is None else torch.sigmoid(m.linear_scale(s)) * out


def test_a_cycle_of_the_trunk_is_algorithm_1(exact, peptide):
    n, c = peptide.num_tokens, exact.config
    s_inputs, s_init, z_init = randn(n, c.c_s_inputs), randn(n, c.c_s), randn(n, n, c.c_z)
    s, z = randn(n, c.c_s), randn(n, n, c.c_z)
    mask = peptide.token_mask
    pair_mask, rows = mask[:, None] & mask, exact.msa_module.draw_rows(peptide, seeded())
    found = exact.cycle(peptide, rows, (s_inputs, s_init, z_init), s, z, pair_mask)
    z = z_init + norm_linear(z, exact.recycle_z)  # line 8
    z = z + exact.template_embedder(peptide, z, pair_mask)
    z = exact.msa_module(peptide, rows, s_inputs, z, pair_mask)
    s = s_init + norm_linear(s, exact.recycle_s)
    for block in exact.pairformer.blocks:  # Algorithm 17
        z = block.pair_stack(z, pair_mask)
        s = s + attention_pair_bias(s, None, z, mask, block.attention_pair_bias)
        s = s + transition(s, block.transition)
    torch.testing.assert_close(found, (s, z))


def test_the_pair_stack_adds_its_five_updates_in_order(exact, peptide):
    stack, mask = exact.pairformer.blocks[0].pair_stack, peptide.token_mask
    z, pair_mask = randn(len(mask), len(mask), exact.config.c_z), mask[:, None] & mask
    found = stack(z, pair_mask)
    for name in ("triangle_multiplication_outgoing", "triangle_multiplication_incoming",
                 "triangle_attention_starting", "triangle_attention_ending"):  # fmt: skip
        z = z + getattr(stack, name)(z, pair_mask)
    torch.testing.assert_close(found, z + transition(z, stack.transition))


def test_the_template_embedder_is_algorithm_16(exact, peptide):
    m, n = exact.template_embedder, peptide.num_tokens
    # Two chains: nothing of a template is told between them.
    peptide = dataclasses.replace(peptide, asym_id=(torch.arange(n) > 2).long())
    z, mask = randn(n, n, exact.config.c_z), peptide.token_mask
    same = (peptide.asym_id[:, None] == peptide.asym_id)[..., None].double()

    def both(x):
        return (x[:, None] & x)[..., None].double()

    beta = both(peptide.template_pseudo_beta_mask[0])
    frame = both(peptide.template_backbone_frame_mask[0])
    kind = one_hot(peptide.template_restype[0], 32).double()
    a = torch.cat(
        [
            one_hot(peptide.template_distogram[0], 39) * beta * same,
            beta * same,
            kind[:, None].expand(n, n, 32),
            kind[None].expand(n, n, 32),
            peptide.template_unit_vector[0] * frame * same,
            frame * same,
        ],
        dim=-1,
    )
    assert a.shape[-1] == C_FEATURES == 39 + 1 + 1 + 3 + 64
    v = norm_linear(z, m.linear_z) + m.linear_a(a)
    for block in m.blocks:
        v = block(v, mask[:, None] & mask)
    expected = m.linear_out(torch.relu(norm(v, m.layer_norm_v)))
    torch.testing.assert_close(m(peptide, z, mask[:, None] & mask), expected)


def test_a_block_of_the_msa_module_is_algorithm_8(exact, peptide):
    block, c = exact.msa_module.blocks[0], exact.config
    mask, n, rows = peptide.token_mask, peptide.num_tokens, 3
    m, z, pair_mask = randn(rows, n, c.c_m), randn(n, n, c.c_z), mask[:, None] & mask
    found = block(m, z, mask.expand(rows, n), mask, pair_mask)

    outer = block.outer_product_mean  # Algorithm 9
    a, b = norm_linear(m, outer.ab).chunk(2, -1)
    mean = torch.einsum("sic,sjd->ijcd", a, b).flatten(-2) / rows
    product = outer.linear_out(torch.where(pair_mask[..., None], mean, 0.0))
    z = z + product
    average = block.pair_weighted_averaging  # Algorithm 10
    v, g = norm_linear(m, average.vg).chunk(2, -1)
    weight = norm_linear(z, average.pair_bias).masked_fill(~mask[:, None], -math.inf).softmax(1)
    width = c.c_msa_head
    heads = [
        torch.einsum("ij,sjc->sic", weight[..., h], v[..., h * width : (h + 1) * width])
        for h in range(c.msa_heads)
    ]
    m = m + average.linear_out(torch.sigmoid(g) * torch.cat(heads, -1))
    m = m + transition(m, block.transition)
    torch.testing.assert_close(found, (m, block.pair_stack(z, pair_mask)))


def test_the_diffusion_module_is_algorithms_20_and_21(exact, peptide):
    m, trunk = exact.diffusion, exact(peptide, generator=seeded(), cycles=1)
    x, t = 10 * randn(2, peptide.num_atoms, 3), torch.tensor([0.5, 40.0], dtype=torch.float64)
    condition = m.condition(peptide, trunk)
    found = m(x, t, peptide, trunk.windows, condition)
    with torch.no_grad():
        ahead = m.before_steps(condition)
        stacks = (m.blocks, *(part.transformer.blocks for part in (m.atom_encoder, m.atom_decoder)))
        assert [len(of.biases) for of in ahead.prepared] == [len(blocks) for blocks in stacks]
        torch.testing.assert_close(m(x, t, peptide, trunk.windows, ahead), found)
        q, *unread = ahead.atoms
        atoms = (q, *(randn(*of.shape) for of in unread))
        other = dataclasses.replace(ahead, z=randn(*ahead.z.shape), atoms=atoms)
        torch.testing.assert_close(m(x, t, peptide, trunk.windows, other), found)

    z = torch.cat([trunk.z, m.relative_position(trunk.relative)], -1)
    z = norm_linear(z, m.pair_in)
    for block in m.pair_transitions:
        z = z + transition(z, block)
    angle = 0.25 * torch.log(t / 16)[:, None] * m.fourier.w + m.fourier.b  # Algorithm 22
    s = norm_linear(torch.cat([trunk.s, trunk.s_inputs], -1), m.single_in)
    s = s + norm_linear(torch.cos(2 * math.pi * angle), m.noise_in)[:, None]
    for block in m.single_transitions:
        s = s + transition(s, block)

    t = t[:, None, None]
    conditions = m.atom_encoder.condition(peptide, trunk.windows, trunk.s, z)
    scaled = x / (t**2 + 16**2).sqrt()
    atoms = m.atom_encoder.encode(peptide, trunk.windows, conditions, scaled)
    a = atoms.tokens + norm_linear(s, m.token_in)
    for block in m.blocks:  # Algorithm 23, with both residuals
        a = a + attention_pair_bias(a, s, z, peptide.token_mask, block.attention_pair_bias)
        a = a + conditioned_transition(a, s, block.transition)
    r = m.atom_decoder(a, m.layer_norm_a, atoms, peptide, trunk.windows)
    expected = 16**2 / (16**2 + t**2) * x + 16 * t / (16**2 + t**2).sqrt() * r
    # The scalings are float32, whatever the model.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_atoms_to_tokens_and_back_are_algorithms_5_and_6(exact, windowed):
    m, decoder = exact.diffusion.atom_encoder, exact.diffusion.atom_decoder
    trunk = exact(windowed, generator=seeded(), cycles=1)
    atoms, mask, token = windowed.num_atoms, windowed.atom_mask, windowed.atom_to_token
    r = randn(2, atoms, 3)
    conditions = m.condition(windowed, trunk.windows, trunk.s, trunk.z)
    found = m.encode(windowed, trunk.windows, conditions, r)

    features = m.pair_embedder
    names = one_hot(windowed.ref_atom_name_chars, 64).flatten(-2)
    known = [windowed.ref_pos, windowed.ref_charge.asinh()[:, None], windowed.ref_mask[:, None]]
    f = torch.cat([*known, one_hot(windowed.ref_element, 128), names], -1).double()
    c = features.linear_c(f) * mask[:, None]
    d = windowed.ref_pos[:, None] - windowed.ref_pos
    same = (windowed.ref_space_uid[:, None] == windowed.ref_space_uid) & mask[:, None] & mask
    same = same[..., None].double()
    inverse = 1 / (1 + d.square().sum(-1, keepdim=True))
    p = features.linear_offset(d) * same + features.linear_distance(inverse) * same
    p = p + features.linear_valid(same) * same
    q = c + m.linear_r(r)
    c = c + norm_linear(trunk.s, m.trunk_s)[token]
    p = p + norm_linear(trunk.z, m.trunk_z)[token][:, token]
    relu = torch.relu
    p = p + m.linear_p_l(relu(c))[:, None] + m.linear_p_m(relu(c))
    one, two, three = (m.pair_mlp[i] for i in (1, 3, 5))
    p = p + three(relu(two(relu(one(relu(p))))))

    centre = 15.5 + 32 * torch.arange(-(-atoms // 32)).repeat_interleave(32)[:atoms]
    band = (torch.arange(atoms) - centre[:, None]).abs() < 64  # Algorithm 7

    def transformer(q, blocks):
        for block in blocks:
            update = attention_pair_bias(q, c, p, band & mask, block.attention_pair_bias)
            q = q + update
            q = q + conditioned_transition(q, c, block.transition)
        return q

    q = transformer(q, m.transformer.blocks)
    a = []
    for i in range(windowed.num_tokens):
        own = relu(m.linear_token(q[:, mask & (token == i)]))
        a.append(own.sum(1) / max(1, own.shape[1]))
    a = torch.stack(a, 1)
    torch.testing.assert_close(found.q[:, mask], q[:, mask])
    torch.testing.assert_close(found.tokens, a)

    a = randn(*a.shape)
    layer_norm_a = exact.diffusion.layer_norm_a
    update = decoder(a, layer_norm_a, found, windowed, trunk.windows)
    q = q + decoder.linear_token(norm(a, layer_norm_a))[:, token]
    expected = norm_linear(transformer(q, decoder.transformer.blocks), decoder.position)
    torch.testing.assert_close(update[:, mask], expected[:, mask])


def test_the_confidence_head_is_algorithm_31(exact, windowed):
    m, n, c = exact.confidence_head, windowed.num_tokens, exact.config
    s_inputs, s, z = randn(n, c.c_s_inputs), randn(n, c.c_s), randn(n, n, c.c_z)
    x, mask = 7 * randn(windowed.num_atoms, 3), windowed.token_mask
    found = m(windowed, s_inputs, s, z, x)
    z = z + m.linear_z_i(s_inputs)[:, None] + m.linear_z_j(s_inputs)
    centre = x[windowed.representative_atom]
    distance = (centre[:, None] - centre).norm(dim=-1)
    edges = np.linspace(3.375, 21.375, 15)
    for bin, low in enumerate(edges):
        high = edges[bin + 1] if bin < 14 else math.inf
        inside = ((distance >= low) & (distance < high)).double()
        z = z + inside[..., None] * m.linear_distance.weight[:, bin]
    s, z = m.pairformer(s, z, mask, mask[:, None] & mask)
    torch.testing.assert_close((found.s, found.z), (s, z))
    torch.testing.assert_close(m.pae_rows(z, z.mT), norm_linear(z, m.pae))
    pde = norm_linear(z + z.transpose(0, 1), m.pde)
    torch.testing.assert_close(m.pde_rows(z, z.transpose(0, 1)), pde)
    for head in (m.plddt, m.resolved):
        logits = head(s, windowed.atom_to_token)
        for atom in range(12):
            token = int(windowed.atom_to_token[atom])
            place = atom - int((windowed.atom_to_token < token).sum())
            expected = norm(s[token], head.layer_norm) @ head.weight[place]
            torch.testing.assert_close(logits[atom], expected)


def test_the_sampler_is_algorithm_18(batch):
    def denoise(x, t):
        return 0.7 * x + torch.tanh(x) / (1 + t)

    steps, samples = 12, 2
    found = sampler.integrate(denoise, batch, seeded(), steps, samples)
    generator, shape = seeded(), (samples, batch.num_atoms, 3)
    u = [i / steps for i in range(steps + 1)]
    top, bottom = 160 ** (1 / 7), 0.0004 ** (1 / 7)
    c = [16 * (top + part * (bottom - top)) ** 7 for part in u]
    assert min(c) < 1 < max(c)  # with and without fresh noise
    x = c[0] * torch.randn(shape, generator=generator)
    # What places the copies is drawn ahead.
    rotations = random_rotations(steps * samples, generator).view(steps, samples, 3, 3)
    shifts = torch.randn(steps, samples, 1, 3, generator=generator)
    for (before, level), rotation, shift in zip(pairwise(c), rotations, shifts, strict=True):
        x = x - x[:, batch.atom_mask].mean(1, keepdim=True)
        x = torch.einsum("sij,saj->sai", rotation, x) + shift
        gamma = 0.8 if level > 1.0 else 0.0
        t = before * (gamma + 1)
        noise = 1.003 * math.sqrt(t**2 - before**2)
        if gamma:
            x = x + noise * torch.randn(shape, generator=generator)
        delta = (x - denoise(x, t)) / t
        x = x + 1.5 * (level - t) * delta
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_noised_copies_are_placed_and_noised_as_in_training():
    batch = data.example_batch("1AS5")
    x, noisy, t = losses._noised_copies(batch, 4000, seeded())
    level = torch.log(t / 16)
    assert abs(level.mean() + 1.2) < 0.1
    assert abs(level.std() - 1.5) < 0.1
    noise = (noisy - x) / t[:, None, None]
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    shift = x[:, batch.resolved].mean(1)  # of the centre, 1 angstrom along each axis
    assert (shift.std(0) - 1).abs().max() < 0.1
    one = batch.positions[batch.resolved]
    spread = (one - one.mean(0)).norm(dim=-1)
    moved = (x[:, batch.resolved] - shift[:, None]).norm(dim=-1)
    torch.testing.assert_close(moved, spread.expand_as(moved), rtol=1e-3, atol=1e-3)
    assert moved.shape[0] == 4000
    assert x[:, 0].mean(0).norm() < 0.1 * spread[0]  # turned every way
