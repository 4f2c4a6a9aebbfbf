"""The transition's kernels held to the rule: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.ops.transition import launch
from tests.numerics import DEVICE, assert_accurate, draw

ON_GPU = pytest.mark.gpu
# The interpreter cuts bf16 off where a GPU rounds.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=ON_GPU)]
ONE_HALF = [torch.float16, pytest.param(torch.bfloat16, marks=ON_GPU)]
SHAPES = [
    "M67 C32 H128",
    "M130 C16 H64",
    "M65 C24 H40",  # no power of two, no multiple of a block
    "M40 C128 H96",
    "M33 C200 H72",  # wider than the fused kernels hold
    pytest.param("M4099 C128 H512", marks=ON_GPU),
    pytest.param("M12321 C64 H256", marks=ON_GPU),
    pytest.param("M768 C384 H1536", marks=ON_GPU),
    pytest.param("M999 C768 H1536", marks=ON_GPU),
    pytest.param("M130 C449 H898", marks=ON_GPU),
    pytest.param("M130 C833 H1666", marks=ON_GPU),
    pytest.param("M130 C1024 H2048", marks=ON_GPU),
]


def fused(inputs, **options):
    """The operator by its kernels."""
    with ops.use("triton"):
        return ops.transition(**inputs, **options)


def reference(inputs, **options):
    return ops.reference.transition(**inputs, **options)


def three_results(inputs, grad, **options):
    """Output and gradients of the kernels, of eager, and in fp64, on the same values."""
    doubles = {name: t if t is None else t.double() for name, t in inputs.items()}
    return (
        accuracy.results(lambda given: fused(given, **options), inputs, grad),
        accuracy.results(lambda given: reference(given, **options), inputs, grad),
        accuracy.results(lambda given: reference(given, **options), doubles, grad),
    )


def drawn(shape, dtype=torch.float16, seed=0):
    return draw(cases.case("transition", shape), dtype, DEVICE, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_every_gradient_are_as_accurate_as_eager(shape, dtype):
    assert_accurate(*three_results(*drawn(shape, dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, *ONE_HALF])
@pytest.mark.parametrize("shape", ["M300 C32 H48", "M300 C136 H48"])
def test_rows_in_many_chunks_are_as_accurate_as_eager(shape, dtype, monkeypatch):
    parts = [slice(0, 128), slice(128, 256), slice(256, 300)]
    monkeypatch.setattr(launch, "chunks", lambda *sizes: parts)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 7)  # rows are split unevenly
    inputs, grad = drawn(shape, dtype)
    assert_accurate(*three_results(inputs, grad))


def test_chunks_cover_all_rows_and_keep_scratch_memory_within_its_bound():
    for rows in (1, 127, 128, 1000, 147456, 589824):
        for per_row, x_bytes in ((3328, 256 * rows), (0, 256 * rows), (12288, 0)):
            found = list(launch.chunks(rows, per_row, x_bytes))
            edges = [0, *(part.stop for part in found)]
            assert [part.start for part in found] == edges[:-1]
            assert edges[-1] == rows
            assert all(part.start % launch.CHUNK_STEP == 0 for part in found)
            most = max(launch.SCRATCH_BYTES, x_bytes) + launch.CHUNK_STEP * per_row
            assert all((part.stop - part.start) * per_row <= most for part in found)
    assert len(list(launch.chunks(147456, 3328, 256 * 147456))) == 4


@pytest.mark.parametrize("wave", [64, 384, 16896])
def test_chunks_are_whole_waves_where_one_is_within_the_bound(wave):
    for rows in (1, 1000, 147456, 589824):
        *whole, last = launch.chunks(rows, 3200, 256 * rows, wave)
        sizes = {part.stop - part.start for part in whole}
        assert len(sizes) <= 1
        assert all(size % wave == 0 for size in sizes)
        assert last.stop == rows
    first = next(launch.chunks(147456, 3200, 256 * 147456, 16896))
    assert first == slice(0, 2 * 16896)
    # Of a wave that is more than the bound there is no use.
    assert next(launch.chunks(10**6, 3200, 0, 10**6)).stop < 2**27 / 3200


@pytest.mark.parametrize("dtype", ONE_HALF)
@pytest.mark.parametrize(
    "without", [("norm_weight",), ("norm_bias",), ("norm_weight", "norm_bias")]
)
@pytest.mark.parametrize("shape", ["M37 C16 H32", "M37 C130 H32"])
def test_norm_parameters_may_be_left_out(shape, without, dtype):
    inputs, grad = drawn(shape, dtype)
    assert_accurate(*three_results(inputs | dict.fromkeys(without), grad))


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_few_rows(rows):
    # Many channels, so that the errors of few rows are many numbers.
    assert_accurate(*three_results(*drawn(f"M{rows} C64 H128")))


@pytest.mark.parametrize("shape", ["M21 C16 H32", "M21 C136 H32"])
def test_eps_reaches_the_norm(shape):
    inputs, grad = drawn(shape)
    assert_accurate(*three_results(inputs, grad, eps=0.3))


@pytest.mark.parametrize("channels", [8, 136])
@pytest.mark.parametrize(("rows", "units"), [(0, 16), (3, 0), (0, 0)])
def test_empty_inputs_give_zeros(rows, units, channels):
    inputs, grad = drawn(f"M{rows} C{channels} H16")
    inputs |= {name: inputs[name][:units] for name in ("weight_gate", "weight_value")}
    inputs["weight_out"] = inputs["weight_out"][:, :units]
    results = accuracy.results(fused, inputs, grad)
    for name, value in results.items():
        assert (value == 0).all(), name
    plain = accuracy.results(reference, inputs, grad)
    assert {n: t.shape for n, t in results.items()} == {n: t.shape for n, t in plain.items()}


@pytest.mark.parametrize("shape", ["M60 C16 H32", "M60 C132 H32"])
def test_any_strides_and_any_shape(shape):
    inputs, grad = drawn(shape)
    channels = inputs["x"].shape[-1]
    pairs = inputs["x"].view(6, 10, channels)
    turned = pairs.transpose(0, 1).contiguous().transpose(0, 1)  # the same values
    wider = torch.cat([pairs, pairs], dim=-1)[..., :channels]
    spread = torch.stack([pairs, pairs], dim=-1)[..., 0]
    grad = grad.view(pairs.shape)
    expected = accuracy.results(fused, inputs | {"x": pairs}, grad)
    for view in (turned, wider, spread):
        assert not view.is_contiguous()
        found = accuracy.results(fused, inputs | {"x": view}, grad)
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name
    turned_grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    found = accuracy.results(fused, inputs | {"x": pairs}, turned_grad)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("shape", ["M40 C16 H32", "M40 C132 H32"])
def test_one_row_for_all_and_one_gradient_for_all(shape):
    inputs, grad = drawn(shape)
    one, of_all = inputs["x"][:1], grad[:1]
    expanded = inputs | {"x": one.expand_as(grad)}
    copied = inputs | {"x": one.expand_as(grad).contiguous()}
    found = accuracy.results(fused, expanded, of_all.expand_as(grad))
    expected = accuracy.results(fused, copied, of_all.expand_as(grad).contiguous())
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_weights_that_are_views():
    inputs, grad = drawn("M40 C16 H32")
    expected = accuracy.results(fused, inputs, grad)
    views = {n: torch.stack([t, t], -1)[..., 0] for n, t in inputs.items() if n != "x"}
    found = accuracy.results(fused, inputs | views, grad)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("misaligned", ["x", "weight_gate", "norm_weight"])
def test_views_that_begin_anywhere(misaligned):
    inputs, grad = drawn("M40 C16 H32")
    expected = accuracy.results(fused, inputs, grad)  # whose launches are kept for this layout
    flat = inputs[misaligned].flatten()
    shifted = torch.cat([flat[:1], flat])[1:].view(inputs[misaligned].shape)
    assert shifted.data_ptr() % 16
    found = accuracy.results(fused, inputs | {misaligned: shifted}, grad)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_gates_stay_finite(dtype):
    """One in a hundred is between its limits, so that few rows would be too few for a mean."""
    inputs, grad = drawn("M700 C64 H32", dtype)
    inputs["weight_gate"] *= 1000
    assert_accurate(*three_results(inputs, grad))


def test_rows_far_from_zero_keep_their_digits():
    """A variance from squares, less the mean's square, would be nonsense here."""
    inputs, grad = drawn("M40 C64 H64", torch.float16)
    inputs["x"] += 100
    assert_accurate(*three_results(inputs, grad))


@pytest.mark.parametrize("shape", ["M200 C64 H128", "M200 C136 H128"])
def test_ten_calls_give_the_same_bits(shape):
    inputs, grad = drawn(shape)
    first = accuracy.results(fused, inputs, grad)
    for _ in range(9):
        again = accuracy.results(fused, inputs, grad)
        assert all(torch.equal(value, first[name]) for name, value in again.items())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["M20000 C128 H512", "M20000 C768 H1536"])
@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_products_are_as_torch_sets_them(shape, tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    assert_accurate(*three_results(*drawn(shape, torch.float32)))


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers():
    rows = 2**31 // 128 + 77
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(rows, 128, dtype=torch.bfloat16, device=DEVICE, generator=generator)
    inputs, _ = drawn("M1 C128 H128", torch.bfloat16)
    last = {**inputs, "x": x[-64:].clone()}
    with torch.no_grad():
        assert torch.equal(fused(inputs | {"x": x})[-64:], fused(last))
