"""The registry of cases: keys, inputs, operations and bytes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megafold.bench import cases

TINY = [
    cases.case("evo_attention", "B2 S3 N8 H2 D8"),
    cases.case("evo_attention", "B2 S1 N4 K12 H2 D8 shared"),
    cases.case("layer_norm_linear", "M10 C8 O6"),
    cases.case("gated_linear", "N6 C8"),
    cases.case("gated_linear", "N6 C8 O12"),
    cases.case("gated", "S2 N5 A8"),
    cases.case("gated", "S2 N5 A8 shared"),
    cases.case("transition", "M10 C8 H24"),
    cases.case("triangle_multiplication", "B2 N6 C8"),
    cases.case("triangle_multiplication", "B2 N6 C8 incoming"),
    cases.case("triangle_attention", "B2 N6 C8 H2"),
    cases.case("triangle_attention", "B2 N6 C8 H3 D4 ending"),
    cases.case("adaptive_layer_norm", "S2 N5 A8 C6"),
    cases.case("pair_block", "N6 C16 H16"),  # widths that its projections need not fill up
    cases.case("conditioned_transition", "S2 N5 A8 C6 H12"),
    cases.case("conditioned_transition", "S2 N5 A8 C6 H12 shared"),
]
each_case = pytest.mark.parametrize("case", TINY, ids=lambda c: f"{c.op}: {c.shape}")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@each_case
@pytest.mark.parametrize("direction", cases.DIRECTIONS)
def test_operations_are_those_that_pytorch_counts(case, direction):
    inputs = case.make_inputs("cpu", torch.float32, seeded())
    for t in cases.differentiable(inputs).values():
        t.requires_grad_(direction == "full")
    with FlopCounterMode(display=False) as counter:
        out = case.run_reference(inputs)
        if direction == "full":
            out.backward(torch.ones_like(out))
    assert case.flops(direction) == counter.get_total_flops()


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tensors(case, dtype):
    inputs = case.make_inputs("cpu", dtype, seeded())
    out = case.run_reference(inputs)
    read = sum(t.nbytes for t in inputs.values())
    assert case.bytes("forward", dtype) == read + out.nbytes
    # What is added to the output is not read again, and its gradient is that of the output.
    again = sum(t.nbytes for name, t in inputs.items() if name != "residual")
    own = {n: t for n, t in cases.differentiable(inputs).items() if n != "residual"}
    gradients = sum(t.nbytes for t in own.values())
    assert case.bytes("full", dtype) == read + out.nbytes + again + out.nbytes + gradients
    assert case.result_bytes("full", dtype) == out.nbytes + gradients


def test_same_generator_gives_the_same_inputs():
    first, second = (TINY[0].make_inputs("cpu", torch.float32, seeded()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bias_stays_fp32_beside_half_inputs():
    inputs = TINY[0].make_inputs("cpu", torch.bfloat16, seeded())
    assert inputs["q"].dtype == torch.bfloat16
    assert inputs["pair_bias"].dtype == torch.float32


def test_a_tenth_of_the_keys_is_masked():
    case = cases.case("evo_attention", "B1 S64 N64 H1 D8")
    mask = case.make_inputs("cpu", torch.float32, seeded())["mask"]
    assert 0.88 < mask.float().mean() < 0.92


def test_dropout_keeps_three_quarters_and_has_no_gradient():
    case = cases.case("gated_linear", "N64 C16")
    inputs = case.make_inputs("cpu", torch.float32, seeded())
    dropout = inputs["dropout"]
    assert set(dropout.unique().tolist()) == {0.0, dropout.max().item()}
    torch.testing.assert_close(dropout.max().item(), 4 / 3)
    assert 0.7 < (dropout > 0).float().mean() < 0.8
    assert list(cases.differentiable(inputs)) == ["x", "gate", "weight", "residual"]


def test_flags_reach_the_operator():
    assert cases.case("triangle_multiplication", "B1 N4 C8").options == {"outgoing": True}
    assert cases.case("triangle_multiplication", "B1 N4 C8 incoming").options == {"outgoing": False}


@pytest.mark.parametrize("scale", ["small", "full"])
def test_every_registered_key_is_a_case(scale):
    registered = cases.registered(scale=scale)
    assert {c.op for c in registered} == set(cases.SHAPES)
    # A gate has no matrix product.
    assert all((c.flops("forward") > 0) == (c.op != "gated") for c in registered)


@pytest.mark.parametrize(
    ("op", "shape", "message"),
    [
        ("softmax", "N4", "unknown operator 'softmax'; choose one of"),
        ("transition", "M4 C8", r"needs M C H, .* missing \['H'\]"),
        ("transition", "M4 C8 H8 X2", r"unknown \['X'\]"),
        ("transition", "M4 C8 H8 incoming", r"unknown \['incoming'\]"),
        ("transition", "M4 C8 8H", "cannot read '8H'"),
    ],
)
def test_keys_that_make_no_case_are_refused(op, shape, message):
    with pytest.raises(ValueError, match=message):
        cases.case(op, shape)


def test_unknown_direction_is_refused():
    with pytest.raises(ValueError, match=r"unknown direction 'backward'; choose one of"):
        TINY[0].flops("backward")
