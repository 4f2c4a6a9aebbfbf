"""Attention under the names of other libraries: each against its own equation, in its layout."""

from __future__ import annotations

import pytest
import torch

from megafold import compat, ops
from megafold.bench import accuracy
from tests.numerics import DEVICE, assert_accurate

INF = float("inf")
EVOFORMERS = ("DS4Sci_EvoformerAttention", "TritonEvoformer")
each_evoformer = pytest.mark.parametrize("name", EVOFORMERS)
each_implementation = pytest.mark.parametrize("implementation", ["torch", "triton"])


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def drawn(generator, *shape):
    return torch.randn(shape, generator=generator).to(DEVICE)


def kept(generator, *shape):
    """A boolean mask that leaves no row without a key."""
    mask = torch.rand(shape, generator=generator) > 0.3
    mask[..., 0] = True
    return mask.to(DEVICE)


def additive(mask, value=-INF, dtype=torch.float32):
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, value)


def deepspeed(Q, K, V, mask=0.0, bias=0.0):
    """The equation of DeepSpeed and of the paper; mask and bias are added to [B, S, H, L, L]."""
    q, k, v = (t.transpose(-2, -3) for t in (Q, K, V))
    logits = q @ k.transpose(-1, -2) * Q.shape[-1] ** -0.5 + mask + bias
    return (logits.softmax(dim=-1) @ v).transpose(-2, -3)


def cuequivariance(q, k, v, bias, mask, scale=None):
    """The equation of cuEquivariance: logits are [B, N, H, Q, K], -1e9 where mask is False."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * torch.einsum("bnhqd,bnhkd->bnhqk", q, k) + bias
    weights = logits.masked_fill(~mask, -1e9).softmax(dim=-1)
    return torch.einsum("bnhqk,bnhkd->bnhqd", weights, v)


def assert_computes(candidate, equation, inputs, generator):
    """Output and every gradient are those of the equation, by the rule for operators."""
    grad = torch.randn(equation(inputs).shape, generator=generator).to(DEVICE)
    doubles = {name: t.double() for name, t in inputs.items()}
    assert_accurate(
        accuracy.results(candidate, inputs, grad),
        accuracy.results(equation, inputs, grad),
        accuracy.results(equation, doubles, grad),
    )


def evoformer(name, Q, K, V, mask=None, bias=None):
    if name == "TritonEvoformer":
        return compat.TritonEvoformer(Q, K, V, mask, bias)
    return compat.DS4Sci_EvoformerAttention(Q, K, V, [mask, bias])


def evoformer_inputs(generator, batch=2, rows=3, length=17, heads=2, width=32):
    inputs = {x: drawn(generator, batch, rows, length, heads, width) for x in "QKV"}
    inputs["bias"] = drawn(generator, batch, 1, heads, length, length)
    return inputs, kept(generator, batch, rows, 1, 1, length)


def triangle_inputs(generator, batch=2, rows=3, queries=17, keys=21, heads=2, width=32):
    inputs = {
        "q": drawn(generator, batch, rows, heads, queries, width),
        "k": drawn(generator, batch, rows, heads, keys, width),
        "v": drawn(generator, batch, rows, heads, keys, width),
        "bias": drawn(generator, batch, 1, heads, queries, keys),
    }
    return inputs, kept(generator, batch, rows, 1, 1, keys)


@each_implementation
@each_evoformer
@pytest.mark.parametrize("value", [-INF, -1e9, -1e4])
def test_additive_mask_and_bias_are_those_of_the_equation(name, value, implementation, generator):
    inputs, mask = evoformer_inputs(generator)
    added = additive(mask, value)

    def candidate(i):
        with ops.use(implementation):
            return evoformer(name, **i, mask=added)

    assert_computes(candidate, lambda i: deepspeed(**i, mask=added), inputs, generator)


@each_evoformer
@pytest.mark.parametrize("given", [("mask", "bias"), ("mask",), ("bias",), ()], ids=str)
def test_mask_and_bias_may_each_be_absent(name, given, generator):
    inputs, mask = evoformer_inputs(generator)
    if "bias" not in given:
        del inputs["bias"]
    masks = {"mask": additive(mask)} if "mask" in given else {}
    assert_computes(
        lambda i: evoformer(name, **i, **masks),
        lambda i: deepspeed(**i, **masks),
        inputs,
        generator,
    )


@each_evoformer
def test_boolean_mask_says_the_same_as_additive_ones(name, generator):
    inputs, mask = evoformer_inputs(generator)
    out = evoformer(name, **inputs, mask=mask)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(evoformer(name, **inputs, mask=additive(mask, dtype=dtype)), out)
    assert not torch.equal(evoformer(name, **inputs), out)


@each_evoformer
def test_row_without_a_key_gives_zeros(name, generator):
    inputs, mask = evoformer_inputs(generator)
    mask[0, 1] = False
    out = evoformer(name, **inputs, mask=additive(mask))
    assert (out[0, 1] == 0).all()
    assert (out[0, 0] != 0).all()


def test_deepspeed_list_may_be_short_and_is_left_as_it_is(generator):
    inputs, mask = evoformer_inputs(generator)
    qkv = [inputs[x] for x in "QKV"]
    biases = [additive(mask)]
    out = compat.DS4Sci_EvoformerAttention(*qkv, biases)
    assert len(biases) == 1
    assert torch.equal(out, compat.DS4Sci_EvoformerAttention(*qkv, [*biases, None]))
    bare = compat.DS4Sci_EvoformerAttention(*qkv, [])
    assert torch.equal(bare, compat.DS4Sci_EvoformerAttention(*qkv, [None, None]))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_deepspeed_without_biases_takes_any_leading_dimensions(leading, generator):
    inputs = {x: drawn(generator, *leading, 65, 2, 32) for x in "QKV"}
    assert_computes(
        lambda i: compat.DS4Sci_EvoformerAttention(**i, biases=[]),
        lambda i: deepspeed(**i),
        inputs,
        generator,
    )


@each_implementation
def test_triangle_attention_is_that_of_cuequivariance(implementation, generator):
    inputs, mask = triangle_inputs(generator)

    def candidate(i):
        with ops.use(implementation):
            return compat.triangle_attention(**i, mask=mask)

    assert_computes(candidate, lambda i: cuequivariance(**i, mask=mask), inputs, generator)


def test_triangle_attention_takes_a_scale_and_no_mask(generator):
    inputs, mask = triangle_inputs(generator)
    everywhere = torch.ones_like(mask)
    assert_computes(
        lambda i: compat.triangle_attention(**i, scale=0.7),
        lambda i: cuequivariance(**i, mask=everywhere, scale=0.7),
        inputs,
        generator,
    )


def test_triangle_attention_adds_the_batch_that_is_missing(generator):
    inputs, mask = triangle_inputs(generator, batch=1)
    out = compat.triangle_attention(**{n: t[0] for n, t in inputs.items()}, mask=mask[0])
    assert torch.equal(out, compat.triangle_attention(**inputs, mask=mask))


def test_triangle_attention_casts_mask_and_bias_as_the_original_does(generator):
    inputs, mask = triangle_inputs(generator)
    out = compat.triangle_attention(**inputs, mask=mask)
    for dtype in (torch.float32, torch.uint8):
        assert torch.equal(compat.triangle_attention(**inputs, mask=mask.to(dtype)), out)
    halved = {**inputs, "bias": inputs["bias"].half()}
    rounded = {**inputs, "bias": inputs["bias"].half().float()}
    assert torch.equal(
        compat.triangle_attention(**halved, mask=mask),
        compat.triangle_attention(**rounded, mask=mask),
    )


@pytest.mark.parametrize("name", [*EVOFORMERS, "triangle_attention"])
def test_arguments_are_passed_on_without_a_copy(name, generator, monkeypatch):
    if name == "triangle_attention":
        inputs, mask = triangle_inputs(generator)
    else:
        inputs, mask = evoformer_inputs(generator)
    passed = []

    def attend(q, k, v, mask, pair_bias, scale=None):
        passed.extend([q, k, v, pair_bias, mask])
        return torch.empty_like(q)

    monkeypatch.setattr(ops, "evo_attention", attend)
    if name == "triangle_attention":
        compat.triangle_attention(**inputs, mask=mask)
    else:
        evoformer(name, **inputs, mask=mask)
    for given, seen in zip([*inputs.values(), mask], passed, strict=True):
        assert seen.data_ptr() == given.data_ptr()
        assert seen.numel() == given.numel()


@each_evoformer
@pytest.mark.parametrize("value", [1.0, -1.0, -9999.0, INF, float("nan")])
def test_mask_that_is_a_bias_is_refused_with_its_value(name, value, generator):
    inputs, mask = evoformer_inputs(generator)
    added = additive(mask)
    added[1, 2, 0, 0, 4] = value
    argument = {"DS4Sci_EvoformerAttention": r"biases\[0\]", "TritonEvoformer": "res_mask"}[name]
    with pytest.raises(
        ValueError, match=f"^{name}: {argument} has the value {value:g}, and a mask"
    ):
        evoformer(name, **inputs, mask=added)


@each_evoformer
def test_mask_of_ones_and_zeros_is_told_from_a_boolean_one(name, generator):
    inputs, mask = evoformer_inputs(generator)
    with pytest.raises(ValueError, match=r"ones and zeros as .*\.bool\(\)"):
        evoformer(name, **inputs, mask=mask.to(torch.bfloat16))


@each_evoformer
def test_mask_that_asks_for_a_gradient_is_refused(name, generator):
    inputs, mask = evoformer_inputs(generator)
    with pytest.raises(ValueError, match="requires a gradient, but it is a mask"):
        evoformer(name, **inputs, mask=additive(mask).requires_grad_())


@each_evoformer
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Q": (3, 17, 2, 32)}, r"Q has shape \(3, 17, 2, 32\), expected \[B, S, N, H, D\]"),
        ({"K": (2, 3, 17, 1, 32)}, r"k has shape \(2, 3, 17, 1, 32\), expected \[B, S, Nk,"),
        ({"mask": (2, 3, 17)}, r"has shape \(2, 3, 17\), expected \[B, S, 1, 1, N\] = \(2, 3, 1, "),
        ({"bias": (2, 3, 2, 17, 17)}, r"has shape .* expected \[B, 1, H, N, N\] = \(2, 1, 2, 17, "),
        ({"bias": (2, 2, 17, 17)}, r"has shape \(2, 2, 17, 17\), expected"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_shapes_are_refused_in_the_callers_layout(name, change, message, generator):
    inputs, mask = evoformer_inputs(generator)
    wrong = {argument: torch.zeros(shape, device=DEVICE) for argument, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        evoformer(name, **{**inputs, "mask": mask, **wrong})


def test_deepspeed_takes_no_third_bias(generator):
    inputs, _ = evoformer_inputs(generator)
    with pytest.raises(ValueError, match="biases must be at most two, got 3"):
        compat.DS4Sci_EvoformerAttention(*(inputs[x] for x in "QKV"), [None] * 3)


@pytest.mark.parametrize("name", [*EVOFORMERS, "triangle_attention"])
def test_arguments_that_are_no_tensors_are_named(name, generator):
    if name == "triangle_attention":
        inputs, _ = triangle_inputs(generator)
        with pytest.raises(TypeError, match="triangle_attention: bias must be a tensor, got None"):
            compat.triangle_attention(**{**inputs, "bias": None})
        with pytest.raises(TypeError, match="triangle_attention: mask must be a tensor, got list"):
            compat.triangle_attention(**inputs, mask=[True])
        return
    inputs, _ = evoformer_inputs(generator)
    with pytest.raises(TypeError, match=f"{name}: Q must be floating point, got torch.int64"):
        evoformer(name, **{**inputs, "Q": inputs["Q"].long()})
    with pytest.raises(TypeError, match=rf"{name}: (biases\[0\]|res_mask) must be a tensor"):
        evoformer(name, **inputs, mask=[True])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 8)}, r"q has shape \(2, 8\), expected \[B, N, H, Q, D\] or \[N, H, Q, D\]"),
        (
            {"k": (2, 3, 21, 2, 32)},
            r"k has shape \(2, 3, 21, 2, 32\), expected \[B, N, H, K, D\] = ",
        ),
        ({"v": (2, 3, 2, 6, 32)}, r"v has shape .* expected .* \(2, 3, 2, 21, 32\) for q of shape"),
        ({"bias": (2, 3, 2, 17, 21)}, r"bias has shape .* expected \[B, 1, H, Q, K\] = \(2, 1, 2,"),
        ({"mask": (2, 3, 21)}, r"mask has shape \(2, 3, 21\), expected \[B, N, 1, 1, K\]"),
    ],
    ids=str,
)
def test_triangle_attention_refuses_wrong_shapes_in_its_own_layout(change, message, generator):
    inputs, mask = triangle_inputs(generator)
    wrong = {argument: torch.zeros(shape, device=DEVICE) for argument, shape in change.items()}
    with pytest.raises(ValueError, match=f"^triangle_attention: {message}"):
        compat.triangle_attention(**{**inputs, "mask": mask, **wrong})


def test_triangle_attention_refuses_what_it_does_not_do(generator):
    inputs, _ = triangle_inputs(generator)
    with pytest.raises(NotImplementedError, match="return_aux is not available"):
        compat.triangle_attention(**inputs, return_aux=True)
    lengths = torch.full((2, 3, 1, 1, 1), 4, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="kv_lengths is not available; give mask="):
        compat.triangle_attention(**inputs, kv_lengths=lengths)


def test_signatures_take_what_the_originals_take_by_position(generator):
    inputs, mask = triangle_inputs(generator)
    by_name = compat.triangle_attention(**inputs, mask=mask, scale=0.5)
    assert torch.equal(compat.triangle_attention(*inputs.values(), mask, 0.5, False), by_name)
    inputs, mask = evoformer_inputs(generator)
    q, k, v, bias = inputs.values()
    added = additive(mask)
    assert torch.equal(
        compat.TritonEvoformer(q, k, v, added, bias),
        compat.DS4Sci_EvoformerAttention(q, k, v, [added, bias]),
    )
