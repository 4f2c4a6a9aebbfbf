"""The confidence head and what is read off it."""

from __future__ import annotations

import pytest
import torch

from megafold.data.batch import pad_batch
from megafold.model import predict_confidence
from megafold.model.confidence import contact_probabilities
from megafold.model.heads import (
    AtomHead,
    ConfidenceHead,
    distance_breaks,
    distance_classes,
    place_in_token,
)
from tests.model.seeds import seeded


@pytest.fixture
def certain(model):
    """The model with confidence outputs that depend on nothing: every last bin, but for PAE."""
    head: ConfidenceHead = model.confidence_head
    with torch.no_grad():
        for output in (head.pae, head.pde):
            output.layer_norm.weight.zero_()
            output.layer_norm.bias.fill_(1.0)
            output.linear.weight.zero_()
        head.pae.linear.weight[0] = 10.0
        head.pde.linear.weight[-1] = 10.0
        for output in (head.plddt, head.resolved):
            output.layer_norm.weight.zero_()
            output.layer_norm.bias.fill_(1.0)
            output.weight.zero_()
            output.weight[..., -1] = 10.0
    return model


def test_certain_outputs_are_the_middles_of_their_bins(certain, dimer):
    x = dimer.positions[None]
    got = predict_confidence(certain, dimer, x)
    everywhere = torch.ones_like(got.plddt)
    torch.testing.assert_close(got.plddt, 99.0 * everywhere)
    torch.testing.assert_close(got.resolved, everywhere)
    torch.testing.assert_close(got.pae, torch.full_like(got.pae, 0.25))
    torch.testing.assert_close(got.pde, torch.full_like(got.pde, 31.75))
    torch.testing.assert_close(got.gpde, torch.tensor([31.75]))
    n = dimer.num_tokens
    d0 = 1.24 * (n - 15) ** (1 / 3) - 1.8
    expected = torch.tensor([1 / (1 + (0.25 / d0) ** 2)])
    torch.testing.assert_close(got.ptm, expected)
    torch.testing.assert_close(got.iptm, expected)  # the two chains are all of it
    assert got.chain_ids.tolist() == [1, 2]
    torch.testing.assert_close(got.chain_pair_iptm[0, 0, 1], expected[0])
    torch.testing.assert_close(got.ranking_score, expected + 0.5 * got.fraction_disordered)


def test_a_single_chain_has_no_interface(model, batch):
    got = predict_confidence(model, batch, batch.positions[None])
    assert got.iptm.isnan().all()
    assert got.chain_ptm.shape == (1, 1)
    expected = got.ptm + 0.5 * got.fraction_disordered - 100.0 * got.has_clash
    torch.testing.assert_close(got.ranking_score, expected)


def test_every_number_is_in_its_range(model, dimer):
    x = torch.stack([dimer.positions, dimer.positions + 5 * torch.randn(dimer.num_atoms, 3)])
    got = predict_confidence(model, dimer, x)
    n, a = dimer.num_tokens, dimer.num_atoms
    shapes = {"plddt": (2, a), "resolved": (2, a), "pae": (2, n, n), "pde": (2, n, n)}
    assert {name: tuple(getattr(got, name).shape) for name in shapes} == shapes
    for name, top in (("plddt", 100), ("resolved", 1), ("pae", 32), ("pde", 32), ("ptm", 1),
                      ("iptm", 1), ("chain_ptm", 1), ("chain_pair_iptm", 1), ("gpde", 32),
                      ("contact_probs", 1), ("fraction_disordered", 1)):  # fmt: skip
        value = getattr(got, name)
        assert value.dtype == torch.float32, name
        assert 0 <= float(value.min()) <= float(value.max()) <= top, name
    torch.testing.assert_close(got.pde, got.pde.transpose(1, 2))
    torch.testing.assert_close(got.chain_pair_iptm, got.chain_pair_iptm.transpose(1, 2))
    torch.testing.assert_close(got.chain_ptm, got.chain_pair_iptm.diagonal(dim1=1, dim2=2))
    assert not torch.equal(got.pae[0], got.pae[1])


@pytest.mark.parametrize(("tokens", "atoms"), [(5, 9), (0, 60), (5, 60)])
def test_padding_changes_no_confidence(model, batch, tokens, atoms):
    x = batch.positions[None]
    real = predict_confidence(model, batch, x)
    # Padding atoms all belong to one token, and are more than the atoms of any real one.
    padded = pad_batch(batch, batch.num_tokens + tokens, batch.num_atoms + atoms)
    got = predict_confidence(model, padded, torch.nn.functional.pad(x, (0, 0, 0, atoms)))
    a, n = batch.num_atoms, batch.num_tokens
    assert got.plddt[:, a:].isnan().all()
    assert got.pae[:, n:].isnan().all()
    assert got.contact_probs[:, n:].isnan().all()
    for name in ("plddt", "resolved"):
        torch.testing.assert_close(
            getattr(got, name)[:, :a], getattr(real, name), atol=2e-3, rtol=2e-3
        )
    for name in ("pae", "pde"):
        torch.testing.assert_close(
            getattr(got, name)[:, :n, :n], getattr(real, name), atol=2e-3, rtol=2e-3
        )
    for name in ("ptm", "gpde", "fraction_disordered", "ranking_score"):
        torch.testing.assert_close(getattr(got, name), getattr(real, name), atol=2e-3, rtol=2e-3)


def test_where_a_structure_stands_does_not_matter(model, batch):
    x = batch.positions[None]
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=seeded()))[0]
    rotation = rotation * torch.linalg.det(rotation)
    moved = x @ rotation.T + torch.tensor([3.0, -20.0, 7.0])
    trunk = model(batch, generator=seeded(), cycles=1)
    one, two = (predict_confidence(model, batch, c, trunk=trunk) for c in (x, moved))
    for name in ("plddt", "pae", "pde", "ptm", "gpde"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), atol=1e-3, rtol=1e-3)


def test_contacts_are_the_probability_below_eight_angstrom(model, batch):
    trunk = model(batch, generator=seeded(), cycles=1)
    probability = model.distogram_head(trunk.z).softmax(-1)
    upper = torch.cat([distance_breaks(64), torch.tensor([torch.inf])])
    expected = probability[..., upper <= 8.0].sum(-1)
    torch.testing.assert_close(contact_probabilities(model, batch, trunk), expected)


def test_the_model_is_left_in_its_mode(model, batch):
    model.train()
    predict_confidence(model, batch, batch.positions[None])
    assert model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[0], r"coordinates must be \[samples, 185, 3\]"),
        (lambda x: x[:, :-1], r"got \(1, 184, 3\)"),
        (lambda x: x[:0], "holds no sample"),
        (lambda x: x * torch.nan, "not all finite"),
    ],
)
def test_bad_coordinates_are_named(model, batch, change, message):
    with pytest.raises(ValueError, match=message):
        predict_confidence(model, batch, change(batch.positions[None]))


def test_each_place_in_a_token_has_weights_of_its_own():
    head = AtomHead(4, 3, 2)
    torch.nn.init.normal_(head.weight, generator=seeded())
    s, token = torch.randn(3, 4, generator=seeded()), torch.tensor([0, 0, 1, 2, 2, 2])
    place = [0, 1, 0, 0, 1, 2]
    assert place_in_token(token).tolist() == place
    normed = head.layer_norm(s)
    expected = [normed[t] @ head.weight[p] for t, p in zip(token.tolist(), place, strict=True)]
    torch.testing.assert_close(head(s, token), torch.stack(expected))


def test_distances_fall_into_fifteen_classes():
    distance = torch.tensor([0.0, 3.37, 3.38, 12.0, 21.37, 21.38, 300.0])
    classes = distance_classes(distance)
    assert classes.shape == (7, 15)
    assert classes.sum(-1).tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert classes[1:].argmax(-1).tolist() == [0, 0, 6, 13, 14, 14]


def test_the_head_reads_detached_inputs(model, batch):
    trunk = model(batch, generator=seeded(), cycles=1)
    x = batch.positions.clone().requires_grad_()
    seen = model.confidence_head(batch, trunk.s_inputs, trunk.s, trunk.z, x)
    (seen.z.sum() + seen.s.sum()).backward()
    assert x.grad is None
    names = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert names == {"confidence_head"}
