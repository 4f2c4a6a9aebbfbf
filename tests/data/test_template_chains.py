"""Templates of single chains: laid along the query, drawn, and read by the model."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from megafold.data import DataError, Features, crop, featurize, make_batch
from megafold.data.constants import RESTYPE_INDEX
from megafold.data.template_chains import MAX_STORED, Template, template_from_chain
from megafold.data.templates import draw_templates, first_templates, template_features

GLY, ALA, GAP = (RESTYPE_INDEX[name] for name in ("GLY", "ALA", "GAP"))


def _atoms(count: int) -> dict[str, np.ndarray]:
    """Residues 4 angstrom apart on a line, with atoms at their own offsets."""
    line = np.arange(count)[:, None] * np.array([4.0, 0, 0])
    offsets = {"N": (-0.5, 1.4, 0), "CA": (0, 0, 0), "C": (1.5, 0, 0), "CB": (-0.5, -0.8, 1.2)}
    return {name: (line + offset).astype(np.float32) for name, offset in offsets.items()}


def _template(length: int, rows, template_rows, name: str = "1ABC_A") -> Template:
    size = max(template_rows, default=0) + 1
    restype = np.full(size, ALA, dtype=np.uint8)
    return template_from_chain(name, length, rows, template_rows, restype, _atoms(size))


def test_residues_stand_where_they_are_aligned() -> None:
    template = _template(5, [1, 3], [0, 7])
    assert template.restype.tolist() == [GAP, ALA, GAP, ALA, GAP]
    assert template.backbone_mask.tolist() == [False, True, False, True, False]
    np.testing.assert_allclose(template.backbone[3, 1], [28, 0, 0])
    assert not template.backbone[[0, 2, 4]].any()


def test_the_pseudo_beta_of_glycine_is_its_ca() -> None:
    atoms = _atoms(2)
    atoms["CB"][0] = np.nan
    restype = np.array([GLY, ALA], dtype=np.uint8)
    template = template_from_chain("T", 2, [0, 1], [0, 1], restype, atoms)
    assert template.pseudo_beta_mask.all()
    np.testing.assert_array_equal(template.pseudo_beta[0], atoms["CA"][0])
    np.testing.assert_array_equal(template.pseudo_beta[1], atoms["CB"][1])


def test_unresolved_atoms_are_masked_and_zero() -> None:
    atoms = _atoms(3)
    atoms["CB"][1] = atoms["N"][2] = np.nan
    template = template_from_chain("T", 3, [0, 1, 2], [0, 1, 2], np.full(3, ALA), atoms)
    assert template.pseudo_beta_mask.tolist() == [True, False, True]
    assert template.backbone_mask.tolist() == [True, True, False]
    assert not template.pseudo_beta[1].any()
    assert not template.backbone[2].any()


@pytest.mark.parametrize(
    ("rows", "template_rows", "cause"),
    [
        ([0, 9], [0, 1], "0 to 9 in the query, which has 5"),
        ([0, 1], [-1, 1], "-1 to 1 in the template"),
        ([0, 1], [0], "2 residues aligned to 1"),
    ],
)
def test_an_alignment_that_points_outside_is_refused(rows, template_rows, cause) -> None:
    with pytest.raises(DataError, match=rf"template T: .*{cause}"):
        template_from_chain("T", 5, rows, template_rows, np.full(2, ALA), _atoms(2))


@pytest.fixture(scope="module")
def templated(request) -> Features:
    """1A8O, a dimer of 70 residues, with six templates that cover less and less."""
    structure = request.getfixturevalue("structure_of")("1A8O")
    whole = list(range(70))
    templates = [_template(70, whole[: 70 - 10 * i], whole[: 70 - 10 * i]) for i in range(6)]
    return featurize(structure, templates={"A": templates})


def test_copies_of_a_chain_share_its_templates(templated) -> None:
    assert templated.template_restype.shape == (6, 140)
    np.testing.assert_array_equal(
        templated.template_backbone[:, :70], templated.template_backbone[:, 70:]
    )


def test_a_chain_keeps_its_first_20(structure_of) -> None:
    many = [_template(70, [0], [0])] * 25
    assert len(featurize(structure_of("1A8O"), templates={"A": many}).template_restype) == 20
    assert MAX_STORED == 20


def test_modified_residues_and_ligands_have_none(structure_of) -> None:
    structure = structure_of("1AS5")
    f = featurize(structure, templates={"A": [_template(25, range(25), range(25))]})
    assert (f.template_restype[0, f.is_atom] == GAP).all()
    assert (f.template_restype[0, ~f.is_atom] == ALA).all()


@pytest.mark.parametrize(
    ("chain", "length", "cause"),
    [
        ("A", 69, "laid along 69 residues, chain A of 1A8O has 70"),
        ("Z", 70, "templates of chain Z; 1A8O has"),
    ],
)
def test_templates_of_another_chain_are_refused(chain, length, cause, structure_of) -> None:
    template = _template(length, [0], [0])
    with pytest.raises(DataError, match=cause):
        featurize(structure_of("1A8O"), templates={chain: [template]})


def test_templates_of_a_nucleic_acid_are_refused(structure_of) -> None:
    with pytest.raises(DataError, match="chain A, which is a dna"):
        featurize(structure_of("1LCD"), templates={"A": [_template(11, [0], [0])]})


def test_inference_takes_the_first_four(templated) -> None:
    assert first_templates(templated).tolist() == [[slot] * 140 for slot in range(4)]


def test_training_draws_as_many_as_chance_has_it_up_to_four(templated) -> None:
    """k is the smaller of 4 and a number from 0 to 6: 0 to 3 each in 1 of 7, 4 in 3 of 7."""
    generator, counts = np.random.default_rng(0), Counter()
    for _ in range(700):
        chosen = draw_templates(templated, generator)
        mine = chosen[:, 0]
        counts[int((mine >= 0).sum())] += 1
        assert len(set(mine[mine >= 0].tolist())) == (mine >= 0).sum()
    share = {k: counts[k] / 700 for k in range(5)}
    assert share == pytest.approx({0: 1 / 7, 1: 1 / 7, 2: 1 / 7, 3: 1 / 7, 4: 3 / 7}, abs=0.05)


def test_every_template_is_drawn(templated) -> None:
    generator = np.random.default_rng(0)
    drawn = {t for _ in range(100) for t in draw_templates(templated, generator).ravel().tolist()}
    assert drawn - {-1} == set(range(6))


def test_the_draw_is_the_seeds(templated) -> None:
    one, two = (draw_templates(templated, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_templates_that_do_not_reach_into_the_crop_are_not_chosen(templated) -> None:
    part = templated.select(np.arange(45, 70))  # templates 0 to 2 cover 70, 60 and 50 residues
    assert first_templates(part)[:, 0].tolist() == [0, 1, 2]


def test_features_of_drawn_templates_are_those_of_each_chains_own(templated) -> None:
    chosen = np.repeat([[0, 5], [3, -1]], 70, axis=1).reshape(2, 140)
    arrays = template_features(templated, chosen)
    np.testing.assert_array_equal(arrays["template_restype"][0, :70], [ALA] * 70)
    np.testing.assert_array_equal(
        arrays["template_restype"][0, 70:], templated.template_restype[5, 70:]
    )
    assert (arrays["template_restype"][1, 70:] == GAP).all()
    assert not arrays["template_pseudo_beta_mask"][1, 70:].any()
    assert not arrays["template_backbone_frame_mask"][1, 70:].any()


def test_random_templates_leave_the_rest_of_the_batch_as_it_is(templated) -> None:
    first, random = (
        make_batch(templated, generator=np.random.default_rng(1), random_templates=flag)
        for flag in (False, True)
    )
    assert torch.equal(first.ref_pos, random.ref_pos)
    assert torch.equal(first.msa, random.msa)
    assert not torch.equal(first.template_restype, random.template_restype[:4])


def test_a_template_changes_what_the_model_says_and_an_empty_slot_does_not(templated) -> None:
    from dataclasses import replace

    from megafold.model import AlphaFold3
    from megafold.model.template import TemplateEmbedder

    part = crop(templated, 24, generator=np.random.default_rng(0))
    batch = make_batch(part, generator=np.random.default_rng(0))
    assert batch.template_mask.sum() >= 1
    torch.manual_seed(0)
    model = AlphaFold3.from_name("tiny")
    embedder: TemplateEmbedder = model.template_embedder
    torch.nn.init.normal_(embedder.linear_out.weight)
    z = torch.randn(24, 24, model.config.c_z)
    mask = torch.ones(24, 24, dtype=torch.bool)
    with torch.no_grad():
        seen = embedder(batch, z, mask)
        moved = replace(batch, template_distogram=(batch.template_distogram + 5) % 39)
        assert torch.isfinite(seen).all()
        assert not torch.allclose(seen, embedder(moved, z, mask))
        without = replace(batch, template_mask=torch.zeros_like(batch.template_mask))
        assert not embedder(without, z, mask).any()
