"""The gated linear layer's views of rows, and what a call copies, launches and computes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megafold import ops
from megafold.bench import cases
from megafold.model.triangle import PairStack
from megafold.ops.gated_linear import function, launch
from megafold.ops.gated_linear.rows import as_rows, expanded, with_neighbours
from tests.numerics import DEVICE, draw
from tests.ops.layer_norms import DTYPES, HALF, ON_GPU, assert_kernels_accurate, results_of

CHANNELS = 5


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


def in_order(order: tuple[int, ...], lead: tuple[int, ...]) -> torch.Tensor:
    """``[*lead, CHANNELS]`` whose leading dimensions lie in memory in an order of their own."""
    t = numbers(*(lead[dim] for dim in order), CHANNELS)
    return t.permute(*(order.index(dim) for dim in range(len(lead))), len(lead))


def layouts(lead: tuple[int, ...]) -> list[torch.Tensor]:
    """Tensors ``[*lead, CHANNELS]``: in every order, cut out, repeating, with channels apart."""
    found = [in_order(order, lead) for order in itertools.permutations(range(len(lead)))]
    found.append(numbers(*lead, 3 * CHANNELS)[..., 1 : CHANNELS + 1])
    found.append(numbers(*lead, CHANNELS, 2)[..., 0])
    for dim in range(len(lead) + 1):
        shape = [1 if other == dim else size for other, size in enumerate((*lead, CHANNELS))]
        found.append(expanded(numbers(*shape), (*lead, CHANNELS)))
    return found


def read(inner: int, rows) -> torch.Tensor:
    """What a kernel finds at these strides, ``[M, CHANNELS]``."""
    t = rows.tensor
    count = t.numel() // CHANNELS
    m = torch.arange(count)
    first = t.storage_offset() + m // inner * rows.i + m % inner * rows.j
    everything = torch.as_strided(t, (t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)
    return everything[first[:, None] + torch.arange(CHANNELS)]


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (1, 4), (3, 1, 2), (2, 3, 4)], ids=str)
def test_strides_reach_the_same_numbers(lead):
    found = layouts(lead)
    for one, other in itertools.product(found, repeat=2):
        inner, both = as_rows(lead, one, None, other)
        assert both[1] == (None, 0, 0)
        for t, rows in zip((one, other), (both[0], both[2]), strict=True):
            assert torch.equal(read(inner, rows), t.reshape(-1, CHANNELS))


@pytest.mark.parametrize("dim", [0, 1])
def test_one_tensor_in_any_order_of_two_dimensions_is_a_view(dim):
    lead = (2, 3)
    for t in (in_order((dim, 1 - dim), lead), numbers(*lead, 9)[..., 2:7], numbers(3, 5)[None]):
        t = expanded(t, (*lead, CHANNELS))
        _, (rows,) = as_rows(lead, t)
        assert rows.tensor is t


def test_the_fewest_are_copied():
    """Of three dimensions in two orders, whichever pair of strides serves more tensors."""
    lead = (2, 3, 4)
    first_apart, last_apart = in_order((1, 2, 0), lead), in_order((2, 0, 1), lead)
    for given, copied in (
        ((first_apart, first_apart, last_apart), [False, False, True]),
        ((first_apart, last_apart, last_apart), [True, False, False]),
    ):
        _, found = as_rows(lead, *given)
        assert [one.tensor is not t for one, t in zip(found, given, strict=True)] == copied


def test_what_repeats_is_copied_once_where_channels_lie_apart():
    t = expanded(numbers(3, 1, 2 * CHANNELS)[..., ::2], (3, 100, CHANNELS))
    near = with_neighbours(t)
    assert near.stride() == (CHANNELS, 0, 1)
    assert torch.equal(near, t)
    assert near.untyped_storage().nbytes() == 3 * CHANNELS * 4


def test_the_model_s_tensors_are_not_copied(monkeypatch):
    """Triangle attention with dropout, starting and ending, forward and backward."""
    copied, calls = [], []

    def watched(lead, *tensors):
        inner, found = as_rows(lead, *tensors)
        calls.append(len(tensors))
        copied.extend(t.shape for t, r in zip(tensors, found, strict=True) if r.tensor is not t)
        return inner, found

    monkeypatch.setattr(launch, "as_rows", watched)
    stack = PairStack(16, heads=2, dropout=0.25).to(DEVICE).train()
    z = torch.randn(5, 5, 16, device=DEVICE, requires_grad=True)
    with ops.use("triton"):
        out = stack(z, torch.ones(5, 5, dtype=torch.bool, device=DEVICE))
    out.backward(torch.randn_like(out))
    assert calls == [4, 4, 6, 6]  # two layers forward, with a residual and dropout, two backward
    assert copied == []


# -- Sizes.


def drawn(shape: str, dtype: torch.dtype = torch.float16):
    case = cases.case("gated_linear", shape)
    return case, *draw(case, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["N7 C100 O24", "N21 C24 O100"])
def test_odd_sizes(shape, dtype):
    assert_kernels_accurate(*drawn(shape, dtype))


@pytest.mark.parametrize("dtype", HALF)  # in fp32 one row is too few for a mean of errors
@pytest.mark.parametrize("shape", ["N1 C24 O100", "N1 C100 O24", "N5 C1 O1", "N5 C128 O1"])
def test_one_row_one_channel_one_output(shape, dtype):
    assert_kernels_accurate(*drawn(shape, dtype))


@pytest.mark.parametrize("waves", [1, 1000])
@pytest.mark.parametrize("block_n", [16, 64])
@pytest.mark.parametrize("block_m", [16, 32])
def test_blocks_of_any_sizes_change_no_more_than_rounding(block_m, block_n, waves):
    case, inputs, grad = drawn("N7 C40 O100")
    expected = results_of(case, inputs, grad)
    forward = ops.Config({"BLOCK_M": block_m, "BLOCK_O": block_n, "WAVES": waves}, 4, 1)
    backward = ops.Config({"BLOCK_M": block_m, "BLOCK_C": block_n, "WAVES": waves}, 4, 1)
    with ops.use_config(launch.FORWARD, forward), ops.use_config(launch.BACKWARD, backward):
        found = results_of(case, inputs, grad)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=2**-9, atol=2**-10, msg=name)


# -- What is launched.


@pytest.mark.parametrize("asked", ["x", "gate", "weight", "residual"])
def test_what_is_not_asked_for_is_not_computed(asked, monkeypatch):
    made = []

    def recorded(plan, problem, inner, grad, x, gate, dropout, grad_x, grad_gate, weight, sums):
        own = {"x": grad_x.tensor, "gate": grad_gate.tensor, "weight": sums}
        made.append([name for name, t in own.items() if t is not None])
        return launching(
            plan, problem, inner, grad, x, gate, dropout, grad_x, grad_gate, weight, sums
        )

    launching = launch.launch_backward
    monkeypatch.setattr(launch, "launch_backward", recorded)
    case, inputs, grad = drawn("N5 C24 O20")
    given = {name: t.requires_grad_(name == asked) for name, t in inputs.items()}
    with ops.use("triton"):
        case.run(given).backward(grad)
    assert made == ([] if asked == "residual" else [[asked]])
    assert given[asked].grad.shape == given[asked].shape


def test_one_tensor_may_be_x_and_gate_and_residual():
    case, inputs, grad = drawn("N6 C24")
    every = results_of(case, inputs | dict.fromkeys(("gate", "residual"), inputs["x"]), grad)
    z = inputs["x"].detach().requires_grad_()
    with ops.use("triton"):
        out = case.run(inputs | dict.fromkeys(("x", "gate", "residual"), z))
    (found,) = torch.autograd.grad(out, [z], grad)
    parts = every["grad x"].float() + every["grad gate"].float() + every["grad residual"].float()
    torch.testing.assert_close(found.float(), parts, rtol=2**-9, atol=2**-9)


# -- Limits.


@pytest.mark.parametrize(
    ("channels", "outs", "why"),
    [
        (128, 128, None),
        (129, 128, "the kernels take up to 128 channels, and x has 129"),
        (128, 129, "the kernels take up to 128 outputs, and weight has 129"),
    ],
)
def test_the_limit_is_128_channels_and_outputs(channels, outs, why):
    _, inputs, _ = drawn(f"N2 C{channels} O{outs}")
    with ops.use("triton"):
        if why is None:
            assert ops.explain("gated_linear", **inputs).implementation == "triton"
        else:
            with pytest.raises(NotImplementedError, match=f"^gated_linear: .*, but {why}$"):
                ops.gated_linear(**inputs)
    choice = ops.explain("gated_linear", **inputs)
    assert (why is None) == (choice.reason != why)
    assert why is None or choice.implementation == "torch"


@pytest.mark.parametrize("beyond", [0, 1])
def test_more_rows_than_32_bits_count_are_pytorch_s(beyond):
    rows = function.MOST_ROWS + beyond
    x = torch.zeros(1, 8, dtype=torch.float16, device=DEVICE).expand(rows, 8)
    with ops.use("triton"):
        if beyond:
            with pytest.raises(NotImplementedError, match=f"rows, and x has {rows}"):
                ops.explain("gated_linear", x, x, x[:8])
        else:
            assert ops.explain("gated_linear", x, x, x[:8]).implementation == "triton"


@ON_GPU
@pytest.mark.parametrize("which", ["x", "gate", "residual"])
def test_rows_that_lie_more_than_32_bits_apart(which):
    case, inputs, grad = drawn("N3 C64 O64", torch.bfloat16)
    expected = results_of(case, inputs, grad)
    wide = torch.zeros(3, 3, 2**28, dtype=torch.bfloat16, device=DEVICE)  # 4.8 GB
    wide[..., -64:] = inputs[which]
    inputs[which] = wide[..., -64:]
    for name, value in results_of(case, inputs, grad).items():
        assert torch.equal(value, expected[name]), name
