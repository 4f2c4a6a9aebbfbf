"""Looking rows up: the same values as indexing, and the same gradient every time."""

from __future__ import annotations

import torch

from megafold.model.gather import take
from tests.model.seeds import seeded


def test_it_is_indexing():
    x = torch.randn(3, 5, 4, generator=seeded())
    index = torch.tensor([[4, 0, 0], [1, 2, 4]])
    assert torch.equal(take(x, index, dim=1), x[:, index])
    assert torch.equal(take(x[0], index), x[0][index])


def test_its_gradient_is_bit_identical_with_several_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    try:
        x = torch.randn(50, 64, generator=seeded(), requires_grad=True)
        index = torch.randint(0, 50, (40, 32, 16), generator=seeded())
        weight = torch.randn(40, 32, 16, 64, generator=seeded())
        grads = [torch.autograd.grad((take(x, index) * weight).sum(), x)[0] for _ in range(20)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(grad, grads[0]) for grad in grads)
