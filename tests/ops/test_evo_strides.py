"""EvoAttention's kernels on views: whatever the strides, the result is that of the values."""

from __future__ import annotations

import pytest
import torch

from megafold.ops.evo_attention import launch
from megafold.ops.evo_attention.tiles import step_of
from tests.numerics import DEVICE
from tests.ops.evo import ONE_DTYPE, assert_kernels_accurate, attention, fused, fused_results

SHAPE = "B2 S2 N17 K20 H2 D8"


def transposed(t):
    """The same values with rows and tokens the other way round in memory."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def spread(t):
    """The same values, every second element of a larger tensor."""
    return torch.stack([t, torch.full_like(t, 7)], dim=-1)[..., 0]


def reversed_in_memory(t):
    """The same values with the dimensions in memory the other way round."""
    turned = tuple(reversed(range(t.dim())))
    return t.permute(turned).contiguous().permute(turned)


def heads_first(t):
    """The same values out of ``[B, S, H, N, D]``."""
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def heads_last(t):
    """A bias cut out of ``[B, N, N, 2 H]``, as a projection of pairs gives it."""
    return torch.cat([t, t], dim=1).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[:, 2:]


def of_a_larger(t):
    """The same values in the middle of a larger tensor."""
    larger = torch.nn.functional.pad(t, (3, 2, 1, 1), value=True)
    return larger[..., 1:-1, 3:-2]


def only(names, change):
    return lambda inputs: {name: change(inputs[name]) for name in names}


QKV = ("q", "k", "v")
VIEWS = {
    "ending node": only(QKV, transposed),
    "heads before tokens": only(QKV, heads_first),
    "width spread": only(QKV, spread),
    "all reversed": only((*QKV, "mask", "pair_bias"), reversed_in_memory),
    "within larger tensors": only((*QKV, "mask", "pair_bias"), of_a_larger),
    "bias of a projection": only(["pair_bias"], heads_last),
    "bias by keys": only(["pair_bias"], lambda t: t.mT.contiguous().mT),
    "bias and mask spread": only(["pair_bias", "mask"], spread),
    "mask expanded": only(["mask"], lambda t: t[:1, :1].expand(t.shape)),
    "one row of bias expanded": only(["pair_bias"], lambda t: t[:, :, :1].expand(t.shape)),
    "one number of bias expanded": only(["pair_bias"], lambda t: t[..., :1, :1].expand(t.shape)),
    "one row of q, k, v expanded": only(QKV, lambda t: t[:, :1].expand(t.shape)),
}


@pytest.mark.parametrize("dtype", ONE_DTYPE)
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_as_accurate_as_eager(view, dtype):
    inputs, grad = attention(SHAPE, dtype)
    views = VIEWS[view](inputs)
    assert any(not t.is_contiguous() for t in views.values())
    assert_kernels_accurate({**inputs, **views}, grad)


@pytest.mark.parametrize("dtype", ONE_DTYPE)
@pytest.mark.parametrize(
    "mask", [slice(None), (slice(None), slice(1)), slice(1)], ids=["own", "of rows", "of batch"]
)
def test_batches_that_share_a_bias_may_lie_anywhere(mask, dtype):
    """The kernel for the bias walks from the last row of a batch entry to the first of the next."""
    inputs, grad = attention(SHAPE, dtype)
    inputs |= VIEWS["ending node"](inputs)
    assert inputs["q"].stride(0) != inputs["q"].shape[1] * inputs["q"].stride(1)
    shared = {"pair_bias": inputs["pair_bias"][:1], "mask": inputs["mask"][mask]}
    assert_kernels_accurate({**inputs, **shared}, transposed(grad))


@pytest.mark.parametrize(
    ("width", "apart", "expected"),
    [
        (24, (24, 24), 8),
        (8, (64, 0), 8),  # heads that are one in memory
        (24, (384, 384), 8),  # heads before tokens
        (48, (48, 48), 1),  # a multiple of 16, as Triton sees
        (24, (24, 28), 1),
        (20, (24, 24), 1),
        (24, (1, 24), 1),
    ],
)
def test_what_triton_is_told_of_heads(width, apart, expected):
    layouts = [((0, 0, 16, step, 1), torch.float16, True) for step in apart]
    assert step_of(width, *layouts) == expected


@pytest.mark.parametrize("change", [transposed, reversed_in_memory])
def test_gradient_of_the_output_of_any_strides(change):
    inputs, grad = attention(SHAPE, torch.float16)
    grad = change(grad)
    assert not grad.is_contiguous()
    assert_kernels_accurate(inputs, grad)


def test_sum_of_the_output_has_an_expanded_gradient():
    inputs, grad = attention("B1 S2 N17 H2 D8")
    ones = torch.ones((), device=DEVICE).expand(grad.shape)
    assert_kernels_accurate(inputs, ones)
    leaves = [inputs[name].requires_grad_() for name in (*QKV, "pair_bias")]
    fused(inputs).sum().backward()
    expected = fused_results(inputs, ones)
    for name, leaf in zip((*QKV, "pair_bias"), leaves, strict=True):
        assert torch.equal(leaf.grad, expected[f"grad {name}"])


def test_q_k_and_v_of_one_projection_get_their_gradients_in_it():
    inputs, grad = attention("B1 S2 N17 H2 D8")
    together = torch.stack([inputs[name] for name in QKV], dim=3).requires_grad_()
    q, k, v = together.unbind(dim=3)
    out = fused({**inputs, "q": q, "k": k, "v": v})
    (of_all,) = torch.autograd.grad(out, together, grad)
    expected = fused_results(inputs, grad)
    torch.testing.assert_close(out, expected["output"])
    for name, of_one in zip(QKV, of_all.unbind(dim=3), strict=True):
        torch.testing.assert_close(of_one, expected[f"grad {name}"])


def test_gradients_of_views_reach_what_they_are_views_of():
    inputs, grad = attention("B1 S5 N5 H2 D8")
    pairs = inputs["pair_bias"].permute(0, 2, 3, 1).contiguous().requires_grad_()  # [B, N, N, H]
    ending = {name: inputs[name].requires_grad_() for name in QKV}
    views = {name: t.transpose(1, 2) for name, t in ending.items()}
    out = fused({**inputs, **views, "pair_bias": pairs.permute(0, 3, 1, 2)}).transpose(1, 2)
    found = torch.autograd.grad(out, [*ending.values(), pairs], grad)
    copies = {name: t.detach().transpose(1, 2).contiguous() for name, t in ending.items()}
    expected = fused_results({**inputs, **copies}, grad.transpose(1, 2).contiguous())
    torch.testing.assert_close(out, expected["output"].transpose(1, 2))
    for name, of_one in zip(QKV, found[:3], strict=True):
        torch.testing.assert_close(of_one, expected[f"grad {name}"].transpose(1, 2))
    torch.testing.assert_close(found[3], expected["grad pair_bias"].permute(0, 2, 3, 1))


def test_calls_alike_in_all_but_alignment():
    """Same strides, then one element further in memory: what is compiled has to differ."""
    inputs, grad = attention("B1 S2 N16 H1 D16", torch.float16)
    expected = fused_results(inputs, grad)

    def shifted(t):
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        return memory[1:].view(t.shape).copy_(t)

    for name in inputs:
        moved = {**inputs, name: shifted(inputs[name])}
        assert moved[name].stride() == inputs[name].stride()
        assert moved[name].data_ptr() % 16
        for result, value in fused_results(moved, grad).items():
            torch.testing.assert_close(value, expected[result], msg=f"{name}: {result}")
    for result, value in fused_results(inputs, shifted(grad)).items():
        torch.testing.assert_close(value, expected[result], msg=f"gradient: {result}")


def test_results_are_contiguous_and_inputs_are_left_as_they_were():
    inputs, grad = attention(SHAPE)
    inputs = {**inputs, **VIEWS["all reversed"](inputs)}
    before = {name: t.clone() for name, t in inputs.items()}
    results = fused_results(inputs, grad)
    assert all(t.is_contiguous() for t in results.values())
    assert all(torch.equal(t, before[name]) for name, t in inputs.items())


@pytest.mark.parametrize("shape", ["B2 S2 N17 K20 H1 D8", "B1 S1 N33 H1 D20"])
def test_every_element_is_written_and_none_beyond(shape, monkeypatch):
    """All memory that a call takes is filled with NaN first, and guarded on both sides."""
    inputs, grad = attention(shape)
    expected = fused_results(inputs, grad)
    plain, beyond, taken = torch.empty, 64, []

    def guarded(size, *, dtype, device):
        number = torch.Size(size).numel()
        memory = plain(number + 2 * beyond, dtype=dtype, device=device).fill_(float("nan"))
        taken.append(memory)
        return memory[beyond : beyond + number].view(size)

    def guarded_like(tensor, *, memory_format):
        return guarded(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    q, k, v, mask, bias = (inputs[name] for name in (*QKV, "mask", "pair_bias"))
    scale = q.shape[-1] ** -0.5
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guarded)
        patch.setattr(torch, "empty_like", guarded_like)
        out, stats = launch.forward(q, k, v, mask, bias, scale)
        gradients = launch.backward(grad, q, k, v, mask, bias, out, stats, scale, [True] * 4)
    for memory in taken:
        assert torch.isnan(memory[:beyond]).all()
        assert torch.isnan(memory[-beyond:]).all()
        assert torch.isfinite(memory[beyond:-beyond]).all()
    assert len(taken) >= 6  # output, statistics, four gradients
    for value, wanted in zip((out, *gradients), expected.values(), strict=True):
        assert torch.equal(value, wanted)
