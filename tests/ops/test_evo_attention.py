"""EvoAttention: masks, sharing of the bias, and the attentions of AlphaFold 3 that it serves."""

from __future__ import annotations

import pytest
import torch

from megafold.ops import evo_attention
from tests.ops import equations


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def drawn(generator, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=generator, dtype=dtype)


def qkv(generator, batch=1, rows=3, queries=4, keys=5, heads=2, width=8, dtype=torch.float64):
    return (
        drawn(generator, batch, rows, queries, heads, width, dtype=dtype).requires_grad_(),
        drawn(generator, batch, rows, keys, heads, width, dtype=dtype).requires_grad_(),
        drawn(generator, batch, rows, keys, heads, width, dtype=dtype).requires_grad_(),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_row_with_every_key_masked_gives_zeros_and_zero_gradients(generator, dtype):
    q, k, v = qkv(generator, dtype=dtype)
    bias = drawn(generator, 1, 2, 4, 5, dtype=dtype).requires_grad_()
    mask = torch.ones(1, 3, 5, dtype=torch.bool)
    mask[0, 1] = False
    out = evo_attention(q, k, v, mask, bias)
    assert (out[0, 1] == 0).all()
    assert (out[0, 0] != 0).all()
    out.sum().backward()
    for leaf in (q, k, v):
        assert (leaf.grad[0, 1] == 0).all()
        assert torch.isfinite(leaf.grad).all()
    alone = bias.detach().requires_grad_()  # the masked row leaves no trace in the bias gradient
    keep = [0, 2]
    evo_attention(q[:, keep], k[:, keep], v[:, keep], None, alone).sum().backward()
    torch.testing.assert_close(bias.grad, alone.grad)


def test_masked_keys_change_nothing(generator):
    q, k, v = qkv(generator)
    mask = torch.tensor([[True, False, True, True, False]]).expand(1, 3, 5)
    out = evo_attention(q, k, v, mask)
    other = torch.where(mask[..., None, None], k, 1e3), torch.where(mask[..., None, None], v, 1e6)
    torch.testing.assert_close(evo_attention(q, *other, mask), out)
    short = (t[:, :, [0, 2, 3]] for t in (k, v))
    torch.testing.assert_close(evo_attention(q, *short), out)


def test_masked_keys_get_no_gradient(generator):
    q, k, v = qkv(generator)
    mask = torch.tensor([[[True, True, False, True, False]]])
    evo_attention(q, k, v, mask).square().sum().backward()
    for grad in (k.grad, v.grad):
        assert (grad[:, :, [2, 4]] == 0).all()
        assert (grad[:, :, [0, 1, 3]] != 0).all()


def test_a_mask_of_true_is_no_mask(generator):
    q, k, v = qkv(generator)
    mask = torch.ones(1, 3, 5, dtype=torch.bool)
    assert torch.equal(evo_attention(q, k, v, mask), evo_attention(q, k, v))


def test_mask_is_shared_over_batch_and_rows_where_they_are_one(generator):
    q, k, v = qkv(generator, batch=2)
    mask = torch.tensor([[[True, False, True, True, False]]])
    for shape in ((1, 1), (2, 1), (1, 3), (2, 3)):
        out = evo_attention(q, k, v, mask.expand(*shape, 5))
        torch.testing.assert_close(out, evo_attention(q, k, v, mask))


def test_bias_shared_over_batch_and_rows_gets_the_summed_gradient(generator):
    q, k, v = qkv(generator, batch=2)
    shared = drawn(generator, 1, 2, 4, 5).requires_grad_()
    own = shared.detach().expand(2, -1, -1, -1).clone().requires_grad_()
    out, out_own = evo_attention(q, k, v, None, shared), evo_attention(q, k, v, None, own)
    torch.testing.assert_close(out, out_own)
    out.square().sum().backward()
    out_own.square().sum().backward()
    torch.testing.assert_close(shared.grad, own.grad.sum(0, keepdim=True))


def test_bias_in_fp32_beside_half_inputs_keeps_its_precision(generator):
    q, k, v = (t.detach() * 0 + 1 for t in qkv(generator, dtype=torch.bfloat16))
    v = torch.arange(5, dtype=torch.bfloat16)[None, None, :, None, None].expand(v.shape)
    bias = torch.zeros(1, 2, 4, 5)
    bias[..., 0] = 1e-3  # lost in bf16 beside logits of 2.8
    out = evo_attention(q, k, v, None, bias)
    expected = equations.evo_attention(q.double(), k.double(), v.double(), None, bias.double())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=0)


def test_scale_defaults_to_one_over_root_of_width(generator):
    q, k, v = qkv(generator, width=16)
    assert torch.equal(evo_attention(q, k, v), evo_attention(q, k, v, scale=0.25))
    torch.testing.assert_close(
        evo_attention(q, k, v, scale=1.5), equations.evo_attention(q, k, v, scale=1.5)
    )


def test_large_logits_do_not_overflow(generator):
    q, k, v = qkv(generator, dtype=torch.float32)
    out = evo_attention(q * 1e3, k * 1e3, v)
    assert torch.isfinite(out).all()


def test_result_is_contiguous(generator):
    q, k, v = qkv(generator)
    assert evo_attention(q, k, v).is_contiguous()


def test_ending_node_is_the_starting_node_on_transposed_views(generator):
    tokens, heads, width = 5, 2, 8
    q, k, v = (drawn(generator, 1, tokens, tokens, heads, width) for _ in range(3))
    bias = drawn(generator, 1, heads, tokens, tokens)  # [h, i, k] for b_ki of the ending node
    out = evo_attention(*(t.transpose(1, 2) for t in (q, k, v)), None, bias).transpose(1, 2)
    # Algorithm 15: edge ij attends to the edges kj that end at the same node.
    logits = torch.einsum("bijhd,bkjhd->bhijk", q, k) * width**-0.5 + bias[:, :, :, None]
    expected = torch.einsum("bhijk,bkjhd->bijhd", logits.softmax(-1), v)
    torch.testing.assert_close(out, expected)


def test_many_samples_on_one_bias_are_each_as_if_alone(generator):
    q, k, v = qkv(generator, rows=4, queries=5)
    bias = drawn(generator, 1, 2, 5, 5)
    together = evo_attention(q, k, v, None, bias)
    for s in range(4):
        one = slice(s, s + 1)
        alone = evo_attention(q[:, one], k[:, one], v[:, one], None, bias)
        torch.testing.assert_close(together[:, one], alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (1, 3, 4, 2, 0)}, r"q has shape \(1, 3, 4, 2, 0\), expected \[B, S, Nq, H, D\]"),
        ({"q": (1, 3, 4, 2, 129)}, r"q has shape \(1, 3, 4, 2, 129\), .* with D from 1 to 128"),
        ({"k": (1, 3, 5, 1, 8)}, r"k has shape \(1, 3, 5, 1, 8\), .* q of shape \(1, 3, 4, 2, 8\)"),
        ({"k": (1, 1, 5, 2, 8)}, r"k has shape \(1, 1, 5, 2, 8\)"),
        ({"v": (1, 3, 6, 2, 8)}, r"v has shape .* Nk = 5 as in k of shape \(1, 3, 5, 2, 8\)"),
        ({"mask": (1, 2, 5)}, r"mask has shape \(1, 2, 5\), expected \[B or 1, S or 1, Nk\]"),
        ({"mask": (3, 5)}, r"mask has shape \(3, 5\)"),
        ({"pair_bias": (1, 2, 5, 4)}, r"pair_bias has shape \(1, 2, 5, 4\), expected .*4, 5"),
        ({"pair_bias": (1, 1, 4, 5)}, r"pair_bias has shape \(1, 1, 4, 5\)"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_shapes_are_refused_with_both_shapes(generator, change, message):
    q, k, v = qkv(generator)
    arguments = {"q": q, "k": k, "v": v}
    for name, shape in change.items():
        arguments[name] = torch.zeros(shape, dtype=torch.bool if name == "mask" else torch.float64)
    with pytest.raises(ValueError, match=message):
        evo_attention(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_masks_that_are_not_boolean_are_refused(generator, dtype):
    q, k, v = qkv(generator)
    with pytest.raises(TypeError, match=r"mask must be torch.bool \(True = real\), got torch"):
        evo_attention(q, k, v, torch.ones(1, 3, 5, dtype=dtype))


def test_dtypes_that_differ_are_refused_by_name(generator):
    arguments = dict(zip(("q", "k", "v"), qkv(generator, dtype=torch.float32), strict=True))
    for name in ("k", "v"):
        with pytest.raises(TypeError, match=rf"{name} is torch.float16, but q is torch.float32"):
            evo_attention(**{**arguments, name: arguments[name].half()})


def test_half_bias_beside_fp32_inputs_is_refused(generator):
    q, k, v = qkv(generator, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"pair_bias is torch.bfloat16, but q is torch.float32"):
        evo_attention(q, k, v, None, torch.zeros(1, 2, 4, 5, dtype=torch.bfloat16))
