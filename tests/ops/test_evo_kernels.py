"""EvoAttention's kernels against the equation in fp64: sizes, masks, biases, block sizes.

On a GPU where there is one, else in Triton's interpreter, which is why most sizes are small.
"""

from __future__ import annotations

import pytest
import torch

from megafold.bench import accuracy, cases
from megafold.ops.evo_attention import launch
from tests.ops.evo import (
    DTYPES,
    ON_GPU,
    ONE_DTYPE,
    assert_kernels_accurate,
    assert_same,
    attention,
    blocks,
    fused,
    fused_results,
    three_results,
)

# Numpy, which interprets, warns of infinities that the kernels then leave out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
one_dtype = pytest.mark.parametrize("dtype", ONE_DTYPE)

# Sizes that only a GPU is fast enough for.
LARGE = [
    "B1 S8 N384 H4 D32",
    "B1 S3 N499 H2 D24",
    "B2 S2 N768 H2 D64",
    "B1 S1 N768 H16 D24",
    "B2 S5 N257 H3 D128",
    "B3 S7 N384 H2 D20 shared",
    "B1 S70 N129 H2 D16",
]


@each_dtype
@pytest.mark.parametrize("width", [8, 16, 20, 24, 32, 48, 64, 128])
def test_every_head_width(width, dtype):
    assert_kernels_accurate(*attention(f"B1 S2 N23 H1 D{width}", dtype))


@each_dtype
@pytest.mark.parametrize("tokens", [17, 63, 64, 99, 111])
def test_every_length(tokens, dtype):
    assert_kernels_accurate(*attention(f"B1 S2 N{tokens} H1 D16", dtype))


@each_dtype
@pytest.mark.parametrize("sizes", ["N7 K40", "N40 K7", "N33 K64"])
def test_as_many_keys_as_one_likes(sizes, dtype):
    assert_kernels_accurate(*attention(f"B1 S2 {sizes} H1 D16", dtype))


# One product of a weight and a gradient: the interpreter rounds where a GPU fuses operations.
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=ON_GPU), *DTYPES[1:]])
def test_one_query(dtype):
    assert_kernels_accurate(*attention("B2 S8 N1 K45 H2 D16", dtype))


@each_dtype
@pytest.mark.parametrize("shape", ["B1 S2 N1 H2 D16", "B2 S1 N20 K1 H1 D16"])
def test_one_key_gets_all_the_weight(shape, dtype):
    inputs, grad = attention(shape, dtype)
    inputs["mask"][...] = True
    results = fused_results(inputs, grad)
    torch.testing.assert_close(results["output"], inputs["v"].expand(results["output"].shape))
    torch.testing.assert_close(results["grad v"], grad.sum(dim=2, keepdim=True))
    # The others are the difference of two equal numbers, so zero but for fp32 rounding.
    of_logits = 8 * 2**-23 * (grad * inputs["v"]).abs().float().sum(-1).max().item()
    many = grad.shape[1] * grad.shape[2]
    for name, times in (("q", inputs["k"]), ("k", inputs["q"]), ("pair_bias", torch.ones(1))):
        assert results[f"grad {name}"].abs().max() <= many * of_logits * times.abs().max()


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("shape", LARGE)
def test_large_sizes(shape, dtype):
    assert_kernels_accurate(*attention(shape, dtype))


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("case", cases.registered("evo_attention"), ids=lambda case: case.shape)
def test_sizes_of_the_benchmarks(case, dtype):
    assert_kernels_accurate(*attention(case.shape, dtype))


def keys_masked(inputs, keys):
    mask = inputs["mask"].clone()
    mask[:, :, keys] = False
    return mask


CHANGES = {
    "no mask": lambda i: {"mask": None},
    "no bias": lambda i: {"pair_bias": None},
    "neither": lambda i: {"mask": None, "pair_bias": None},
    "mask shared over rows": lambda i: {"mask": i["mask"][:, :1]},
    "mask shared over the batch": lambda i: {"mask": i["mask"][:1]},
    "one mask for all": lambda i: {"mask": i["mask"][:1, :1]},
    "first keys masked": lambda i: {"mask": keys_masked(i, slice(0, 18))},
    "last keys masked": lambda i: {"mask": keys_masked(i, slice(21, None))},
    "nothing attended": lambda i: {"mask": torch.zeros_like(i["mask"])},
    "bias shared over the batch": lambda i: {"pair_bias": i["pair_bias"][:1]},
    "bias expanded over the batch": lambda i: {
        "pair_bias": i["pair_bias"][:1].expand(i["pair_bias"].shape)
    },
    "bias in the dtype of q": lambda i: {"pair_bias": i["pair_bias"].to(i["q"].dtype)},
}


@one_dtype
@pytest.mark.parametrize("change", CHANGES)
def test_masks_and_biases_of_every_kind(change, dtype):
    inputs, grad = attention("B2 S3 N17 K40 H1 D16", dtype)
    assert_kernels_accurate({**inputs, **CHANGES[change](inputs)}, grad)


@each_dtype
@pytest.mark.parametrize("shape", ["B1 S1 N37 H3 D16", "B4 S1 N19 K35 H2 D8"])
def test_one_row_for_each_bias(shape, dtype):
    """No rows share a bias, so that the kernel for q writes the bias's gradient."""
    inputs, grad = attention(shape, dtype)
    assert_kernels_accurate({**inputs, "pair_bias": inputs["pair_bias"].to(dtype)}, grad)


@one_dtype
def test_wholly_masked_rows_give_zeros_and_zero_gradients(dtype):
    inputs, grad = attention("B2 S3 N17 H1 D16", dtype)
    inputs["mask"][0, 1] = inputs["mask"][1, 2] = False
    results = fused_results(inputs, grad)
    for name, value in results.items():
        assert torch.isfinite(value).all(), name
        if name != "grad pair_bias":
            assert (value[0, 1] == 0).all(), name
            assert (value[1, 2] == 0).all(), name
            assert (value[0, 0] != 0).any(), name
    # Nor do they leave a trace in the gradient of the bias.
    others = {**inputs, "q": inputs["q"].clone(), "v": inputs["v"].clone()}
    others["q"][0, 1], others["v"][1, 2] = 5, -7
    assert torch.equal(fused_results(others, grad)["grad pair_bias"], results["grad pair_bias"])


@one_dtype
def test_masked_keys_change_nothing_and_get_no_gradient(dtype):
    inputs, grad = attention("B1 S2 N40 H1 D16", dtype)
    masked = ~inputs["mask"]
    assert masked.any()
    expected = fused_results(inputs, grad)
    for name in ("k", "v"):  # far above every other, in logits and in values
        inputs[name] = inputs[name].clone()
        inputs[name][masked] = 1e3
        assert (expected[f"grad {name}"][masked] == 0).all()
        assert (expected[f"grad {name}"][~masked] != 0).any(-1).all()
    assert_same(fused_results(inputs, grad), expected)


@each_dtype
@pytest.mark.parametrize("scale", [0.0, 0.4, -0.7, 2])
def test_scale_is_what_it_is_set_to(scale, dtype):
    assert_kernels_accurate(*attention("B1 S2 N19 H1 D16", dtype), scale=scale)


def cauchy(shape: str, dtype: torch.dtype, limit: float, seed: int = 1):
    """Inputs with tails so heavy that one key often gets all the weight."""
    inputs, grad = attention(shape, dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        n: torch.empty(t.shape).cauchy_(generator=generator).clamp(-limit, limit).to(t)
        for n, t in inputs.items()
        if t.is_floating_point()
    }
    return {**inputs, **drawn}, grad


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_heavy_tails_in_half_precision(dtype):
    # Within what fp16 holds: eager keeps its logits in it.
    assert_kernels_accurate(*cauchy("B1 S3 N40 H2 D32", dtype, limit=30))


def test_heavy_tails_in_single_precision():
    """On (geometric) average over draws.

    With logits up to a million one rounding of one near tie decides a draw: eager's own error is
    two hundred times as large in some draws as in others, and the worst decides every sum.
    """
    ratios = []
    for seed in range(9):
        inputs, grad = cauchy("B1 S3 N40 H2 D32", torch.float32, 1e6, seed)
        compared = accuracy.compare(*three_results(inputs, grad))
        ratios.append([c.error / c.eager_error for c in compared])
    assert (torch.tensor(ratios).log().mean(dim=0).exp() <= accuracy.FACTOR).all()


# Gradients that are differences of almost equal numbers.


@pytest.mark.parametrize("keys", [1, 2, 3])
def test_few_keys(keys):
    # Of one bias for two keys, 16 numbers, one draw of 24 breaks the rule, of eight none of 16.
    inputs, grad = attention(f"B8 S4 N{keys} H4 D16")
    assert_kernels_accurate({**inputs, "mask": None}, grad)


def test_few_keys_that_are_not_masked():
    inputs, grad = attention("B1 S8 N17 H1 D16")
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    inputs["mask"][..., 5:7] = True
    assert_kernels_accurate(inputs, grad)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_weights_with_a_peak(scale):
    # Of 12 rows, one of four draws breaks the rule on a GPU, of 48 and 96 none of sixteen: enough
    # that a few weights do not decide.
    assert_kernels_accurate(*attention("B1 S48 N19 H1 D16"), scale=scale)


@pytest.mark.parametrize(("bias", "times"), [(3.0, accuracy.FACTOR), (10.0, 3.0)])
def test_half_precision_where_a_bias_picks_the_keys(bias, times):
    """The rule, and what of it is left where one key has most of the weight: see docs."""
    inputs, grad = attention("B1 S16 N64 H2 D32", torch.float16)
    inputs["pair_bias"] = bias * inputs["pair_bias"]
    for c in accuracy.compare(*three_results(inputs, grad)):
        assert c.error <= times * c.eager_error, c.result


@each_dtype
def test_large_logits_neither_overflow_nor_lose_weights(dtype):
    inputs, grad = attention("B1 S2 N40 H1 D16", dtype)
    inputs["q"], inputs["k"] = 30 * inputs["q"], 30 * inputs["k"]
    for name, value in fused_results(inputs, grad).items():
        assert torch.isfinite(value).all(), name
    ones = {**inputs, "v": torch.ones_like(inputs["v"]), "mask": None}
    torch.testing.assert_close(fused(ones), ones["v"])  # weights sum to one


# ROWS, BLOCK_Q, BLOCK_K, KEYS_FIRST. Neither 40 tokens nor 3 or 6 rows are multiples of most.
@pytest.mark.parametrize(
    "sizes",
    [(1, 16, 16, 0), (1, 16, 32, 1), (2, 32, 16, 1), (3, 16, 64, 0), (4, 64, 16, 1)],
    ids=str,
)
@pytest.mark.parametrize("shape", ["B1 S3 N40 H1 D16", "B2 S1 N23 K40 H1 D8 shared"])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=ON_GPU)])
def test_block_sizes_change_nothing_but_rounding(sizes, shape, dtype):
    inputs, grad = attention(shape, dtype)
    with blocks(*sizes):
        assert_kernels_accurate(inputs, grad)


@pytest.mark.parametrize("sizes", [(1, 16, 32, 0), (3, 32, 16, 1)], ids=str)
def test_block_sizes_in_single_precision(sizes):
    inputs, grad = attention("B1 S4 N33 H1 D16")
    with blocks(*sizes):
        assert_kernels_accurate(inputs, grad)


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize(
    "sizes",
    [(1, 64, 64, 0), (1, 32, 64, 1), (2, 128, 32, 0), (2, 32, 128, 1), (3, 64, 32, 1)],
    ids=str,
)
def test_large_blocks(sizes, dtype):
    inputs, grad = attention("B2 S5 N201 H2 D32", dtype)
    with blocks(*sizes):
        assert_kernels_accurate(inputs, grad)


def test_many_rows_share_a_transposed_copy_of_the_bias(monkeypatch):
    """Where logits are held as [keys, queries], the bias is read along its queries."""
    copied = []
    real = launch.along_queries
    monkeypatch.setattr(launch, "along_queries", lambda *a: copied.append(real(*a)) or copied[-1])
    inputs, grad = attention("B1 S9 N23 K19 H2 D8", torch.float16)
    with blocks(2, 16, 16, 1):
        assert_kernels_accurate(inputs, grad)
    assert copied[0].stride(-2) == 1


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_groups_of_rows_change_nothing_but_rounding(groups, monkeypatch):
    """The gradient of a bias is summed in groups of the rows that share it."""
    monkeypatch.setattr(launch, "row_groups", lambda *sizes: groups)
    inputs, grad = attention("B2 S3 N17 H1 D16")
    assert_kernels_accurate(inputs, grad)
    assert_kernels_accurate({**inputs, "pair_bias": inputs["pair_bias"][:1]}, grad)
