"""The smooth lDDT in blocks: the plain formula, its gradient, and no tensor over all pairs."""

from __future__ import annotations

import pytest
import torch

from megafold import ops
from megafold.model import smooth_lddt as module
from megafold.model.smooth_lddt import smooth_lddt
from tests.model.largest import LargestTensor
from tests.model.seeds import seeded
from tests.numerics import assert_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def plain(x, true, resolved, radius):
    """Algorithm 27 as it is printed, with everything over copies and pairs."""
    true_distance = (true[:, None] - true).norm(dim=-1)
    difference = x[:, :, None] - x[:, None]
    distance = (difference.square().sum(-1) + 1e-10).sqrt()
    error = (distance - true_distance).abs()
    score = sum(torch.sigmoid(t - error) for t in (0.5, 1.0, 2.0, 4.0)) / 4
    near = (true_distance < radius[:, None]) & resolved[:, None] & resolved
    near = near & ~torch.eye(len(true), dtype=torch.bool, device=true.device)
    return 1 - (score * near).sum((1, 2)) / near.sum()


def example(atoms: int, samples: int = 3, spread: float = 10.0):
    g = seeded()
    true = spread * torch.randn(atoms, 3, generator=g, dtype=torch.float64)
    x = true + torch.randn(samples, atoms, 3, generator=g, dtype=torch.float64)
    resolved = torch.rand(atoms, generator=g) < 0.9
    radius = torch.where(torch.rand(atoms, generator=g) < 0.3, 30.0, 15.0).double()
    return x, true, resolved, radius


def with_gradient(function, x, *rest):
    x = x.detach().clone().requires_grad_()
    loss = function(x, *rest)
    weight = torch.arange(1, len(x) + 1).to(loss)
    (gradient,) = torch.autograd.grad((loss * weight).sum(), x)
    return {"output": loss.detach(), "grad x": gradient}


@pytest.mark.parametrize("atoms", [2, 33, 150])
@pytest.mark.parametrize("entries", [1, 5000, 1 << 22])
def test_it_is_the_plain_formula_and_so_is_its_gradient(monkeypatch, atoms, entries):
    monkeypatch.setattr(module, "BLOCK_ENTRIES", entries)
    x, true, resolved, radius = example(atoms)
    resolved[:2] = True
    exact = with_gradient(plain, x, true, resolved, radius)
    got = with_gradient(smooth_lddt, x, true, resolved, radius)
    for name in exact:
        torch.testing.assert_close(got[name], exact[name], rtol=1e-9, atol=1e-12)


def test_in_float32_it_is_as_accurate_as_the_plain_formula():
    x, true, resolved, radius = example(120)
    # Both are given the same float32 numbers; the truth about these is worked out in float64.
    single, true32 = x.float(), true.float()
    assert_accurate(
        with_gradient(smooth_lddt, single, true32, resolved, radius.float()),
        with_gradient(plain, single, true32, resolved, radius.float()),
        with_gradient(plain, single.double(), true32.double(), resolved, radius),
    )


# Copies enough that errors of a few numbers are not a matter of luck.
@pytest.mark.parametrize(("atoms", "samples"), [(2, 30), (33, 20), (70, 20)])
def test_the_kernel_is_as_accurate_as_the_plain_formula(atoms, samples):
    x, true, resolved, radius = (t.to(DEVICE) for t in example(atoms, samples))
    resolved[:2] = True
    single, true32, radius32 = x.float(), true.float(), radius.float()
    with ops.use("triton"):
        got = with_gradient(smooth_lddt, single, true32, resolved, radius32)
        alone = smooth_lddt(single, true32, resolved, radius32)
    assert torch.equal(alone, got["output"])
    assert_accurate(
        got,
        with_gradient(plain, single, true32, resolved, radius32),
        with_gradient(plain, single.double(), true32.double(), resolved, radius),
    )


def test_no_tensor_over_copies_and_pairs_is_made():
    samples, atoms = 16, 1200
    x, true, resolved, radius = example(atoms, samples, spread=3.0)  # all near each other
    x = x.float().requires_grad_()
    with LargestTensor() as largest:
        smooth_lddt(x, true.float(), resolved, radius.float()).sum().backward()
    assert largest.entries <= module.BLOCK_ENTRIES < samples * atoms * atoms, largest.made_by


def test_memory_for_the_backward_pass_does_not_grow_with_pairs():
    kept = []
    x, true, resolved, radius = example(300)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        smooth_lddt(x.requires_grad_(), true, resolved, radius)
    assert sum(kept) == x.numel()


def test_unresolved_atoms_get_no_gradient_and_change_nothing():
    x, true, resolved, radius = example(40)
    moved = x.clone()
    moved[:, ~resolved] += 100.0
    one = with_gradient(smooth_lddt, x, true, resolved, radius)
    two = with_gradient(smooth_lddt, moved, true, resolved, radius)
    assert torch.equal(one["output"], two["output"])
    assert not two["grad x"][:, ~resolved].any()


def test_without_pairs_the_loss_and_its_gradient_are_zero():
    x, true, resolved, radius = example(5)
    for seen in (torch.zeros_like(resolved), torch.arange(5) == 2):
        got = with_gradient(smooth_lddt, x, true, seen, radius)
        assert not got["output"].any()
        assert not got["grad x"].any()
    empty = smooth_lddt(x[:, :0], true[:0], resolved[:0], radius[:0])
    assert empty.tolist() == [0, 0, 0]


def test_bfloat16_coordinates_are_worked_on_in_float32():
    x, true, resolved, radius = example(20)
    low = x.bfloat16()
    got = smooth_lddt(low, true, resolved, radius)
    assert got.dtype == torch.float32
    assert torch.equal(got, smooth_lddt(low.float(), true, resolved, radius))


def test_bad_shapes_are_named():
    x, true, resolved, radius = example(5)
    with pytest.raises(ValueError, match=r"x must be \[S, A, 3\] and true \[A, 3\]"):
        smooth_lddt(x[0], true, resolved, radius)
    with pytest.raises(ValueError, match=r"resolved and radius must be \[5\]"):
        smooth_lddt(x, true, resolved[:4], radius)
