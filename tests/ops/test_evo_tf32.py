"""EvoAttention on fp32 operands that are multiplied in TF32, as torch's setting allows on NVIDIA.

Triton's interpreter has no TF32. There the kernels are told to use it: they round operands to the
nearest number of 10 bits themselves, and what is left, products of such numbers summed in fp32, is
what tensor cores compute. Eager is held to the same arithmetic: the operands of all its products
are rounded, in every shape, where cuBLAS leaves some shapes (odd N) in full fp32. So the rule is
that of every dtype: 1.5 times eager's error, here mostly that of TF32's rounding, 2**-11.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megafold import ops
from megafold.ops.evo_attention import launch, variants
from megafold.ops.precision import products_in
from megafold.ops.tuning import Config
from tests.numerics import DEVICE, assert_accurate
from tests.ops.evo import ON_GPU, attention, blocks, fused, fused_results, three_results
from tests.ops.test_evo_kernels import CHANGES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

ROUNDOFF = 2**-11  # of TF32: half the spacing of numbers of 10 bits
WIDTHS = [8, 16, 24, 32, 48, 64, 128]
PRODUCTS = {torch.ops.aten.bmm.default, torch.ops.aten.mm.default}


def rounded(t: torch.Tensor) -> torch.Tensor:
    """To the nearest number of TF32."""
    return ((t.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


class EagerInTf32(TorchDispatchMode):
    """Rounds the operands of every fp32 product inside, also in a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS and args[0].dtype == torch.float32:
            self.products += 1
            args = [rounded(t) for t in args]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def tf32(fp32_setting) -> Iterator[None]:
    """As torch is set to on a GPU; by word in the interpreter."""
    if DEVICE == "cpu":
        with products_in("tf32"):
            yield
    else:
        torch.set_float32_matmul_precision("high")
        yield


def assert_as_accurate_as_eager(inputs, grad, **options) -> None:
    found = fused_results(inputs, grad, **options)
    with EagerInTf32() as mode:
        _, eager, exact = three_results(inputs, grad, **options)
    assert mode.products == 6  # two, and two for the gradients of each
    assert_accurate(found, eager, exact)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "sizes", ["S2 N23 H1", *(pytest.param(s, marks=ON_GPU) for s in ("S5 N129 H2", "S8 N384 H4"))]
)
def test_every_head_width(sizes, width):
    assert_as_accurate_as_eager(*attention(f"B1 {sizes} D{width}"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.version.hip is not None, reason="AMD's GPUs have no TF32")
@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("sizes", ["B1 S8 N256 H4", "B1 S12 N452 H4"])
def test_held_to_the_very_products_of_cublas(sizes, width):
    found, eager, exact = three_results(*attention(f"{sizes} D{width}"))
    for name, value in eager.items():
        if float((value.double() - exact[name]).norm() / exact[name].norm()) < ROUNDOFF / 4:
            pytest.skip(f"cuBLAS multiplies {sizes} D{width} in full fp32 for the {name}")
    assert_accurate(found, eager, exact)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("sizes", ["S2 N64", "S2 N33 K64", "S2 N40 K19", "S1 N37", "S2 N20 K7"])
def test_every_length(sizes):
    assert_as_accurate_as_eager(*attention(f"B1 {sizes} H2 D16"))


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("change", CHANGES)
def test_masks_and_biases_of_every_kind(change):
    inputs, grad = attention("B2 S3 N17 K40 H1 D16")
    assert_as_accurate_as_eager({**inputs, **CHANGES[change](inputs)}, grad)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_weights_with_a_peak(scale):
    assert_as_accurate_as_eager(*attention("B1 S12 N19 H1 D16"), scale=scale)


@pytest.mark.usefixtures("tf32")
def test_wholly_masked_rows_give_zeros_and_zero_gradients():
    inputs, grad = attention("B2 S3 N17 H1 D16")
    inputs["mask"][0, 1] = False
    for name, value in fused_results(inputs, grad).items():
        assert torch.isfinite(value).all(), name
        if name != "grad pair_bias":
            assert (value[0, 1] == 0).all(), name
            assert (value[0, 0] != 0).any(), name


@pytest.mark.usefixtures("tf32")
def test_large_logits_neither_overflow_nor_lose_weights():
    inputs, grad = attention("B1 S2 N40 H1 D16")
    inputs["q"], inputs["k"] = 30 * inputs["q"], 30 * inputs["k"]
    for name, value in fused_results(inputs, grad).items():
        assert torch.isfinite(value).all(), name
    ones = {**inputs, "v": torch.ones_like(inputs["v"]), "mask": None}
    # Weights sum to one; what is multiplied is rounded, what is summed up is not.
    torch.testing.assert_close(fused(ones), ones["v"], rtol=ROUNDOFF, atol=0)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(
    "sizes", [(1, 16, 32, 1), (3, 64, 16, 0), pytest.param((2, 128, 32, 1), marks=ON_GPU)], ids=str
)
def test_block_sizes_change_nothing_but_rounding(sizes):
    inputs, grad = attention("B1 S3 N40 H1 D16")
    with blocks(*sizes):
        assert_as_accurate_as_eager(inputs, grad)


@pytest.mark.parametrize("passes", [("tf32", "ieee"), ("ieee", "tf32")], ids=str)
def test_the_setting_may_change_between_the_passes(passes):
    """What is kept for the backward pass means the same in both."""
    inputs, grad = attention("B1 S2 N40 H1 D16")
    floats = [name for name, tensor in inputs.items() if tensor.is_floating_point()]
    leaves = {name: inputs[name].clone().requires_grad_() for name in floats}
    with products_in(passes[0]):
        out = fused({**inputs, **leaves})
    with products_in(passes[1]):
        found = torch.autograd.grad(out, leaves.values(), grad)
    results = {f"grad {name}": g for name, g in zip(leaves, found, strict=True)}
    exact = three_results(inputs, grad)[2]
    for name, value in {"output": out, **results}.items():
        error = (value.double() - exact[name]).norm() / exact[name].norm()
        # A gradient goes through three products of two rounded operands each, a mean square of
        # less than a third of the roundoff's; where weights are far from even, errors of logits
        # count for more.
        assert error < 2 * ROUNDOFF, name


# -- How kernels are compiled, and what they are looked up by.


def constants(kernel: str, shape: str, precision: str) -> dict[str, object]:
    inputs = {n: t.to("meta") for n, t in attention(shape, device="cpu")[0].items()}
    names = {"ROWS": 1, "KEYS_FIRST": 0, "BLOCK_Q": 16, "BLOCK_K": 16}
    config = Config({n: names[n] for n in variants.block_names(kernel)}, 4, 1)
    with products_in(precision):
        return variants.variant(kernel, config, **inputs).constants


@pytest.mark.parametrize("kernel", launch.KERNELS)
def test_full_fp32_and_few_keys_are_exact_and_tf32_is_not(kernel):
    for keys, precision, exact in (
        (17, "ieee", True), (17, "tf32", False), (16, "ieee", True), (16, "tf32", True),
    ):  # fmt: skip
        found = constants(kernel, f"B1 S2 N20 K{keys} H1 D8", precision)
        assert (found["PRECISION"], found["EXACT"]) == (precision, exact)


def test_explain_says_how_fp32_is_multiplied_and_why(fp32_setting):
    inputs, _ = attention("B1 S2 N5 H1 D8")
    half = {n: t if t.dtype == torch.bool else t.half() for n, t in inputs.items()}

    def of_kernels(lines):  # without those that only a Hopper GPU has
        return [line for line in lines if not line.startswith("evo_attention.hopper: ")]

    with ops.use("triton"):
        full = ops.explain("evo_attention", **inputs).kernels
        with products_in("tf32"):
            tf32 = ops.explain("evo_attention", **inputs).kernels
            of_half = ops.explain("evo_attention", **half).kernels
    full, tf32, of_half = (of_kernels(lines) for lines in (full, tf32, of_half))
    why = "torch.backends.cuda.matmul does not allow TF32"
    why = why if DEVICE == "cuda" else "there is no TF32 on cpu"
    assert all(f"; fp32 products in full, for {why}" in line for line in full)
    assert all("; fp32 products in TF32, as asked for" in line for line in tf32)
    assert not any("products" in line for line in of_half)
    assert full[0].split(" (")[0] != tf32[0].split(" (")[0]  # other block sizes
