"""Dropout and the residual within triangle multiplication: memory, and what is computed.

On a GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megafold import ops
from megafold.bench.cases import differentiable
from megafold.bench.memory import saved_bytes
from megafold.ops.triangle_multiplication import dropout as dropout_module
from megafold.ops.triangle_multiplication import launch, passes
from megafold.ops.triangle_multiplication.dropout import as_read
from tests.numerics import DEVICE
from tests.ops.layer_norms import ON_GPU, assert_kernels_accurate, results_of
from tests.ops.test_triangle_multiplication import LAUNCHES, assert_same, each_way, strided
from tests.ops.test_triangle_multiplication_residual import SHARED, added_to_z, of_shape

# -- Memory: strides, what is copied, what is kept.


@pytest.mark.parametrize("letters", SHARED)
def test_strides_do_not_matter(letters):
    case, inputs, grad = added_to_z("B2 N4 C24", letters=letters)
    expected = results_of(case, inputs, grad)
    apart = {name: strided(t) if t.dim() else t for name, t in inputs.items()}
    assert_same(results_of(case, apart, strided(grad)), expected)


@pytest.mark.parametrize("letters", [None, "..NC"], ids=["residual", "both"])
def test_z_and_a_gradient_that_are_parts_of_others_are_read_where_they_lie(letters):
    """Rows further apart than C, and not alike, of more than one program."""
    case, inputs, grad = added_to_z("B1 N9 C16", letters=letters)
    expected = results_of(case, inputs, grad)
    wide = torch.cat([grad, grad, grad], dim=-1)[..., 16:32]
    z = torch.cat([inputs["z"], inputs["z"]], dim=-1)[..., 16:]
    assert_same(results_of(case, {**inputs, "z": z}, wide), expected)


@pytest.mark.parametrize("letters", [None, "..NC"], ids=["residual", "both"])
def test_an_expanded_gradient_is_taken(letters):
    case, inputs, grad = added_to_z(letters=letters)
    assert_kernels_accurate(case, inputs, grad[:, :1, :1].expand(grad.shape))


@pytest.mark.parametrize("letters", [None, "..NC"], ids=["residual", "both"])
def test_the_gradient_of_a_sum_is_taken(letters):
    case, inputs, grad = added_to_z(letters=letters)
    expected = results_of(case, inputs, torch.ones_like(grad))
    leaves = {n: t.detach().requires_grad_() for n, t in differentiable(inputs).items()}
    with ops.use("triton"):
        case.run({**inputs, **leaves}).sum().backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[f"grad {name}"]), name


@pytest.mark.parametrize(
    ("letters", "strides"),
    [
        ("..NC", (0, 0, 7, 1)),
        (".N.C", (0, 7, 0, 1)),
        ("BNNC", (63, 21, 7, 1)),
        ("B..C", (7, 0, 0, 1)),
        ("C", (0, 0, 0, 1)),
        ("N.", (0, 0, 1, 0)),
        ("", (0, 0, 0, 0)),
    ],
)
def test_what_repeats_is_read_where_it_lies(letters, strides):
    z = torch.empty(2, 3, 3, 7)
    dropout = torch.empty(of_shape(letters, z))
    read = as_read(dropout, z.shape)
    assert read.tensor.data_ptr() == dropout.data_ptr()
    assert read.strides == strides


def test_channels_apart_are_copied_and_what_repeats_still_does():
    z = torch.empty(2, 3, 3, 7)
    read = as_read(strided(torch.rand(3, 1, 7)), z.shape)
    assert read.strides == (0, 7, 0, 1)
    assert read.tensor.untyped_storage().nbytes() == 3 * 7 * 4


def test_dropout_is_all_that_is_kept_beside():
    case, inputs, _ = added_to_z()
    given = {n: t.requires_grad_(n in differentiable(inputs)) for n, t in inputs.items()}
    pairs, of_z = 36, inputs["z"].nbytes

    def call():
        with ops.use("triton"):
            return case.run(given)

    assert saved_bytes(call, given.values()) == 2 * of_z + 4 * 4 * pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_of_the_update_lies_in_the_buffer(dtype, monkeypatch):
    """Where that of b will be, beside x and the sums of the weights: the same as elsewhere."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    case, inputs, grad = added_to_z("B1 N15 C5", dtype)
    buffers, found, others = [], [], []
    empty, multiply, sums = passes._Backward._empty, passes.multiply, passes._Backward._sums

    def made(self, shape, of):
        buffers.append(empty(self, shape, of))
        return buffers[-1]

    def watched(grad, dropout, tokens, out):
        found.append(out)
        multiply(grad, dropout, tokens, out)

    def summed(self, spare, *shape):
        others.append(sums(self, spare, *shape))
        return others[-1]

    monkeypatch.setattr(passes._Backward, "_empty", made)
    monkeypatch.setattr(passes._Backward, "_sums", summed)
    monkeypatch.setattr(passes, "multiply", watched)
    within = results_of(case, inputs, grad)
    (of_update,), work = found, buffers[0]
    assert of_update.untyped_storage().data_ptr() == work.untyped_storage().data_ptr()
    assert of_update.dtype == dtype
    assert [t.untyped_storage().data_ptr() == work.data_ptr() for t in others] == [True, True]

    monkeypatch.setattr(
        passes._Backward, "_sums", lambda self, spare, *shape: empty(self, shape, torch.float32)
    )
    monkeypatch.setattr(passes, "multiply", multiply)
    assert_same(results_of(case, inputs, grad), within)


@ON_GPU
@each_way
def test_both_passes_take_no_more_than_without(way):
    """Six tensors of the size of z at the peak, and its gradient."""
    from megafold.bench.memory import peak_bytes

    case, inputs, grad = added_to_z(f"B1 N384 C128{way}", torch.bfloat16)
    leaves = {n: t.requires_grad_() for n, t in differentiable(inputs).items()}
    given = {**inputs, **leaves}

    def call():
        with ops.use("triton"):
            return torch.autograd.grad(case.run(given), list(leaves.values()), grad)

    assert peak_bytes(call, DEVICE) <= 7 * inputs["z"].nbytes


# -- What is asked for.


@pytest.mark.parametrize("letters", [None, "..NC"], ids=["residual", "both"])
@pytest.mark.parametrize(
    "names", [*((name,) for name in passes.OPERANDS), ("z", "p_out_weight")], ids="+".join
)
def test_gradients_asked_for_apart_are_those_of_all(names, letters):
    case, inputs, grad = added_to_z(letters=letters)
    every = results_of(case, inputs, grad)
    leaves = [inputs[name].detach().requires_grad_() for name in names]
    with ops.use("triton"):
        out = case.run({**inputs, **dict(zip(names, leaves, strict=True))})
    for name, found in zip(names, torch.autograd.grad(out, leaves, grad), strict=True):
        assert torch.equal(found, every[f"grad {name}"]), name


@pytest.mark.parametrize(
    ("name", "kernels", "past"),
    [
        ("p_out_weight", LAUNCHES[:1], []),
        ("norm_out_weight", LAUNCHES[1:2], []),
        ("g_in_weight", LAUNCHES[1:3], []),
        ("norm_in_bias", LAUNCHES[1::2], [False]),
        ("z", LAUNCHES[1::2], [True]),
    ],
)
def test_what_is_not_asked_for_is_not_computed(name, kernels, past, monkeypatch):
    """Which kernels run; the residual is read where the gradient of z is asked for alone."""
    run, added = [], []
    for launched in LAUNCHES:
        real = getattr(launch, launched)
        monkeypatch.setattr(
            launch, launched, lambda *a, n=launched, r=real: (run.append((n, a)), r(*a))[1]
        )
    multiplied = mock.Mock(side_effect=passes.multiply)
    monkeypatch.setattr(passes, "multiply", multiplied)
    case, inputs, grad = added_to_z()
    leaf = inputs[name].requires_grad_()
    with ops.use("triton"):
        out = case.run(inputs)
    assert not multiplied.called
    torch.autograd.grad(out, [leaf], grad)
    assert tuple(launched for launched, _ in run) == kernels
    assert multiplied.call_count == 1
    added = [a[-5] is not None for launched, a in run if launched == "launch_grad_z"]
    assert added == past


def test_nothing_is_multiplied_without_dropout(monkeypatch):
    monkeypatch.setattr(passes, "multiply", None)
    case, inputs, grad = added_to_z(letters=None)
    assert results_of(case, inputs, grad)["grad z"].isfinite().all()


# -- The kernel that multiplies.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [1, 24, 32, 200])
def test_the_gradient_times_dropout_is_rounded_once(channels, dtype):
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(2 * 7 * 7, 2 * channels, generator=generator).to(DEVICE)[:, :channels]
    dropout = torch.rand(7, 1, channels, generator=generator).to(DEVICE)
    out = torch.full((2 * 7 * 7, channels), torch.nan, dtype=dtype, device=DEVICE)
    shape = torch.Size((2, 7, 7, channels))
    dropout_module.multiply(grad, as_read(dropout, shape), 7, out)
    assert torch.equal(out, (grad.view(shape) * dropout).view(-1, channels).to(dtype))
