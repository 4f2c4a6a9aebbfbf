"""The error of a result, and the rule for it."""

from __future__ import annotations

import math

import pytest
import torch

from megafold.bench import accuracy, cases

EXACT = torch.tensor([3.0, -4.0], dtype=torch.float64)


def compared(candidate, eager) -> accuracy.Comparison:
    results = ({"output": t} for t in (candidate, eager, EXACT))
    return accuracy.compare(*results)[0]


def test_errors_are_relative_to_the_exact_result():
    mean_square, largest = accuracy.relative_errors(EXACT + torch.tensor([0.3, 0.4]), EXACT)
    assert mean_square == pytest.approx(0.1)
    assert largest == pytest.approx(0.4 / 4)


def test_result_that_is_not_finite_is_infinitely_wrong():
    nan = EXACT.where(EXACT > 0, torch.tensor(float("nan")))
    assert accuracy.relative_errors(nan, EXACT) == (math.inf, math.inf)


def test_zero_where_zero_is_exact_has_no_error_and_anything_else_is_infinitely_wrong():
    zero = torch.zeros(2, dtype=torch.float64)
    assert accuracy.relative_errors(zero, zero) == (0.0, 0.0)
    assert accuracy.relative_errors(EXACT, zero) == (math.inf, math.inf)


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"shapes differ: \(1,\) and \(2,\)"):
        accuracy.relative_errors(EXACT[:1], EXACT)


def test_rule_allows_half_again_the_error_of_eager_and_no_more():
    eager = EXACT * 1.01
    assert compared(EXACT * 1.0149, eager).passes
    assert not compared(EXACT * 1.0151, eager).passes


def test_rule_allows_rounding_once_where_eager_is_exact():
    assert compared(EXACT.float() * (1 + 2e-8), EXACT.float()).passes
    assert not compared(EXACT.float() * (1 + 3e-7), EXACT.float()).passes


def test_one_bad_element_cannot_hide_among_many():
    exact = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eager = exact.bfloat16()
    spoilt = eager.clone()
    spoilt[exact.abs().argmax()] = 0
    comparison = accuracy.compare({"out": spoilt}, {"out": eager}, {"out": exact})[0]
    assert comparison.error > comparison.eager_error
    assert not comparison.passes


def test_results_name_the_output_and_every_gradient():
    case = cases.case("evo_attention", "B1 S1 N3 H1 D8")
    inputs = case.make_inputs("cpu", torch.float32, torch.Generator().manual_seed(0))
    found = accuracy.results(case.run, inputs, torch.ones(case.output_shape))
    assert list(found) == ["output", "grad q", "grad k", "grad v", "grad pair_bias"]
    assert not any(t.requires_grad for t in inputs.values())


def test_what_is_used_of_the_rule_reaches_one_at_its_limit():
    eager = EXACT * 1.01
    assert compared(EXACT * 1.0075, eager).used == pytest.approx(0.5)
    assert compared(EXACT * 1.015, eager).used == pytest.approx(1.0)
    spoilt = EXACT * torch.tensor([1.0, 1.06])  # the largest error counts, too
    assert compared(spoilt, eager).used == pytest.approx(max(0.048 / 0.015, 0.06 / 0.03))


def test_a_case_is_compared_in_the_output_and_every_gradient():
    case = cases.case("evo_attention", "B1 S1 N3 H1 D8")
    found = accuracy.compare_case(case, "cpu", torch.bfloat16)
    assert [c.result for c in found] == [
        "output", "grad q", "grad k", "grad v", "grad pair_bias",
    ]  # fmt: skip
    assert all(c.passes and c.error == c.eager_error > 0 for c in found)
