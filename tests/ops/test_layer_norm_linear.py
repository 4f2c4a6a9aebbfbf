"""LayerNorm + Linear by its kernels against the equation in fp64: sizes, strides, block sizes.

On a GPU where there is one, else in Triton's interpreter, which is why most sizes are small.
"""

from __future__ import annotations

import pytest
import torch

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.ops.layer_norm_linear import launch
from megafold.ops.recording import launches
from tests.numerics import DEVICE, draw
from tests.ops.layer_norms import (
    DTYPES,
    HALF,
    ON_GPU,
    assert_kernels_accurate,
    assert_shape_accurate,
    results_of,
)

OP = "layer_norm_linear"
WIDTHS = [16, 32, 64, 128, 256, 384, 449, 768, 833, 1024]  # those of AlphaFold 3
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_half = pytest.mark.parametrize("dtype", HALF)


@each_dtype
@pytest.mark.parametrize("channels", [*WIDTHS, 8, 20, 1100])
def test_every_width(channels, dtype):
    # Few numbers scatter: where rows are narrow there are more of them.
    rows = 200 if channels <= 64 else 33
    assert_shape_accurate(OP, f"M{rows} C{channels} O24", dtype)


@each_half
@pytest.mark.parametrize("outs", [1, 3, 16, 37, 65, 129])
def test_any_number_of_outputs(outs, dtype):
    assert_shape_accurate(OP, f"M100 C72 O{outs}", dtype)  # of few numbers errors scatter


# In fp32 a few rows are too few for the mean of errors of one rounding each.
@each_half
@pytest.mark.parametrize("rows", [1, 2, 15, 64, 97])
def test_any_number_of_rows(rows, dtype):
    assert_shape_accurate(OP, f"M{rows} C20 O12", dtype)


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize(
    "shape",
    [
        "M147456 C128 O128",
        "M60000 C128 O16",
        "M36864 C128 O516",
        "M5000 C64 O1000",
        "M36864 C768 O384",
        "M768 C833 O384",
        "M768 C384 O1536",
    ],
)
def test_large_sizes(shape, dtype):
    assert_shape_accurate(OP, shape, dtype)


def drawn(shape: str, dtype: torch.dtype = torch.float16):
    case = cases.case(OP, shape)
    return case, *draw(case, dtype, DEVICE)


@each_half
@pytest.mark.parametrize("channels", [24, 200])
@pytest.mark.parametrize(
    "absent", [("norm_weight",), ("norm_bias",), ("norm_weight", "norm_bias")], ids="+".join
)
def test_norm_parameters_may_be_left_out(absent, channels, dtype):
    case, inputs, grad = drawn(f"M40 C{channels} O24", dtype)
    assert_kernels_accurate(case, {**inputs, **dict.fromkeys(absent)}, grad)


@each_dtype
@pytest.mark.parametrize("channels", [24, 200])
def test_a_bias_is_added_and_has_its_gradient(channels, dtype):
    case, inputs, grad = drawn(f"M200 C{channels} O24", dtype)
    bias = torch.randn(24, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    assert_kernels_accurate(case, {**inputs, "bias": bias}, grad)


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a larger tensor."""
    return torch.stack([t, t], dim=-1).flatten(-2)[..., ::2]


@each_half
@pytest.mark.parametrize("channels", [24, 200])
def test_strides_do_not_matter(channels, dtype):
    case, inputs, grad = drawn(f"M40 C{channels} O24", dtype)
    expected = results_of(case, inputs, grad)
    apart = {n: None if t is None else strided(t) for n, t in inputs.items()}
    for name, value in results_of(case, apart, strided(grad)).items():
        assert torch.equal(value, expected[name]), name


@each_half
def test_rows_cut_out_of_a_wider_tensor_are_not_copied(dtype):
    case, inputs, grad = drawn("M40 C24 O24", dtype)
    x, weight = inputs["x"], inputs["weight"]
    cut = {
        **inputs,
        "x": torch.cat([x, x], dim=1)[:, 24:],
        "weight": torch.cat([weight, weight], dim=1)[:, :24],
    }
    assert launch.as_rows(cut["x"]).data_ptr() == cut["x"].data_ptr()
    expected = results_of(case, inputs, grad)
    for name, value in results_of(case, cut, torch.cat([grad, grad], dim=1)[:, :24]).items():
        assert torch.equal(value, expected[name]), name


@each_half
@pytest.mark.parametrize("channels", [24, 200])
def test_an_expanded_gradient_is_taken(channels, dtype):
    case, inputs, grad = drawn(f"M40 C{channels} O24", dtype)
    assert_kernels_accurate(case, inputs, grad[:1].expand(grad.shape))


def test_any_number_of_leading_dimensions():
    case, inputs, _ = drawn("M24 C16 O8")
    with ops.use("triton"):
        flat = case.run(inputs)
        folded = case.run({**inputs, "x": inputs["x"].reshape(2, 3, 4, 16)})
        one = case.run({**inputs, "x": inputs["x"][5]})
    assert folded.shape == (2, 3, 4, 8)
    assert torch.equal(folded.flatten(0, 2), flat)
    assert one.shape == (8,)
    torch.testing.assert_close(one, flat[5])


@each_half
@pytest.mark.parametrize("channels", [24, 200])
def test_a_large_mean_does_not_cancel(channels, dtype):
    case, inputs, grad = drawn(f"M40 C{channels} O24", dtype)
    assert_kernels_accurate(case, {**inputs, "x": inputs["x"] + 60}, grad)


@each_half
@pytest.mark.parametrize("channels", [24, 200])
def test_an_offset_far_above_the_normalised_does_not_cancel(channels, dtype):
    case, inputs, grad = drawn(f"M40 C{channels} O24", dtype)
    assert_kernels_accurate(case, {**inputs, "norm_bias": inputs["norm_bias"] + 30}, grad)


@each_dtype
@pytest.mark.parametrize("channels", [24, 200])
def test_rows_that_are_constant_give_the_offset_and_finite_gradients(channels, dtype):
    case, inputs, grad = drawn(f"M17 C{channels} O24", dtype)
    results = results_of(case, {**inputs, "x": torch.ones_like(inputs["x"])}, grad)
    offset = inputs["norm_bias"].double() @ inputs["weight"].double().T
    torch.testing.assert_close(
        results["output"].double(), offset.expand(17, 24), rtol=0.01, atol=0.01
    )
    assert all(torch.isfinite(value).all() for value in results.values())


@pytest.mark.parametrize("shape", ["M0 C24 O8", "M5 C24 O0", "M0 C300 O8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_empty_inputs_give_empty_results_and_zero_gradients(shape, dtype):
    case, inputs, grad = drawn(shape, dtype)
    results = results_of(case, inputs, grad)
    assert results["output"].shape == case.output_shape
    for name, value in results.items():
        assert not value.numel() or (value == 0).all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [16, 128, 129, 768])
def test_both_passes_are_fused_for_half_operands_of_at_most_128_channels(channels, dtype):
    weight = torch.empty(24, channels, dtype=dtype)
    assert launch.is_fused(weight) == (channels <= 128 and dtype != torch.float32)


def with_blocks(kernel: str, **blocks: int):
    return ops.use_config(kernel, ops.Config(blocks, 4, 1))


@each_half
@pytest.mark.parametrize(
    ("channels", "block_m", "block_o"), [(24, 16, 16), (50, 32, 16), (50, 64, 64)]
)
def test_forward_block_sizes_change_no_more_than_rounding(channels, block_m, block_o, dtype):
    case, inputs, grad = drawn(f"M70 C{channels} O40", dtype)
    with with_blocks(launch.FORWARD, BLOCK_M=block_m, BLOCK_O=block_o):
        assert_kernels_accurate(case, inputs, grad)


@each_half
@pytest.mark.parametrize(
    ("shape", "block_o"),
    [
        ("M150 C24 O32", 16),
        ("M150 C24 O40", 16),
        ("M17 C50 O100", 32),
        ("M150 C128 O208", 64),
    ],
)
def test_a_weight_of_several_blocks_is_held_at_once(shape, block_o, dtype, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)  # one walks over all rows
    case, inputs, grad = drawn(shape, dtype)
    held = with_blocks(launch.FORWARD, BLOCK_M=16, BLOCK_O=block_o, HELD=1)
    with held, launches(run=True) as found:
        assert_kernels_accurate(case, inputs, grad)
    forward = next(one.launcher for one in found if one.kernel == launch.FORWARD)
    assert forward.grid[0] == 1
    assert forward.constants["HELD"] == -(-inputs["weight"].shape[0] // block_o) > 1


@each_half
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize(("block_m", "waves"), [(16, 1), (16, 4), (64, 2)])
def test_rows_are_shared_out_in_any_way(block_m, waves, shared, dtype):
    case, inputs, grad = drawn("M150 C24 O40", dtype)
    with with_blocks(launch.BACKWARD, BLOCK_M=block_m, WAVES=waves, SHARED=shared):
        assert_kernels_accurate(case, inputs, grad)


@each_half
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize(("block_o", "waves"), [(64, 1), (64, 9), (256, 2)])
def test_many_outputs_are_shared_out_in_any_way(block_o, waves, shared, dtype):
    """Groups of rows and slices of outputs, where neither number divides the other's."""
    case, inputs, grad = drawn("M150 C24 O140", dtype)
    with (
        with_blocks(launch.GRAD_X, BLOCK_M=16, BLOCK_O=block_o // 2, WAVES=waves),
        with_blocks(launch.PRODUCT, BLOCK_M=16, BLOCK_O=block_o, WAVES=waves, SHARED=shared),
    ):
        assert_kernels_accurate(case, inputs, grad)


@each_half
@pytest.mark.parametrize("outs", [24, 140])
def test_rows_that_lie_far_apart_are_copied(outs, dtype, monkeypatch):
    case, inputs, grad = drawn(f"M40 C24 O{outs}", dtype)
    wide = {**inputs, "x": torch.cat([inputs["x"]] * 9, dim=1)[:, :24]}
    expected = results_of(case, inputs, grad)
    monkeypatch.setattr(launch, "FAR", 200)
    assert launch.near_rows(wide["x"]).stride(0) == 24
    for name, value in results_of(case, wide, grad).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("shape", ["M70 C24 O40", "M70 C24 O140", "M40 C200 O24"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gradients_that_are_not_asked_for_change_no_other(shape, dtype):
    case, inputs, grad = drawn(shape, dtype)
    inputs["bias"] = torch.zeros(case.output_shape[1], dtype=dtype, device=DEVICE)
    every = results_of(case, inputs, grad)
    for name in inputs:
        alone = {n: t.detach().requires_grad_(n == name) for n, t in inputs.items()}
        with ops.use("triton"):
            out = case.run(alone)
        (of_one,) = torch.autograd.grad(out, [alone[name]], grad)
        assert torch.equal(of_one, every[f"grad {name}"]), name


def test_what_is_not_asked_for_is_not_computed(monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "launch_finish", lambda *a: asked.append("parameters"))
    case, inputs, grad = drawn("M20 C24 O8")
    inputs["x"].requires_grad_()
    with ops.use("triton"):
        case.run(inputs).backward(grad)
    assert inputs["x"].grad is not None
    assert asked == []


@each_dtype
@pytest.mark.parametrize("outs", [40, 140])
def test_the_same_input_gives_the_same_bits(outs, dtype):
    case, inputs, grad = drawn(f"M150 C24 O{outs}", dtype)
    first, second = results_of(case, inputs, grad), results_of(case, inputs, grad)
    assert all(torch.equal(second[name], value) for name, value in first.items())


@pytest.mark.parametrize("shape", ["M40 C24 O24", "M40 C200 O24"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_only_statistics_are_kept_for_the_backward_pass(shape, dtype):
    case, inputs, _ = drawn(shape, dtype)
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    given = {n: t.requires_grad_() for n, t in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), ops.use("triton"):
        case.run(given)
    own = {t.data_ptr() for t in given.values()}
    made = [t for t in saved if t.data_ptr() not in own]
    assert [(tuple(t.shape), t.dtype) for t in made] == [((2, 40), torch.float32)]


@ON_GPU
def test_the_forward_pass_takes_no_memory_beside_its_results():
    case, inputs, _ = drawn("M65536 C128 O64", torch.bfloat16)
    with ops.use("triton"):
        case.run(inputs)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = case.run(inputs)
    own = out.numel() * 2 + 2 * 4 * 65536
    assert torch.cuda.max_memory_allocated() - before <= own + 2**16


def test_accuracy_is_that_of_the_reference_under_autocast():
    """x and the norm stay fp32, the product has operands in the autocast dtype."""
    case, inputs, grad = drawn("M70 C24 O40", torch.float32)

    def run(function):
        def call(given):
            with torch.autocast(DEVICE, dtype=torch.float16), ops.use("triton"):
                return function(given)

        return accuracy.results(call, inputs, grad)

    fused, eager = run(case.run), run(case.run_reference)
    exact = accuracy.exact_results(case, inputs, grad)
    assert {n: t.dtype for n, t in fused.items()} == {n: t.dtype for n, t in eager.items()}
    assert [c for c in accuracy.compare(fused, eager, exact) if not c.passes] == []
