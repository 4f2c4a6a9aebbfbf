"""Gradients of EvoAttention by the kernels for Hopper GPUs: they run on such a GPU alone."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megafold.ops.evo_attention import folding, hopper, hopper_launch, launch
from megafold.ops.hopper import L2_OF_AN_H100
from megafold.ops.tuning import Config, use_config
from tests.numerics import DEVICE
from tests.ops.evo import (
    assert_kernels_accurate,
    assert_same,
    attention,
    fused_results,
    three_results,
)

HERE = torch.device(DEVICE)
DTYPES = [torch.bfloat16, torch.float16]
ON_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper.is_hopper(HERE), reason="no Hopper GPU on this machine"),
]


@pytest.fixture
def ran(monkeypatch):
    """How often the gradients of a call were found by these kernels."""
    found = mock.Mock(side_effect=hopper_launch.backward)
    monkeypatch.setattr(hopper_launch, "backward", found)
    return found


def on_hopper(test):
    for mark in ON_HOPPER:
        test = mark(test)
    return test


SHAPES = (
    "B1 S72 N64 H4 D32",
    "B1 S80 N100 H4 D32",  # neither queries nor keys fill their tiles
    "B1 S70 N36 H4 D24",
    "B1 S96 N132 K97 H3 D32",
    "B1 S9 N260 H32 D32",
    "B1 S20 N196 H16 D48",
    "B3 S24 N64 H4 D64",  # a bias for each of the batch
    "B1 S67 N384 H4 D32",  # two walks over the keys
    "B1 S17 N256 K320 H16 D64",
    "B1 S9 N200 K256 H32 D32",  # keys fill one group of the last walk
    "B1 S67 N140 K440 H4 D32",  # the same of the third walk, keys not to the end
    "B1 S67 N40 K500 H4 D32",  # and two of them, or of two groups one; queries one tile
    "B1 S13 N1024 K64 H24 D32",  # more of the bias than L2 holds beside the rest: two heads at once
)
ALONE = (
    "B1 S1 N640 H40 D24",  # a bias of its own for each row; keys in ranges
    "B2 S1 N100 K1028 H17 D32",
    "B5 S1 N72 K516 H8 D24",  # three walks over a range, and two
    "B1 S1 N200 K1024 H17 D24",  # two blocks of keys a group at a time
    "B1 S1 N68 K2040 H9 D24",  # the same, the last block not full
    "B1 S1 N100 K4096 H16 D24",  # the same, two walks over a range
    "B40 S1 N70 K72 H4 D32",  # as many rows and heads as there are multiprocessors: no ranges
)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + ALONE)
def test_accurate(shape, dtype, ran):
    assert_kernels_accurate(*attention(shape, dtype))
    assert ran.call_count == 1


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
def test_accurate_without_mask_and_with_one_bias_for_the_batch(dtype, ran):
    inputs, grad = attention("B4 S24 N72 H4 D32", dtype)
    inputs["pair_bias"] = inputs["pair_bias"][:1].clone()
    assert_kernels_accurate(inputs, grad)
    del inputs["mask"]
    assert_kernels_accurate(inputs, grad)
    assert ran.call_count == 2


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys_have_no_gradient(dtype, ran):
    inputs, grad = attention("B1 S72 N64 H4 D32", dtype)
    inputs["mask"][:, 3] = False
    inputs["mask"][:, 5, 7:] = False
    assert_kernels_accurate(inputs, grad)
    results = fused_results(inputs, grad)
    for name in ("grad q", "grad k", "grad v"):
        found = next(t for key, t in results.items() if name.split()[1] in key and "grad" in key)
        assert not found[:, 3].any()
    assert ran.call_count == 2


@on_hopper
@pytest.mark.parametrize("limit", [30.0, 1e4])
def test_logits_of_any_size(limit, ran):
    inputs, grad = attention("B1 S72 N64 H4 D32", torch.bfloat16)
    generator = torch.Generator(HERE).manual_seed(3)
    for name in ("q", "k", "v"):
        inputs[name].cauchy_(generator=generator).clamp_(-limit, limit)
    assert_kernels_accurate(inputs, grad)
    assert ran.call_count == 1


@on_hopper
@pytest.mark.parametrize("shape", ["B1 S72 N64 H4 D32", "B1 S70 N452 H4 D32", ALONE[0]])
def test_biases_that_leave_whole_queries_out(shape, ran):
    # A mask as a bias: the shift is far beyond what folded products hold.
    inputs, grad = attention(shape, torch.bfloat16)
    inputs["pair_bias"][:, :, 5] = -1e9
    assert_kernels_accurate(inputs, grad)
    first = fused_results(inputs, grad)
    for _ in range(5):
        assert_same(fused_results(inputs, grad), first)
    assert ran.call_count == 7


@on_hopper
def test_a_bias_of_16_bits(ran):
    inputs, grad = attention("B1 S72 N64 H4 D32", torch.bfloat16)
    inputs["pair_bias"] = (3.0 * inputs["pair_bias"]).to(torch.bfloat16)
    assert_kernels_accurate(inputs, grad)
    assert ran.call_count == 1


@on_hopper
def test_one_head_of_one_row():
    assert_kernels_accurate(*attention("B1 S1 N17000 K64 H1 D32", torch.bfloat16))


@on_hopper
def test_the_gradient_of_the_bias_in_several_launches(ran, monkeypatch):
    inputs, grad = attention("B2 S37 N200 H4 D32", torch.bfloat16)
    monkeypatch.setattr(hopper_launch, "IN_LAUNCH", 0.02)
    monkeypatch.setattr(hopper_launch, "cache_of", lambda device: L2_OF_AN_H100)
    problem = launch.Problem.of(inputs["q"], inputs["k"], inputs["pair_bias"])
    assert 1 < hopper_launch._rows_at_once(problem, 19, HERE) < 10
    assert_kernels_accurate(inputs, grad)
    first = fused_results(inputs, grad)
    assert_same(fused_results(inputs, grad), first)
    assert ran.call_count == 3


@on_hopper
@pytest.mark.parametrize("shape", ["B1 S40 N128 H140 D48", "B1 S40 N60 K120 H140 D32"])
def test_heads_that_are_a_few_more_than_multiprocessors(shape, ran):
    # The last ones' gradient of the bias is split over rows, and added up.
    inputs, grad = attention(shape, torch.bfloat16)
    problem = launch.Problem.of(inputs["q"], inputs["k"], inputs["pair_bias"])
    whole, rest = hopper_launch._parts(problem, HERE)
    assert whole.groups == 1 < rest.groups
    assert_kernels_accurate(inputs, grad)
    inputs["pair_bias"][:, -1, 5] = -1e9  # logits too large for it
    assert_kernels_accurate(inputs, grad)
    assert ran.call_count == 2


@on_hopper
def test_a_row_without_keys_that_has_its_own_bias(ran):
    inputs, grad = attention(ALONE[1], torch.bfloat16)
    inputs["mask"][1] = False
    assert_kernels_accurate(inputs, grad)
    del inputs["mask"]
    assert_kernels_accurate(inputs, grad)
    assert ran.call_count == 2


@on_hopper
@pytest.mark.parametrize("shape", ["B1 S80 N200 H4 D32", ALONE[0]])
def test_the_same_bits_every_time(shape, ran):
    inputs, grad = attention(shape, torch.bfloat16)
    first = fused_results(inputs, grad)
    for _ in range(20):
        assert_same(fused_results(inputs, grad), first)
    assert ran.call_count == 21


@on_hopper
def test_transposed_operands_and_bias(ran):
    inputs, grad = attention("B1 S72 N72 H4 D32", torch.bfloat16)
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["pair_bias"] = inputs["pair_bias"].transpose(-1, -2).contiguous().transpose(-1, -2)
    assert_kernels_accurate(inputs, grad)
    assert ran.call_count == 1


@on_hopper
def test_what_tma_does_not_read_goes_the_other_way(ran):
    inputs, grad = attention("B1 S72 N64 H4 D32", torch.bfloat16)
    one = grad[..., :1].expand_as(grad)
    assert_kernels_accurate(inputs, one)
    assert ran.call_count == 0


@on_hopper
def test_only_what_is_asked_for():
    inputs, grad = attention("B1 S72 N64 H4 D32", torch.bfloat16)
    inputs["pair_bias"].requires_grad_(False)
    assert_kernels_accurate(inputs, grad)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["B1 S1 N128 H16 D24", "B2 S1 N70 K68 H1 D32"])
def test_a_row_of_its_own_needs_no_more_queries_forward(shape, dtype, monkeypatch):
    forward = mock.Mock(side_effect=hopper_launch.forward)
    monkeypatch.setattr(hopper_launch, "forward", forward)
    assert_kernels_accurate(*attention(shape, dtype))
    assert forward.call_count == 1


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["of a projection", "turned"])
def test_a_bias_is_copied_as_tma_reads_it(how, dtype, ran, monkeypatch):
    forward = mock.Mock(side_effect=hopper_launch.forward)
    monkeypatch.setattr(hopper_launch, "forward", forward)
    inputs, grad = attention("B1 S132 N64 H4 D32", dtype)
    bias = inputs["pair_bias"]
    if how == "turned":
        inputs["pair_bias"] = bias.mT.contiguous().mT
    else:  # heads last, beside other columns, in the dtype of products
        wide = torch.zeros(64, 64, 24, dtype=dtype, device=bias.device)
        wide[..., 8:12] = bias[0].permute(1, 2, 0)
        inputs["pair_bias"] = wide[..., 8:12].permute(2, 0, 1)[None]
    assert_kernels_accurate(inputs, grad)
    assert forward.call_count == ran.call_count == 1


def test_what_is_copied_of_a_bias():
    problem = launch.Problem(1, 66, 8, 64, 4, 32, 66)
    bias = torch.randn(1, 4, 8, 64)
    assert hopper.as_read(problem, bias) is bias
    for other in (bias.half(), bias.mT.contiguous().mT):
        found = hopper.as_read(problem, other)
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        torch.testing.assert_close(found, other.float())
    few = problem._replace(rows=3, rows_per_bias=3)  # of which a copy would be larger than q
    assert hopper.as_read(few, other) is other


def test_which_forward_passes_are_hopper_s(monkeypatch):
    def why_not(shape, of_bias=torch.float32):
        (inputs, _) = attention(shape, torch.bfloat16, device="cpu")
        q, k, bias = (inputs[name] for name in ("q", "k", "pair_bias"))
        bias = bias.to(of_bias)
        return hopper.why_not_forward(launch.Problem.of(q, k, bias), q, bias, (launch.FORWARD,))

    assert why_not("B1 S1 N8 K64 H1 D32") == "not a Hopper GPU"
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "has_gluon", lambda: True)
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    assert why_not("B1 S1 N8 K64 H1 D32") == ""
    assert "too few" in why_not("B1 S1 N8 K64 H1 D48")
    assert "too few" in why_not("B1 S65 N8 K64 H4 D32")
    assert why_not("B1 S66 N8 K64 H4 D32") == ""
    assert "multiple of 4" in why_not("B1 S1 N8 K66 H1 D32")
    assert "below 64" in why_not("B1 S1 N64 K60 H1 D32")
    assert why_not("B1 S66 N8 K64 H4 D32", torch.bfloat16) == ""
    assert why_not("B1 S4 N1024 K64 H16 D32", torch.bfloat16) == ""  # a copy as large as q
    assert "in 16 bits" in why_not("B1 S4 N1024 K68 H16 D32", torch.bfloat16)


@pytest.mark.parametrize(
    ("items", "most", "expected"),
    [
        (512, 3, 264),  # two of three: 396 programs would take two turns as well
        (384, 3, 384),  # all at once
        (768, 3, 396),
        (100, 3, 100),
        (133, 1, 132),
        (4608, 2, 264),
    ],
)
def test_programs_end_together(items, most, expected, monkeypatch):
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    assert hopper.programs_of(items, most, HERE) == expected


def test_not_on_other_devices_nor_for_other_calls(monkeypatch):
    def why_not(problem, q, bias, scale=1.0):
        return hopper.why_not_backward(problem, q, bias, scale, launch.GRADIENTS)

    def problem(shape, dtype=torch.bfloat16):
        (inputs, _) = attention(shape, dtype, device="cpu")
        q, k, bias = (inputs[name] for name in ("q", "k", "pair_bias"))
        return launch.Problem.of(q, k, bias), q, bias

    few = problem("B1 S72 N8 H4 D32")
    assert why_not(*few) == "not a Hopper GPU"
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "has_gluon", lambda: True)
    assert why_not(*few) == ""
    assert why_not(*few, -1.0) == "a scale that is not positive"
    assert why_not(few[0], few[1].float(), few[2]) == "float32 operands"
    for name in ("batch", "rows", "queries", "keys", "heads"):
        assert why_not(few[0]._replace(**{name: 0}), *few[1:]) == "nothing to attend to"
    assert "rows share a bias" in why_not(few[0], few[1], None)
    assert "rows share a bias" in why_not(*problem("B1 S7 N8 H64 D32"))
    assert why_not(*problem("B1 S72 N8 H4 D16")) == "heads of 16 channels"
    assert why_not(*problem("B1 S72 N8 H4 D20")) == "heads of 20 channels"
    assert "multiple of 4" in why_not(*problem("B1 S72 N9 H4 D32"))
    with use_config(launch.GRAD_KV, Config({}, 4, 1)):
        assert why_not(*few) == "use_config has other kernels in force"
    own = problem("B1 S1 N8 K264 H32 D24")
    assert why_not(*own) == ""
    assert "16 bits" in why_not(own[0], own[1], own[2].half())
    assert "of its own" in why_not(*problem("B1 S1 N8 K264 H32 D48"))
    assert "of keys" in why_not(*problem("B1 S1 N8 K270 H32 D24"))
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 200)
    assert "too few" in why_not(*few)
    assert "too few" in why_not(*own)


def test_what_tma_reads():
    t = torch.empty(2, 3, 8, 4, 32, dtype=torch.bfloat16)
    assert hopper.readable(t, t.transpose(1, 2)[:1], t[:, :, ::2])
    assert not hopper.readable(t.transpose(1, 2))  # batch and rows are not one dimension
    assert not hopper.readable(t[..., ::2])
    assert not hopper.readable(t[..., 1:])
    assert not hopper.readable(t[:, :, :1].expand_as(t))
    assert not hopper.readable(torch.empty(1, 3, 8, 4, 12, dtype=torch.bfloat16))  # 24 bytes


def columns_of(lines: torch.Tensor) -> torch.Tensor:
    """Columns ``[..., rows, 16]`` in lines of four rows, as products read what TMA leaves of them.

    The one swizzles parts of 16 bytes by lines of 128, the others by rows of 32.
    """
    line = torch.arange(lines.shape[-2], device=lines.device)[:, None, None]
    row = torch.arange(4, device=lines.device)[:, None]
    part = torch.arange(2, device=lines.device)
    at = (row * 2 + (part ^ (line & 1))) ^ (line & 7)
    return lines.unflatten(-1, (8, 8))[..., line, at, :].flatten(-2).flatten(-3, -2)


def flags(problem: launch.Problem) -> torch.Tensor:
    """Memory for those of the programs that fold queries, with something in it."""
    number = folding.OF_PROGRAMS + hopper_launch._of_queries(problem)
    return torch.full((number,), 7, dtype=torch.int8, device=HERE)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=ON_HOPPER[0])])
@pytest.mark.parametrize("shape", ["B2 S3 N20 K37 H2 D24", "B1 S2 N130 H1 D32"])
@pytest.mark.parametrize("masked", [True, False])
def test_folded_products_are_logits_less_their_logarithm(shape, masked, dtype):
    inputs, grad = attention(shape, dtype)
    q, k, v, mask, bias = (inputs[name] for name in ("q", "k", "v", "mask", "pair_bias"))
    if masked:
        mask[:, 1, :] = False
    else:
        mask = None
    scale = 0.31
    problem = launch.Problem.of(q, k, bias)
    spread = launch.spread(mask, problem)
    out, stats = launch.forward(q, k, v, spread, bias, scale)
    nan = {"fill_value": float("nan"), "dtype": dtype, "device": HERE}
    lines = problem.total_rows, problem.heads, -(-problem.queries // 4), 64
    queries = torch.full(lines, **nan)
    keys = torch.full((problem.total_rows if masked else 1, -(-problem.keys // 4), 64), **nan)
    fold = hopper_launch._fold(
        problem, dtype, HERE, scale, launch.layout(grad), launch.layout(spread), None
    )
    found = torch.empty(stats.shape[1:], device=HERE)
    beyond = flags(problem)
    fold(out, grad, stats, queries, found, beyond, spread, keys, None, None)
    assert (beyond[: folding.OF_PROGRAMS] == 7).all()
    assert not beyond[folding.OF_PROGRAMS :].any()
    queries, left = columns_of(queries).split([problem.queries, -problem.queries % 4], dim=-2)
    assert not left.any()
    keys, left = columns_of(keys).split([problem.keys, -problem.keys % 4], dim=-2)
    assert not left.any()

    beside = torch.einsum(
        "rhne,rme->rhnm", queries.double(), keys.double().expand(problem.total_rows, -1, -1)
    )
    logits = torch.einsum("bsnhd,bsmhd->bshnm", q.double(), k.double()).flatten(0, 1)
    weights = (
        (logits + beside) * scale
        + bias.double().repeat_interleave(problem.rows_per_bias, 0)[: problem.total_rows]
    ).exp()
    logits = (
        logits * scale
        + bias.double().repeat_interleave(problem.rows_per_bias, 0)[: problem.total_rows]
    )
    if masked:
        logits = logits.masked_fill(~spread.flatten(0, 1)[:, None, None], float("-inf"))
    expected = logits.softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(weights, expected, rtol=2e-5, atol=1e-12)

    parts = torch.zeros(folding.COLUMNS, dtype=torch.float64, device=HERE)
    parts[folding.DELTA : folding.DELTA + 3] = torch.tensor(folding.PARTS[dtype][:3])
    delta = -(queries.double() @ parts).transpose(1, 2)
    exact = (out.double() * grad.double()).sum(-1).flatten(0, 1)
    torch.testing.assert_close(delta, exact, rtol=1e-6, atol=1e-6)
    inverse = stats[1].transpose(1, 2).double()
    torch.testing.assert_close(
        found.transpose(1, 2).double(), exact * inverse, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("value", [1025.0, -1025.0, float("nan"), float("inf")])
def test_one_shift_too_large_for_folded_products_is_told(value):
    inputs, grad = attention("B2 S3 N150 H2 D32", torch.float16)
    problem = launch.Problem.of(inputs["q"], inputs["k"], inputs["pair_bias"])
    of_queries = (problem.total_rows, problem.heads, problem.queries)
    stats = torch.ones(2, *of_queries, device=HERE)
    queries = torch.empty(*of_queries[:2], 38, 64, dtype=torch.float16, device=HERE)
    keys = torch.empty(1, 38, 64, dtype=torch.float16, device=HERE)
    fold = hopper_launch._fold(problem, torch.float16, HERE, 1.0, launch.layout(grad), None, None)

    def told():
        beyond, delta = flags(problem), torch.empty(of_queries, device=HERE)
        fold(grad, grad, stats, queries, delta, beyond, None, keys, None, None)
        return beyond[folding.OF_PROGRAMS :].tolist()

    stats[0, 4, 1, 149] = folding.PEAK
    assert not any(told())
    stats[0, 4, 1, 149] = value
    # Programs take heads first, then blocks of queries, then rows.
    assert [i for i, flag in enumerate(told()) if flag] == [(4 * 3 + 2) * 2 + 1]


@on_hopper
def test_captured_in_a_graph(ran):
    inputs, grad = attention("B1 S72 N64 H4 D32", torch.bfloat16)
    expected = fused_results(inputs, grad)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = fused_results(inputs, grad)
    graph.replay()
    assert_same(results, expected)
    inputs["v"].mul_(2.0)
    graph.replay()
    assert torch.equal(results["output"], 2.0 * expected["output"])
    assert ran.call_count == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("turned", [True, False])
def test_a_bias_is_turned_and_scaled_in_full(turned, dtype):
    inputs, _ = attention("B2 S3 N70 K132 H3 D32", torch.float16)
    bias = inputs["pair_bias"].to(dtype)
    if turned:
        bias = bias.mT.contiguous().mT
    problem = launch.Problem.of(inputs["q"], inputs["k"], bias)
    found = torch.full(bias.mT.shape, float("nan"), device=HERE)
    out, queries = torch.zeros_like(inputs["q"]), (problem.total_rows, problem.heads)
    stats = torch.ones(2, *queries, 70, device=HERE)
    fold = hopper_launch._fold(
        problem, torch.float16, HERE, 1.0, launch.layout(out), None, launch.layout(bias)
    )
    beside = torch.empty(*queries, 18, 64, dtype=torch.float16, device=HERE)
    keys, delta = beside.new_empty(1, 33, 64), torch.empty_like(stats[0])
    fold(out, out, stats, beside, delta, flags(problem), None, keys, bias, found)
    assert torch.equal(found, bias.mT.float() * 1.4426950408889634)


@pytest.mark.parametrize("ranges", [1, 3])
def test_sums_of_ranges_of_keys_are_added_up_in_their_order(ranges):
    q = torch.empty(2, 1, 70, 3, 24, dtype=torch.float16, device=HERE)
    bias = torch.empty(2, 3, 70, 260, device=HERE)
    problem = launch.Problem.of(q, q.new_empty(2, 1, 260, 3, 24), bias)
    plan = hopper.plan_of(problem, HERE)._replace(ranges=ranges)
    sums = torch.randn(ranges, 2, 3, 128, 24, generator=torch.Generator().manual_seed(1)).to(HERE)
    # As threads hold a tile: 16 queries of a warp are 2 by 8, eight channels 4 by 2.
    tiles = sums.view(ranges, 2, 3, 2, 4, 2, 8, 3, 4, 2)
    held = tiles.permute(0, 1, 2, 3, 7, 4, 6, 8, 5, 9).contiguous()
    with mock.patch.object(hopper_launch, "plan_of", return_value=plan):
        of_q = hopper_launch._row_strides(q)
        hopper_launch._add_ranges.__wrapped__(problem, q.dtype, HERE, 0.3, of_q)(held, q)
    total = sums[0].clone()
    for i in range(1, ranges):
        total += sums[i]
    expected = (total[:, :, :70] * 0.3).half().transpose(1, 2).unsqueeze(1)
    assert torch.equal(q, expected)


def test_keys_of_few_rows_are_split_for_every_multiprocessor(monkeypatch):
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)

    def plan(shape):  # past the cache, which would keep what is made up here
        (inputs, _) = attention(shape, torch.bfloat16, device="meta")
        problem = launch.Problem.of(*(inputs[name] for name in ("q", "k", "pair_bias")))
        return hopper.plan_of.__wrapped__(problem, torch.device("meta"))

    for shape in ("B1 S1 N8 K2048 H16 D24", "B2 S1 N8 K1028 H17 D32", "B5 S1 N8 K516 H8 D24"):
        found = plan(shape)
        assert found.alone
        assert found.ranges > 1
        assert found.items == found.programs <= 132
        at_a_time = 64 * found.blocks.groups * found.blocks.each
        assert found.walks == -(-int(shape.split()[3][1:]) // at_a_time)
        assert (found.ranges - 1) * found.walks_each < found.walks
        assert found.walks <= found.ranges * found.walks_each
    each = {2048: 2, 2040: 2, 1024: 2, 1028: 1, 960: 1, 4096: 2}  # in whole walks, or one by one
    for keys, blocks in each.items():
        assert plan(f"B1 S1 N8 K{keys} H16 D24").blocks.each == blocks, keys
    shared = plan("B1 S72 N8 K2048 H16 D32")
    assert (shared.alone, shared.ranges, shared.programs) == (False, 1, 132)
    assert shared.walks_each == shared.walks


@on_hopper
@pytest.mark.parametrize("name", ["q", "k", "v", "pair_bias"])
@pytest.mark.parametrize("shape", ["B1 S72 N64 H4 D32", ALONE[0]])
def test_what_is_no_number_is_not_hidden(shape, name, ran):
    inputs, grad = attention(shape, torch.bfloat16)
    inputs["mask"] = torch.ones_like(inputs["mask"])
    inputs[name].view(-1)[12345] = torch.nan
    fused, eager, _ = three_results(inputs, grad)
    for result, expected in eager.items():
        assert not (torch.isnan(expected) & ~torch.isnan(fused[result])).any(), result
    assert ran.call_count == 1
