"""The heat map of the aligned error."""

from __future__ import annotations

import numpy as np
import pytest

from megafold.viz.confidence_figures import aligned_error


def test_the_error_is_drawn_row_by_row_with_lines_between_chains():
    pae = np.arange(16.0).reshape(4, 4)
    pae[3, 3] = np.nan
    figure = aligned_error(pae, ["A", "A", "B", "C"])
    np.testing.assert_array_equal(figure.data[0].z, pae.astype(np.float32))
    assert (figure.data[0].zmin, figure.data[0].zmax) == (0, 31.75)
    assert [line.y0 for line in figure.layout.shapes if line.y0 == line.y1] == [2.5, 3.5]
    assert [line.x0 for line in figure.layout.shapes if line.x0 == line.x1] == [2.5, 3.5]
    assert figure.layout.yaxis.autorange == "reversed"


def test_one_chain_has_no_line():
    assert not aligned_error(np.zeros((2, 2)), ["A", "A"]).layout.shapes


def test_shapes_that_do_not_agree_are_named():
    with pytest.raises(ValueError, match=r"pae is \(2, 3\), but there are 2 tokens"):
        aligned_error(np.zeros((2, 3)), ["A", "A"])
