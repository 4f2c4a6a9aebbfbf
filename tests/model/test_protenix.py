"""Weights of Protenix: the table is complete, and what it converts computes the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.functional import layer_norm, linear, one_hot, silu

from megafold.model import CONFIGS, AlphaFold3
from megafold.model.checkpoints import CheckpointError
from megafold.model.embedders import RelativePosition, RelativePositionEncoding
from megafold.model.protenix import from_protenix, to_protenix
from megafold.model.protenix_names import (
    BESIDE,
    DIFFERENCES,
    ONLY_OURS,
    ONLY_THEIRS,
    PRODUCT,
    STACK,
    ZERO,
    Rule,
    pattern,
    rules,
)

# protenix_base_default_v0.5.0, as its repository states it: millions of parameters.
PUBLISHED = 368.09
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"


def shapes_of(config) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter that the table knows of Protenix."""
    with torch.device("meta"):
        ours = {name: tuple(v.shape) for name, v in AlphaFold3(config).state_dict().items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in rules(config):
        shape = ours[rule.ours]
        if rule.how == STACK:
            parts = [(shape[0] // len(rule.theirs), *shape[1:])] * len(rule.theirs)
        elif rule.how == BESIDE:
            parts = [(shape[0], columns) for columns in (3, 1, 385)]
        elif rule.how == PRODUCT:
            parts = [(config.c_z, config.c_s), (config.c_s, config.c_s_inputs)]
        else:
            parts = [] if rule.how == ZERO else [shape]
        for name, part in zip(rule.theirs, parts, strict=True):
            assert shapes.setdefault(name, part) == part
    return shapes


def extra_shapes(config) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of Protenix that we have nothing for."""
    c, s, z = config.c_atom, config.c_s, config.c_z
    of_name = {
        "layernorm_s.weight": (c,), "linear_s.weight": (c, c), "linear_s.bias": (c,),
        "linear_nobias_s.weight": (c, c), "linear_no_bias_u.weight": (z, config.c_template),
        "linear_no_bias_d.weight": (z, 39), "linear_no_bias_d_wo_onehot.weight": (z, 1),
        "lower_bins": (39,), "upper_bins": (39,),
        "input_strunk_ln.weight": (s,), "input_strunk_ln.bias": (s,),
    }  # fmt: skip
    shapes = {}
    for entry in ONLY_THEIRS:
        shape = next(value for end, value in of_name.items() if entry.name.endswith("." + end))
        blocks = range(config.atom_blocks) if "{i}" in entry.name else [0]
        shapes |= {entry.name.replace("{i}", str(i)): shape for i in blocks}
    return shapes


@pytest.fixture
def theirs() -> dict[str, torch.Tensor]:
    """Random weights of a tiny Protenix."""
    config = CONFIGS["tiny"]
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_of(config) | extra_shapes(config)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_table_has_every_parameter_of_ours_once():
    for config in CONFIGS.values():
        with torch.device("meta"):
            names = set(AlphaFold3(config).state_dict())
        listed = [rule.ours for rule in rules(config)]
        assert len(listed) == len(set(listed))
        left = names - set(listed)
        assert set(listed) <= names
        assert all(
            any(pattern(name).startswith(entry.name) for entry in ONLY_OURS) for name in left
        )


def test_the_table_has_as_many_parameters_of_theirs_as_they_publish():
    shapes = shapes_of(CONFIGS["af3"]) | extra_shapes(CONFIGS["af3"])
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert round(total / 1e6, 2) == PUBLISHED


def test_a_state_dict_of_the_full_size_converts_in_names_and_shapes():
    config = CONFIGS["af3"]
    shapes = shapes_of(config) | extra_shapes(config)
    with torch.device("meta"):
        model = AlphaFold3(config)
        converted = from_protenix({n: torch.empty(shape) for n, shape in shapes.items()}, config)
    own = model.state_dict()
    assert all(value.shape == own[name].shape for name, value in converted.state.items())
    left = set(own) - set(converted.state)
    assert {pattern(name).split(".blocks")[0] for name in left} == {
        "template_embedder", "confidence_head.linear_distance.weight",
    }  # fmt: skip
    assert set(converted.missing) == set(ONLY_OURS)
    assert set(converted.unused) == set(ONLY_THEIRS)


def test_there_and_back_nothing_changes(theirs):
    config = CONFIGS["tiny"]
    converted = from_protenix(theirs, config)
    model = AlphaFold3(config)
    model.load_state_dict(converted.state, strict=False)
    back = to_protenix(model.state_dict(), config)
    assert set(back.state) == set(shapes_of(config))
    for name, value in back.state.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=1e-4, msg=name)
    assert set(back.missing) == set(ONLY_THEIRS)


def test_names_of_a_model_trained_in_parallel_are_read(theirs):
    plain = from_protenix(theirs, CONFIGS["tiny"]).state
    wrapped = {f"module.{name}": value for name, value in theirs.items()}
    again = from_protenix(wrapped, CONFIGS["tiny"]).state
    assert all(torch.equal(again[name], value) for name, value in plain.items())


def loaded(theirs) -> AlphaFold3:
    model = AlphaFold3.from_name("tiny")
    model.load_state_dict(from_protenix(theirs, model.config).state, strict=False)
    return model.eval()


def test_pairs_of_the_input_are_embedded_from_s_init(theirs):
    model = loaded(theirs).input_embedder
    s_inputs = torch.randn(5, model.linear_s.in_features)
    s_init = linear(s_inputs, theirs["linear_no_bias_sinit.weight"])
    expected = linear(s_init, theirs["linear_no_bias_zinit1.weight"])
    torch.testing.assert_close(model.linear_z_i(s_inputs), expected, atol=1e-4, rtol=1e-4)


def test_logits_of_distances_are_theirs(theirs):
    head = loaded(theirs).distogram_head
    z = torch.randn(4, 4, head.linear.in_features)
    weight, bias = (theirs[f"distogram_head.linear.{name}"] for name in ("weight", "bias"))
    logits = linear(z, weight, bias)
    torch.testing.assert_close(head(z), logits + logits.transpose(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("outgoing", [True, False])
def test_triangle_multiplication_is_theirs(theirs, outgoing):
    kind = "outgoing" if outgoing else "incoming"
    module = getattr(
        loaded(theirs).pairformer.blocks[1].pair_stack, f"triangle_multiplication_{kind}"
    )
    name = f"pairformer_stack.blocks.1.tri_mul_{'out' if outgoing else 'in'}"
    w = {n.removeprefix(name + "."): v for n, v in theirs.items() if n.startswith(name + ".")}
    z = torch.randn(6, 6, 32)
    norm = layer_norm(z, (32,), w["layer_norm_in.weight"], w["layer_norm_in.bias"])
    a, b = (
        torch.sigmoid(linear(norm, w[f"linear_{side}_g.weight"]))
        * linear(norm, w[f"linear_{side}_p.weight"])
        for side in ("a", "b")
    )
    x = torch.einsum("ikc,jkc->ijc" if outgoing else "kic,kjc->ijc", a, b)
    x = layer_norm(x, (32,), w["layer_norm_out.weight"], w["layer_norm_out.bias"])
    expected = linear(x, w["linear_z.weight"]) * torch.sigmoid(linear(norm, w["linear_g.weight"]))
    got = module(z, torch.ones(6, 6, dtype=torch.bool))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_conditioned_transition_is_theirs(theirs):
    module = loaded(theirs).diffusion.blocks[2].transition
    name = "diffusion_module.diffusion_transformer.blocks.2.conditioned_transition_block."
    w = {n.removeprefix(name): v for n, v in theirs.items() if n.startswith(name)}
    a, s = torch.randn(3, 96), torch.randn(3, 64)
    cond = layer_norm(s, (64,), w["adaln.layernorm_s.weight"])
    gate = linear(cond, w["adaln.linear_s.weight"], w["adaln.linear_s.bias"])
    x = torch.sigmoid(gate) * layer_norm(a, (96,)) + linear(cond, w["adaln.linear_nobias_s.weight"])
    b = silu(linear(x, w["linear_nobias_a1.weight"])) * linear(x, w["linear_nobias_a2.weight"])
    scale = torch.sigmoid(linear(s, w["linear_s.weight"], w["linear_s.bias"]))
    expected = scale * linear(b, w["linear_nobias_b.weight"])
    torch.testing.assert_close(module(a, s), expected, atol=1e-4, rtol=1e-4)


def test_relative_positions_are_theirs_where_copies_are_numbered_alike(theirs, dimer):
    """Their classes: offset 0 within a chain, the last between entities."""
    weight = theirs["relative_position_encoding.linear_no_bias.weight"]
    encoding = RelativePositionEncoding(32)
    encoding.load_state_dict(
        {"linear.weight": loaded(theirs).input_embedder.relative_position.linear.weight}
    )
    # Two copies of a chain; the last ten tokens of the second as an entity of their own.
    entity = dimer.entity_id.clone()
    asym, sym = dimer.asym_id.clone(), dimer.sym_id.clone()
    entity[-10:], asym[-10:], sym[-10:] = 2, 3, 1
    batch = dataclasses.replace(dimer, entity_id=entity, asym_id=asym, sym_id=sym)
    relative = RelativePosition.of(batch)
    same_entity = entity[:, None] == entity
    chain = torch.where(same_entity, (sym[:, None] - sym + 2).clamp(0, 4), 5)
    features = torch.cat(
        [one_hot(relative.residue, 66), one_hot(relative.token, 66), same_entity[..., None],
         one_hot(chain, 6)], dim=-1,
    ).float()  # fmt: skip
    expected = linear(features, weight)
    # The exception that DIFFERENCES names: entities that differ, copy numbers that differ.
    alike = same_entity | (sym[:, None] == sym)
    assert alike.float().mean() > 0.5
    assert (~alike).any()
    got = encoding(relative)
    torch.testing.assert_close(got[alike], expected[alike], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got[~alike], expected[~alike], atol=1e-2)


def test_whatever_does_not_fit_is_named(theirs):
    config = CONFIGS["tiny"]
    with pytest.raises(CheckpointError, match=r"1 weights of Protenix missing: layernorm_s\.bias"):
        from_protenix({n: v for n, v in theirs.items() if n != "layernorm_s.bias"}, config)
    with pytest.raises(CheckpointError, match=r"not in the table: esm\.weight, linear_esm\.w"):
        from_protenix(theirs | {"linear_esm.weight": None, "esm.weight": None}, config)
    wrong = theirs | {"linear_no_bias_s.weight": torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match=r"recycle_s\.linear\.weight .* is \(3, 3\)"):
        from_protenix(wrong, config)
    with pytest.raises(CheckpointError, match="of other shapes"):
        from_protenix(theirs, dataclasses.replace(config, c_z=64))


def test_weights_that_they_cannot_have_are_named(theirs):
    model = loaded(theirs)
    with torch.no_grad():
        model.diffusion.token_in.layer_norm.bias += 1.0
        model.input_embedder.linear_z_j.weight += torch.randn(32, 129)
    with pytest.raises(CheckpointError) as raised:
        to_protenix(model.state_dict(), model.config)
    text = str(raised.value)
    assert "Protenix cannot have 2 weights" in text
    assert "diffusion.token_in.layer_norm.bias is not zero" in text
    assert "input_embedder.linear_z_j.weight is no product" in text


def documented() -> set[str]:
    return {line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if "|" in line}


def row(rule: Rule) -> str:
    theirs = " and ".join(f"`{pattern(name)}`" for name in rule.theirs) or "none"
    return f"| `{pattern(rule.ours)}` | {theirs} | {rule.how} |"


def test_the_document_has_the_table():
    lines = documented()
    expected = {row(rule) for rule in rules(CONFIGS["af3"])}
    expected |= {f"| `{entry.name}` | {entry.reason} |" for entry in (*ONLY_OURS, *ONLY_THEIRS)}
    assert sorted(expected - lines) == []
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(difference in text for difference in DIFFERENCES)
