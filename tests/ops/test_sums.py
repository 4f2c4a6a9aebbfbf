"""Sums that programs leave, added up."""

from __future__ import annotations

import pytest
import torch

from megafold.ops import sums
from tests.numerics import DEVICE

BLOCKS = [of_gpu[1:] for of_gpu in sums.BLOCKS]
if DEVICE == "cpu":
    BLOCKS.append(sums.INTERPRETED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("count", "shape"), [(1, (3,)), (2, (5, 129)), (65, (128,)), (131, (1,))])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_every_number_is_the_sum_of_its_own(count, shape, dtype, blocks, monkeypatch):
    monkeypatch.setattr(sums, "_blocks", lambda *_: blocks)
    sums._launcher.cache_clear()
    generator = torch.Generator().manual_seed(count)
    two = torch.randn(count, 2, *shape, generator=generator).to(DEVICE)
    for part in (two[:, 0], two[:, 1], two[:, 1].contiguous()):
        total = torch.full(shape, 7.0, dtype=dtype, device=DEVICE)
        sums.add_sums(part, total)
        exact = part.double().sum(0)
        torch.testing.assert_close(total.double(), exact, atol=2e-3 * count**0.5, rtol=1e-3)
    sums._launcher.cache_clear()


def test_the_last_number_is_left_alone_when_it_is_not_ours():
    total = torch.full((5,), 7.0, device=DEVICE)
    sums.add_sums(torch.ones(3, 4, device=DEVICE), total[:4])
    assert total.tolist() == [3.0, 3.0, 3.0, 3.0, 7.0]


@pytest.mark.parametrize("blocks", BLOCKS)
def test_nothing_is_added_where_it_is_done_already(blocks, monkeypatch):
    monkeypatch.setattr(sums, "_blocks", lambda *_: blocks)
    sums._launcher.cache_clear()
    done = torch.tensor(0, dtype=torch.int32, device=DEVICE)
    for is_done, expected in ((0, 3.0), (1, 7.0)):
        total = torch.full((130,), 7.0, device=DEVICE)
        sums.add_sums(torch.ones(3, 130, device=DEVICE), total, done.fill_(is_done))
        assert total.tolist() == [expected] * 130
    sums._launcher.cache_clear()
