"""Triangle multiplication by its kernels against the equation in fp64: sizes, masks, memory.

On a GPU where there is one, else in Triton's interpreter, which is why most sizes are small.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.bench.launches import META, Pass
from megafold.bench.memory import saved_bytes
from megafold.ops.sizes import OF_AN_H100
from megafold.ops.triangle_multiplication import launch, passes
from tests.numerics import DEVICE, assert_accurate, draw
from tests.ops.layer_norms import (
    DTYPES,
    HALF,
    ON_GPU,
    assert_kernels_accurate,
    assert_shape_accurate,
    results_of,
)

OP = "triangle_multiplication"
NORMS = ("norm_in_weight", "norm_in_bias", "norm_out_weight", "norm_out_bias")
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_half = pytest.mark.parametrize("dtype", HALF)
each_way = pytest.mark.parametrize("way", ["", " incoming"], ids=["outgoing", "incoming"])


def drawn(shape: str, dtype: torch.dtype = torch.float16, seed: int = 0):
    case = cases.case(OP, shape)
    return case, *draw(case, dtype, DEVICE, seed)


def fused(inputs, **options):
    with ops.use("triton"):
        return ops.triangle_multiplication(**inputs, **options)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, t in expected.items() if not torch.equal(found[name], t)] == []


@each_dtype
@each_way
@pytest.mark.parametrize("channels", [20, 32])
def test_every_width(channels, way, dtype):
    assert_shape_accurate(OP, f"B1 N8 C{channels}{way}", dtype)


@each_half
@pytest.mark.parametrize("channels", [16, 64, 128, 200])
def test_narrow_and_wide(channels, dtype):
    assert_shape_accurate(OP, f"B1 N5 C{channels}", dtype)


@each_half
def test_one_channel(dtype):
    """The gradient of a weight is a number or two then, which eager may get right by luck.

    So the rule is for the results of many draws side by side.
    """
    drawings = [drawn("B1 N5 C1", dtype, seed) for seed in range(16)]

    def together(results):
        found = [results(*drawing) for drawing in drawings]
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    exact = together(accuracy.exact_results)
    found = together(results_of)
    eager = together(lambda case, *given: accuracy.results(case.run_reference, *given))
    # Nothing passes back through a norm of one channel. A GPU rounds a product and a sum at once,
    # and is left with the rounding of the product, times an inverse deviation of up to 316.
    for name in [name for name, value in exact.items() if not value.any()]:
        del exact[name], eager[name]
        assert found.pop(name).abs().max() < 1e-3, name
    assert {"output", "grad p_out_weight", "grad g_out_weight"} <= set(exact)
    assert_accurate(found, eager, exact)


@each_half
@each_way
@pytest.mark.parametrize("size", ["B9 N1", "B2 N5", "B1 N16"])  # of one pair too few to average
def test_any_number_of_tokens_and_batches(size, way, dtype):
    assert_shape_accurate(OP, f"{size} C24{way}", dtype)


@pytest.mark.gpu
@each_dtype
@each_way
@pytest.mark.parametrize("size", ["B1 N384 C128", "B1 N257 C128", "B2 N100 C64", "B1 N64 C256"])
def test_large_sizes(size, way, dtype):
    assert_shape_accurate(OP, size + way, dtype)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """2 C M is more than 2^31; the last pairs alone are masked in, so that few others count."""
    tokens, channels = 2944, 128
    case = cases.case(OP, f"B1 N{tokens} C{channels}")
    inputs = case.make_inputs(DEVICE, torch.bfloat16, torch.Generator().manual_seed(0))
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    inputs["mask"][:, -9:, -9:] = True
    # Pairs among the last tokens are updated from triangles among them.
    corner = {**inputs, "z": inputs["z"][:, -9:, -9:], "mask": inputs["mask"][:, -9:, -9:]}
    with torch.no_grad():
        found = fused(inputs)[:, -9:, -9:]
        torch.testing.assert_close(found, fused(corner), rtol=0.02, atol=0.02)


def test_large_gates_in_fp32():
    """A sigmoid far from a half is as good as PyTorch's: that of the hardware is not."""

    def thirtyfold(inputs):
        gates = {name: 30 * inputs[name] for name in ("g_in_weight", "g_out_weight")}
        return {**inputs, **gates}

    assert_shape_accurate(OP, "B1 N5 C24", torch.float32, thirtyfold)


@each_half
def test_without_a_mask(dtype):
    case, inputs, grad = drawn("B1 N9 C24", dtype)
    assert_kernels_accurate(case, {**inputs, "mask": None}, grad)


@each_way
def test_a_mask_that_leaves_out_all_gives_the_offsets_output(way):
    case, inputs, grad = drawn(f"B1 N6 C16{way}")
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    assert_kernels_accurate(case, inputs, grad)


def test_what_is_masked_changes_nothing_but_its_own_output():
    case, inputs, _ = drawn("B1 N8 C16")
    other = {**inputs, "z": torch.where(inputs["mask"][..., None], inputs["z"], 7.0)}
    with ops.use("triton"):
        before, after = case.run(inputs), case.run(other)
    assert torch.equal(before[inputs["mask"]], after[inputs["mask"]])
    assert not torch.equal(before, after)


@each_half
@pytest.mark.parametrize("absent", [NORMS[:1], NORMS[1:2], NORMS[2:], NORMS], ids="+".join)
def test_norm_parameters_may_be_left_out(absent, dtype):
    case, inputs, grad = drawn("B1 N9 C24", dtype)
    assert_kernels_accurate(case, {**inputs, **dict.fromkeys(absent)}, grad)


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a larger tensor."""
    return torch.stack([t, t], dim=-1).flatten(-2)[..., ::2]


def test_strides_do_not_matter():
    case, inputs, grad = drawn("B2 N6 C24")
    expected = results_of(case, inputs, grad)
    apart = {name: strided(t) for name, t in inputs.items()}
    assert_same(results_of(case, apart, strided(grad)), expected)


def test_a_transposed_z_is_that_of_turned_edges():
    """Outgoing edges of the transpose are incoming ones, transposed."""
    _, inputs, grad = drawn("B1 N7 C16")
    turned = {
        **inputs,
        "z": inputs["z"].transpose(1, 2),
        "mask": inputs["mask"].transpose(1, 2),
    }
    outgoing = accuracy.results(lambda given: fused(given), turned, grad)
    packed = {name: t.contiguous() for name, t in turned.items()}
    assert_same(outgoing, accuracy.results(lambda given: fused(given), packed, grad))


def test_an_expanded_gradient_is_taken():
    case, inputs, grad = drawn("B1 N6 C16")
    assert_kernels_accurate(case, inputs, grad[:, :1, :1].expand(grad.shape))


def test_a_large_mean_does_not_cancel():
    case, inputs, grad = drawn("B1 N9 C24")
    assert_kernels_accurate(case, {**inputs, "z": inputs["z"] + 60}, grad)


@pytest.mark.parametrize("shape", ["B0 N4 C16", "B1 N0 C16"])
def test_empty_inputs_give_empty_results_and_zero_gradients(shape):
    case, inputs, grad = drawn(shape)
    results = results_of(case, inputs, grad)
    assert results["output"].shape == case.output_shape
    for name, value in results.items():
        assert not value.numel() or (value == 0).all(), name


# -- Block sizes, splits and parts.


def blocks_of(kernel, block_m, block_o, waves=1):
    blocks = {"BLOCK_M": block_m, "BLOCK_O": block_o}
    return ops.Config(blocks | ({"WAVES": waves} if kernel in launch.OF_WEIGHTS else {}), 4, 1)


@each_half
@pytest.mark.parametrize("kernel", launch.KERNELS)
@pytest.mark.parametrize(("block_m", "block_o"), [(16, 16), (128, 64)])
def test_block_sizes_change_no_more_than_rounding(kernel, block_m, block_o, dtype):
    case, inputs, grad = drawn("B1 N6 C40", dtype)
    with ops.use_config(kernel, blocks_of(kernel, block_m, block_o)):
        assert_kernels_accurate(case, inputs, grad)


@each_half
@pytest.mark.parametrize("shape", ["B2 N6 C18", "B1 N8 C32"], ids=["odd", "even"])
def test_pairs_in_splits(shape, dtype):
    """Many programs of each block of outputs, some of them with a block of pairs more."""
    case, inputs, grad = drawn(shape, dtype)
    with contextlib.ExitStack() as stack:
        for kernel in launch.OF_WEIGHTS:
            stack.enter_context(ops.use_config(kernel, blocks_of(kernel, 16, 16, waves=12)))
        problem = launch.Problem(*inputs["z"].shape[:2], inputs["z"].shape[3])
        for kernel in launch.OF_WEIGHTS:
            assert launch.splits_of(kernel, problem, inputs["p_in_weight"], False) > 1
        assert_kernels_accurate(case, inputs, grad)


@each_half
@each_way
def test_channels_in_parts(way, dtype, monkeypatch):
    """As many parts as there may be, though they are small: no room for sums beside them."""
    monkeypatch.setattr(passes, "PART_BYTES", 0)
    case, inputs, grad = drawn(f"B2 N6 C18{way}", dtype)
    assert_kernels_accurate(case, inputs, grad)


@each_dtype
def test_sums_of_gradients_lie_in_what_is_spare_of_the_buffer(dtype, monkeypatch):
    """Where it is large enough, wherever it begins: the same as in memory of their own."""
    # So many splits, and so much memory for sums, whatever GPU this is.
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    case, inputs, grad = drawn("B1 N15 C5", dtype)
    found, own = results_of(case, inputs, grad), []

    def allocate(self, spare, *shape):
        of = real(self, spare, *shape)
        own.append(of.untyped_storage().data_ptr() != spare.untyped_storage().data_ptr())
        return torch.empty_like(of)

    real = passes._Backward._sums
    monkeypatch.setattr(passes._Backward, "_sums", allocate)
    assert_same(found, results_of(case, inputs, grad))
    assert own == [False, False]


def test_parts_are_many_where_a_part_is_large():
    def parts(tokens):
        return passes.parts(launch.Problem(1, tokens, 128), 2)

    assert [parts(tokens) for tokens in (32, 256, 384, 768, 2048)] == [1, 1, 2, 4, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [383, 384])
def test_a_program_for_each_block_of_pairs(tokens, dtype):
    """And for the gradients of weights no more than the multiprocessors are to run at a time."""
    case = cases.case(OP, f"B1 N{tokens} C128")
    _, launched = Pass(case, META, dtype).launched()
    launched = [one for one in launched if one.kernel != "ops.add_sums"]
    assert [one.kernel for one in launched] == [*launch.KERNELS]
    for one in launched:
        programs, block = one.launcher.grid[0], one.launcher.constants["BLOCK_M"]
        if one.kernel in launch.OF_WEIGHTS:
            assert programs <= 2 * OF_AN_H100
        else:
            assert 0 <= programs * block - tokens**2 < block


# -- What is computed and kept.


@pytest.mark.parametrize("name", [*passes.OPERANDS])
def test_a_gradient_asked_for_alone_is_that_of_all(name):
    case, inputs, grad = drawn("B1 N6 C16")
    every = results_of(case, inputs, grad)
    leaf = inputs[name].detach().requires_grad_()
    (found,) = torch.autograd.grad(fused({**inputs, name: leaf}), [leaf], grad)
    assert torch.equal(found, every[f"grad {name}"])


LAUNCHES = ("launch_weights_out", "launch_grad_x", "launch_weights_in", "launch_grad_z")


@pytest.mark.parametrize(
    ("name", "kernels", "computed"),
    [
        ("p_out_weight", LAUNCHES[:1], []),
        ("norm_out_weight", LAUNCHES[1:2], [(None, None, True)]),
        ("g_in_weight", LAUNCHES[1:3], [(True, None, None)]),
        ("norm_in_bias", LAUNCHES[1::2], [(True, True, None), (None, True)]),
        ("z", LAUNCHES[1::2], [(True, True, None), (True, None)]),
    ],
)
def test_what_is_not_asked_for_is_not_computed(name, kernels, computed, monkeypatch):
    """Which kernels run, and which of their results those of tensors are asked for."""
    run = []
    for launched in LAUNCHES:
        real = getattr(launch, launched)
        monkeypatch.setattr(
            launch, launched, lambda *a, n=launched, r=real: (run.append((n, a)), r(*a))[1]
        )
    _, inputs, grad = drawn("B1 N6 C16")
    leaf = inputs[name].requires_grad_()
    torch.autograd.grad(fused(inputs), [leaf], grad)
    assert tuple(launched for launched, _ in run) == kernels
    results = {"launch_grad_x": slice(-4, -1), "launch_grad_z": slice(-4, -2)}
    found = [a[results[launched]] for launched, a in run if launched in results]
    assert [tuple(None if t is None else True for t in one) for one in found] == computed


@each_dtype
def test_the_same_input_gives_the_same_bits(dtype):
    case, inputs, grad = drawn("B1 N9 C24", dtype)
    assert_same(results_of(case, inputs, grad), results_of(case, inputs, grad))


def test_a_and_b_and_statistics_are_kept_for_the_backward_pass():
    _, inputs, _ = drawn("B1 N6 C16")
    given = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in inputs.items()}
    pairs, of_z = 36, inputs["z"].nbytes
    assert saved_bytes(lambda: fused(given), given.values()) == 2 * of_z + 4 * 4 * pairs


@ON_GPU
@each_way
def test_both_passes_take_no_more_than_six_tensors_of_the_size_of_z(way):
    """Of torch.compile they are twelve. The gradient of z is one more, here as there."""
    from megafold.bench.memory import peak_bytes

    _, inputs, grad = drawn("B1 N384 C128", torch.bfloat16)
    options = {"outgoing": not way}
    leaves = [t.requires_grad_() for t in inputs.values() if t.is_floating_point()]
    peak = peak_bytes(lambda: torch.autograd.grad(fused(inputs, **options), leaves, grad), DEVICE)
    assert peak <= 7 * inputs["z"].nbytes
