"""Growth with size."""

from __future__ import annotations

import pytest
import torch

from megafold.bench import cases, scaling


def test_exponent_of_a_power_is_the_power():
    assert scaling.exponent([1, 2, 4, 8], [5, 40, 320, 2560]) == pytest.approx(3)


def test_exponent_needs_positive_points():
    with pytest.raises(ValueError, match="two points or more, got 1 sizes, 1 values"):
        scaling.exponent([1], [1])
    with pytest.raises(ValueError, match="must be positive"):
        scaling.exponent([1, 2], [0, 1])


def test_terms_of_a_polynomial_are_its_coefficients():
    sizes = [8, 16, 32, 64]
    values = [16 * n**3 + 1536 * n**2 for n in sizes]
    assert scaling.terms(sizes, values, [3, 2]) == pytest.approx({3: 16, 2: 1536})


def test_footprint_of_attention_has_its_cubic_term():
    heads, width = 2, 8
    sizes = (8, 16, 24)
    shapes = [f"B1 S{n} N{n} H{heads} D{width}" for n in sizes]
    prints = [
        scaling.footprint(cases.case("evo_attention", shape), "cpu", torch.float32)
        for shape in shapes
    ]
    assert [p.saved for p in prints] == [
        scaling.kept_bytes(p.case, "cpu", torch.float32) for p in prints
    ]
    found = scaling.terms(sizes, [p.saved for p in prints], [3, 2, 1])
    # The weights in fp32; copies of q, k and v; one bool per row.
    assert found == pytest.approx({3: 4 * heads, 2: 3 * 4 * heads * width, 1: 1})
    assert all(p.peak > p.saved for p in prints)
    floats = 3 * 24 * 24 * heads * width + heads * 24 * 24
    assert prints[-1].inputs == 4 * floats + 24 * 24
