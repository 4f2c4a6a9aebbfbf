"""Our parameters and Protenix's, name by name.

Protenix (ByteDance, Apache licence) is an open model of AlphaFold 3's class with open weights; the
names are those of its base model, version 0.5.0. ``{i}`` in a pattern is the number of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megafold.model.config import ModelConfig

# How one of ours follows from theirs.
SAME = "same"  # the tensor itself
STACK = "stack"  # theirs one below the other (dimension 0)
BESIDE = "beside"  # theirs side by side (dimension 1)
PRODUCT = "product"  # ours = first @ second: they apply two linear layers where we apply one
TWICE = "twice"  # ours = 2 * theirs
SWAP = "swap"  # columns for the restypes of i and of j the other way round
ZERO = "zero"  # they add nothing there: ours is zero
CHAINS = "chains"  # columns for the same chain and for another entity the other way round


@dataclass(frozen=True)
class Rule:
    """One parameter of ours and those of Protenix that it follows from."""

    ours: str
    theirs: tuple[str, ...]  # empty for ZERO
    how: str = SAME


@dataclass(frozen=True)
class Unmatched:
    """A parameter of one side that the other has nothing for."""

    name: str  # may hold {i}
    reason: str


def rules(config: ModelConfig) -> list[Rule]:
    """The rule of every parameter of ours that Protenix has a counterpart for."""
    return [
        *_input_embedder(config),
        *_trunk(config),
        *_msa_module(config),
        *_blocks("pairformer.blocks", "pairformer_stack.blocks", config.pairformer_blocks),
        *_diffusion(config),
        Rule("distogram_head.linear.weight", ("distogram_head.linear.weight",)),
        # They add logits to their transpose after the bias, we add before it.
        Rule("distogram_head.linear.bias", ("distogram_head.linear.bias",), TWICE),
        *_confidence_head(config),
    ]


def pattern(name: str) -> str:
    """A name with the numbers of repeated blocks replaced by ``{i}``."""
    parts = name.split(".")
    return ".".join(
        "{i}" if part.isdigit() and parts[k - 1] == "blocks" else part
        for k, part in enumerate(parts)
    )


_TEMPLATE_REASON = "version 0.5.0 has no template blocks and adds nothing for templates"
_DISTANCE_REASON = (
    "AlphaFold 3 describes 15 bins from 3.375 to 21.375 angstrom, Protenix has 39 from 3.25 to 52 "
    "and the distance itself"
)
_KEY_NORM_REASON = (
    "Protenix normalises keys and values once more, from the normalised queries, with weights of "
    "their own"
)
ONLY_OURS = (
    Unmatched("template_embedder.blocks.{i}", _TEMPLATE_REASON),
    Unmatched("confidence_head.linear_distance.weight", _DISTANCE_REASON),
)
ONLY_THEIRS = (
    Unmatched("template_embedder.linear_no_bias_u.weight", f"not used: {_TEMPLATE_REASON}"),
    *(
        Unmatched(
            f"{stack}.atom_transformer.diffusion_transformer.blocks.{{i}}"
            f".attention_pair_bias.layernorm_kv.{name}",
            _KEY_NORM_REASON,
        )
        for stack in (
            "input_embedder.atom_attention_encoder",
            "diffusion_module.atom_attention_encoder",
            "diffusion_module.atom_attention_decoder",
        )
        for name in ("layernorm_s.weight", "linear_s.weight", "linear_s.bias",
                     "linear_nobias_s.weight")
    ),
    Unmatched("confidence_head.linear_no_bias_d.weight", _DISTANCE_REASON),
    Unmatched("confidence_head.linear_no_bias_d_wo_onehot.weight", _DISTANCE_REASON),
    Unmatched("confidence_head.lower_bins", "constant edges of those bins"),
    Unmatched("confidence_head.upper_bins", "constant edges of those bins"),
    *(
        Unmatched(
            f"confidence_head.input_strunk_ln.{name}",
            "Protenix normalises the single representation before the confidence head",
        )
        for name in ("weight", "bias")
    ),
)  # fmt: skip
# What is computed differently from the same weights, so that outputs differ.
DIFFERENCES = (
    "Relative chain positions: our last class is the same chain, theirs another entity. With the "
    "columns exchanged both agree, but for chains of different entities that have different copy "
    "numbers.",
    "Outer product mean: they divide the layer's bias, too, by the number of alignment rows.",
    "Diffusion, atom queries: theirs start from the conformer and the trunk, ours, as in the "
    "supplement, from the conformer alone.",
    "Templates: they average over all slots, we over those in use.",
)


def _pairs(ours: str, theirs: str, **names: str) -> Iterator[Rule]:
    """Rules of weights of modules: ours=theirs, ``__`` for a dot."""
    for name, other in names.items():
        yield Rule(f"{ours}.{name.replace('__', '.')}", (f"{theirs}.{other.replace('__', '.')}",))


def _norm(ours: str, theirs: str) -> Iterator[Rule]:
    yield from _pairs(ours, theirs, weight="weight", bias="bias")


def _norm_linear(ours: str, norm: str, linear: str, *, bias: bool) -> Iterator[Rule]:
    """A LayerNorm and a linear layer; without ``bias`` their LayerNorm has no offset."""
    yield Rule(f"{ours}.layer_norm.weight", (f"{norm}.weight",))
    if bias:
        yield Rule(f"{ours}.layer_norm.bias", (f"{norm}.bias",))
    else:
        yield Rule(f"{ours}.layer_norm.bias", (), ZERO)
    yield Rule(f"{ours}.linear.weight", (f"{linear}.weight",))


def _transition(ours: str, theirs: str) -> Iterator[Rule]:
    yield from _norm(f"{ours}.layer_norm", f"{theirs}.layernorm1")
    yield from _pairs(
        ours, theirs,
        linear_gate__weight="linear_no_bias_a__weight",
        linear_value__weight="linear_no_bias_b__weight",
        linear_out__weight="linear_no_bias__weight",
    )  # fmt: skip


def _adaptive_norm(ours: str, theirs: str) -> Iterator[Rule]:
    yield from _pairs(
        ours, theirs,
        layer_norm_s__weight="layernorm_s__weight",
        linear_gate__weight="linear_s__weight",
        linear_gate__bias="linear_s__bias",
        linear_shift__weight="linear_nobias_s__weight",
    )  # fmt: skip


def _attention(ours: str, theirs: str, *, conditioned: bool) -> Iterator[Rule]:
    if conditioned:
        yield from _adaptive_norm(f"{ours}.norm", f"{theirs}.layernorm_a")
        yield from _pairs(
            ours, theirs,
            linear_scale__weight="linear_a_last__weight", linear_scale__bias="linear_a_last__bias",
        )  # fmt: skip
    else:
        yield from _norm(f"{ours}.norm", f"{theirs}.layernorm_a")
    yield from _pairs(
        ours, f"{theirs}.attention",
        linear_q__weight="linear_q__weight", linear_q__bias="linear_q__bias",
        linear_k__weight="linear_k__weight", linear_v__weight="linear_v__weight",
        linear_g__weight="linear_g__weight", linear_out__weight="linear_o__weight",
    )  # fmt: skip
    yield from _norm_linear(
        f"{ours}.pair_bias", f"{theirs}.layernorm_z", f"{theirs}.linear_nobias_z",
        bias=not conditioned,
    )  # fmt: skip


def _conditioned_transition(ours: str, theirs: str) -> Iterator[Rule]:
    yield from _adaptive_norm(f"{ours}.adaptive_layer_norm", f"{theirs}.adaln")
    yield from _pairs(
        ours, theirs,
        linear_gate__weight="linear_nobias_a1__weight",
        linear_value__weight="linear_nobias_a2__weight",
        linear_out__weight="linear_nobias_b__weight",
        linear_scale__weight="linear_s__weight", linear_scale__bias="linear_s__bias",
    )  # fmt: skip


def _transformer(ours: str, theirs: str, blocks: int) -> Iterator[Rule]:
    for i in range(blocks):
        mine, other = f"{ours}.{i}", f"{theirs}.{i}"
        yield from _attention(
            f"{mine}.attention_pair_bias", f"{other}.attention_pair_bias", conditioned=True
        )
        yield from _conditioned_transition(
            f"{mine}.transition", f"{other}.conditioned_transition_block"
        )


def _pair_stack(ours: str, theirs: str) -> Iterator[Rule]:
    for mine, other in (("outgoing", "tri_mul_out"), ("incoming", "tri_mul_in")):
        here, there = f"{ours}.triangle_multiplication_{mine}", f"{theirs}.{other}"
        yield from _norm(f"{here}.layer_norm_in", f"{there}.layer_norm_in")
        yield from _norm(f"{here}.layer_norm_out", f"{there}.layer_norm_out")
        for kind in ("p", "g"):
            two = tuple(f"{there}.linear_{side}_{kind}.weight" for side in ("a", "b"))
            yield Rule(f"{here}.linear_{kind}_in.weight", two, STACK)
        yield from _pairs(
            here, there, linear_p_out__weight="linear_z__weight",
            linear_g_out__weight="linear_g__weight",
        )  # fmt: skip
    for mine, other in (("starting", "tri_att_start"), ("ending", "tri_att_end")):
        here, there = f"{ours}.triangle_attention_{mine}", f"{theirs}.{other}"
        yield from _norm(f"{here}.layer_norm", f"{there}.layer_norm")
        yield Rule(f"{here}.linear_b.weight", (f"{there}.linear.weight",))
        for mine_layer, other_layer in (("q", "q"), ("k", "k"), ("v", "v"), ("g", "g"),
                                        ("out", "o")):  # fmt: skip
            yield Rule(
                f"{here}.linear_{mine_layer}.weight", (f"{there}.mha.linear_{other_layer}.weight",)
            )
    yield from _transition(f"{ours}.transition", f"{theirs}.pair_transition")


def _blocks(ours: str, theirs: str, blocks: int) -> Iterator[Rule]:
    """Pairformer blocks."""
    for i in range(blocks):
        mine, other = f"{ours}.{i}", f"{theirs}.{i}"
        yield from _pair_stack(f"{mine}.pair_stack", other)
        yield from _attention(
            f"{mine}.attention_pair_bias", f"{other}.attention_pair_bias", conditioned=False
        )
        yield from _transition(f"{mine}.transition", f"{other}.single_transition")


def _atom_encoder(ours: str, theirs: str, config: ModelConfig) -> Iterator[Rule]:
    features = tuple(
        f"{theirs}.linear_no_bias_{name}.weight" for name in ("ref_pos", "ref_charge", "f")
    )
    yield Rule(f"{ours}.pair_embedder.linear_c.weight", features, BESIDE)
    yield from _pairs(
        ours, theirs,
        pair_embedder__linear_offset__weight="linear_no_bias_d__weight",
        pair_embedder__linear_distance__weight="linear_no_bias_invd__weight",
        pair_embedder__linear_valid__weight="linear_no_bias_v__weight",
        linear_p_l__weight="linear_no_bias_cl__weight",
        linear_p_m__weight="linear_no_bias_cm__weight",
        pair_mlp__1__weight="small_mlp__1__weight",
        pair_mlp__3__weight="small_mlp__3__weight",
        pair_mlp__5__weight="small_mlp__5__weight",
        linear_token__weight="linear_no_bias_q__weight",
    )  # fmt: skip
    yield from _transformer(
        f"{ours}.transformer.blocks",
        f"{theirs}.atom_transformer.diffusion_transformer.blocks",
        config.atom_blocks,
    )


def _input_embedder(config: ModelConfig) -> Iterator[Rule]:
    yield from _atom_encoder(
        "input_embedder.atom_encoder", "input_embedder.atom_attention_encoder", config
    )
    first = "linear_no_bias_sinit.weight"
    yield Rule("input_embedder.linear_s.weight", (first,))
    # They embed pairs from s_init, which is linear in s_inputs, from which we embed them.
    for mine, other in (("i", "1"), ("j", "2")):
        theirs = (f"linear_no_bias_zinit{other}.weight", first)
        yield Rule(f"input_embedder.linear_z_{mine}.weight", theirs, PRODUCT)
    yield Rule(
        "input_embedder.relative_position.linear.weight",
        ("relative_position_encoding.linear_no_bias.weight",),
        CHAINS,
    )
    yield Rule("input_embedder.linear_bonds.weight", ("linear_no_bias_token_bond.weight",))


def _trunk(config: ModelConfig) -> Iterator[Rule]:
    yield from _norm_linear("recycle_z", "layernorm_z_cycle", "linear_no_bias_z_cycle", bias=True)
    yield from _norm_linear("recycle_s", "layernorm_s", "linear_no_bias_s", bias=True)
    name = "template_embedder"
    yield from _norm_linear(
        f"{name}.linear_z", f"{name}.layernorm_z", f"{name}.linear_no_bias_z", bias=True
    )
    yield Rule(f"{name}.linear_a.weight", (f"{name}.linear_no_bias_a.weight",), SWAP)
    yield from _norm(f"{name}.layer_norm_v", f"{name}.layernorm_v")
    yield Rule(f"{name}.linear_out.weight", (), ZERO)


def _msa_module(config: ModelConfig) -> Iterator[Rule]:
    name = "msa_module"
    yield from _pairs(
        name, name, linear_m__weight="linear_no_bias_m__weight",
        linear_s__weight="linear_no_bias_s__weight",
    )  # fmt: skip
    for i in range(config.msa_blocks):
        block = f"{name}.blocks.{i}"
        ours, theirs = f"{block}.outer_product_mean", f"{block}.outer_product_mean_msa"
        yield from _norm(f"{ours}.ab.layer_norm", f"{theirs}.layer_norm")
        two = (f"{theirs}.linear_1.weight", f"{theirs}.linear_2.weight")
        yield Rule(f"{ours}.ab.linear.weight", two, STACK)
        yield from _norm(f"{ours}.linear_out", f"{theirs}.linear_out")
        if i < config.msa_blocks - 1:
            ours = f"{block}.pair_weighted_averaging"
            theirs = f"{block}.msa_stack.msa_pair_weighted_averaging"
            yield from _norm(f"{ours}.vg.layer_norm", f"{theirs}.layernorm_m")
            two = (f"{theirs}.linear_no_bias_mv.weight", f"{theirs}.linear_no_bias_mg.weight")
            yield Rule(f"{ours}.vg.linear.weight", two, STACK)
            yield from _norm_linear(
                f"{ours}.pair_bias", f"{theirs}.layernorm_z", f"{theirs}.linear_no_bias_z",
                bias=True,
            )  # fmt: skip
            yield Rule(f"{ours}.linear_out.weight", (f"{theirs}.linear_no_bias_out.weight",))
            yield from _transition(f"{block}.transition", f"{block}.msa_stack.transition_m")
        yield from _pair_stack(f"{block}.pair_stack", f"{block}.pair_stack")


def _diffusion(config: ModelConfig) -> Iterator[Rule]:
    ours, theirs = "diffusion", "diffusion_module.diffusion_conditioning"
    relpe = f"{theirs}.relpe.linear_no_bias.weight"
    yield Rule(f"{ours}.relative_position.linear.weight", (relpe,), CHAINS)
    for mine, letter in (("pair", "z"), ("single", "s"), ("noise", "n")):
        yield from _norm_linear(
            f"{ours}.{mine}_in", f"{theirs}.layernorm_{letter}",
            f"{theirs}.linear_no_bias_{letter}", bias=False,
        )  # fmt: skip
    for mine, letter in (("pair", "z"), ("single", "s")):
        for i in range(2):
            yield from _transition(
                f"{ours}.{mine}_transitions.{i}", f"{theirs}.transition_{letter}{i + 1}"
            )
    yield from _pairs(f"{ours}.fourier", f"{theirs}.fourier_embedding", w="w", b="b")
    theirs = "diffusion_module"
    encoder, other = f"{ours}.atom_encoder", f"{theirs}.atom_attention_encoder"
    yield from _atom_encoder(encoder, other, config)
    for letter in ("s", "z"):
        yield from _norm_linear(
            f"{encoder}.trunk_{letter}", f"{other}.layernorm_{letter}",
            f"{other}.linear_no_bias_{letter}", bias=False,
        )  # fmt: skip
    yield Rule(f"{encoder}.linear_r.weight", (f"{other}.linear_no_bias_r.weight",))
    yield from _norm_linear(
        f"{ours}.token_in", f"{theirs}.layernorm_s", f"{theirs}.linear_no_bias_s", bias=False
    )
    yield from _transformer(
        f"{ours}.blocks", f"{theirs}.diffusion_transformer.blocks", config.diffusion_blocks
    )
    yield Rule(f"{ours}.layer_norm_a.weight", (f"{theirs}.layernorm_a.weight",))
    yield Rule(f"{ours}.layer_norm_a.bias", (), ZERO)
    decoder, other = f"{ours}.atom_decoder", f"{theirs}.atom_attention_decoder"
    yield Rule(f"{decoder}.linear_token.weight", (f"{other}.linear_no_bias_a.weight",))
    yield from _transformer(
        f"{decoder}.transformer.blocks",
        f"{other}.atom_transformer.diffusion_transformer.blocks",
        config.atom_blocks,
    )
    yield from _norm_linear(
        f"{decoder}.position", f"{other}.layernorm_q", f"{other}.linear_no_bias_out", bias=False
    )


def _confidence_head(config: ModelConfig) -> Iterator[Rule]:
    name = "confidence_head"
    # Their first layer is for the second token of a pair.
    yield from _pairs(
        name, name, linear_z_i__weight="linear_no_bias_s2__weight",
        linear_z_j__weight="linear_no_bias_s1__weight",
    )  # fmt: skip
    yield from _blocks(
        f"{name}.pairformer.blocks", f"{name}.pairformer_stack.blocks", config.confidence_blocks
    )
    for head in ("pae", "pde"):
        yield from _norm_linear(
            f"{name}.{head}", f"{name}.{head}_ln", f"{name}.linear_no_bias_{head}", bias=True
        )
    for head in ("plddt", "resolved"):
        yield from _norm(f"{name}.{head}.layer_norm", f"{name}.{head}_ln")
        yield Rule(f"{name}.{head}.weight", (f"{name}.{head}_weight",))
