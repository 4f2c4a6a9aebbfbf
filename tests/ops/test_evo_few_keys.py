"""One, two and three keys in half precision, where the gradients of the logits cancel."""

from __future__ import annotations

import pytest

from tests.ops.evo import DTYPES, assert_kernels_accurate, attention


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("keys", [1, 2, 3])
def test_few_keys_in_half_precision(keys, dtype):
    inputs, grad = attention(f"B1 S24 N{keys} H3 D8", dtype)
    assert_kernels_accurate({**inputs, "mask": None}, grad)
