"""What is particular to the other four operators."""

from __future__ import annotations

import pytest
import torch

from megafold import ops
from megafold.bench import cases
from tests.numerics import draw


def test_norm_parameters_may_be_left_out():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    ones, zeros = torch.ones(8), torch.zeros(8)
    plain = ops.layer_norm_linear(x, None, None, weight)
    torch.testing.assert_close(plain, ops.layer_norm_linear(x, ones, zeros, weight))
    torch.testing.assert_close(plain, ops.layer_norm_linear(x, None, zeros, weight))
    torch.testing.assert_close(plain, ops.layer_norm_linear(x, ones, None, weight))


def test_linear_bias_is_added():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.ones(3, 8), torch.tensor([1.0, 2.0, 3.0])
    without = ops.layer_norm_linear(x, None, None, weight)
    torch.testing.assert_close(ops.layer_norm_linear(x, None, None, weight, bias), without + bias)


@pytest.mark.parametrize("op", ["layer_norm_linear", "transition"])
def test_any_number_of_leading_dimensions(op):
    case = cases.case(op, "M24 C8 O6" if op == "layer_norm_linear" else "M24 C8 H16")
    inputs, _ = draw(case, torch.float64)
    flat = case.run(inputs)
    folded = case.run({**inputs, "x": inputs["x"].reshape(2, 3, 4, 8)})
    assert folded.shape[:-1] == (2, 3, 4)
    torch.testing.assert_close(folded.flatten(0, 2), flat)
    one = case.run({**inputs, "x": inputs["x"][0]})
    torch.testing.assert_close(one, flat[0])


def test_layer_norm_of_a_shifted_half_input_does_not_cancel():
    # Variance as E[x^2] - E[x]^2 in half precision would be nonsense here.
    x = 100 + torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x = x.half()
    out = ops.layer_norm_linear(x, None, None, torch.eye(64).half())
    exact = ops.reference.layer_norm_linear(x.double(), None, None, torch.eye(64).double())
    torch.testing.assert_close(out.double(), exact, rtol=2**-9, atol=2**-9)


def test_masked_edges_take_no_part_in_any_triangle():
    case = cases.case("triangle_multiplication", "B1 N6 C8")
    inputs, _ = draw(case, torch.float64)
    mask = torch.ones_like(inputs["mask"])
    mask[:, 4:] = mask[:, :, 4:] = False  # two padding tokens
    for outgoing in (True, False):
        padded = {**inputs, "mask": mask}
        out = ops.triangle_multiplication(**padded, outgoing=outgoing)[:, :4, :4]
        cropped = {**inputs, "z": inputs["z"][:, :4, :4], "mask": None}
        torch.testing.assert_close(out, ops.triangle_multiplication(**cropped, outgoing=outgoing))


def test_incoming_is_outgoing_on_the_transposed_pair_representation():
    # a_ki b_kj = (a^T)_ik (b^T)_jk; gate and projections are per edge, so they stay with ij.
    case = cases.case("triangle_multiplication", "B1 N6 C8 incoming")
    inputs, _ = draw(case, torch.float64)
    inputs["g_out_weight"] = torch.zeros_like(inputs["g_out_weight"])  # a gate of 1/2 everywhere
    turned = {**inputs, "z": inputs["z"].transpose(1, 2), "mask": inputs["mask"].transpose(1, 2)}
    torch.testing.assert_close(case.run(inputs), ops.triangle_multiplication(**turned))


def test_triangle_mask_must_be_boolean():
    case = cases.case("triangle_multiplication", "B1 N6 C8")
    inputs, _ = draw(case, torch.float32)
    with pytest.raises(TypeError, match=r"mask must be torch.bool \(True = real\)"):
        case.run({**inputs, "mask": inputs["mask"].float()})


def test_pair_representation_must_be_square():
    case = cases.case("triangle_multiplication", "B1 N6 C8")
    inputs, _ = draw(case, torch.float32)
    with pytest.raises(ValueError, match=r"z has shape \(1, 6, 5, 8\), expected \[B, N, N, C\]"):
        case.run({**inputs, "z": inputs["z"][:, :, :5]})


def test_one_condition_serves_many_samples():
    case = cases.case("adaptive_layer_norm", "S3 N5 A8 C6")
    inputs, _ = draw(case, torch.float64)
    one = inputs["s"][0]
    expected = case.run({**inputs, "s": one.expand(3, 5, 6)})
    torch.testing.assert_close(case.run({**inputs, "s": one}), expected)
    torch.testing.assert_close(case.run({**inputs, "s": one[None]}), expected)


def test_condition_larger_than_what_it_conditions_is_refused():
    case = cases.case("adaptive_layer_norm", "S3 N5 A8 C6")
    inputs, _ = draw(case, torch.float32)
    with pytest.raises(ValueError, match=r"s has shape \(3, 5, 6\), .* a of shape \(1, 5, 8\)"):
        case.run({**inputs, "a": inputs["a"][:1]})
