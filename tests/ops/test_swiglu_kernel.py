"""The SwiGLU kernel: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from megafold import ops
from megafold.bench import accuracy, cases
from megafold.ops.transition import kernels
from megafold.ops.transition.reference import swiglu_reference
from tests.numerics import DEVICE, assert_accurate, assert_case_accurate

SIZES = [0, 1, 17, 1023, 1024, 1025, 4097]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def drawn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def swiglu(inputs):
    return kernels.swiglu(inputs["gate"], inputs["value"])


def eager(inputs):
    return swiglu_reference(inputs["gate"], inputs["value"])


def all_results(size, dtype):
    """Output and gradients of the kernel, of eager, and in fp64, on the same values."""
    inputs = {"gate": drawn(size, dtype=dtype), "value": drawn(size, dtype=dtype, seed=1)}
    grad = drawn(size, dtype=dtype, seed=2)
    doubles = {name: t.double() for name, t in inputs.items()}
    return (
        accuracy.results(swiglu, inputs, grad),
        accuracy.results(eager, inputs, grad),
        accuracy.results(eager, doubles, grad),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_element_of_output_and_gradients_is_right(size, dtype):
    fused, _, exact = all_results(size, dtype)
    eps = torch.finfo(dtype).eps
    for name, value in fused.items() if size else ():
        scale = exact[name].abs().max().item()  # the slope of silu crosses zero
        torch.testing.assert_close(
            value.double(), exact[name], rtol=4 * eps, atol=eps * scale, msg=name
        )
    assert all(value.shape == (size,) for value in fused.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1023, 4097])
def test_output_and_gradients_are_as_accurate_as_eager(size, dtype):
    assert_accurate(*all_results(size, dtype))


@pytest.mark.gpu  # the interpreter cuts bf16 off where a GPU rounds
def test_output_and_gradients_in_bf16_are_as_accurate_as_eager():
    assert_accurate(*all_results(4097, torch.bfloat16))


@pytest.mark.parametrize("size", SIZES)
def test_every_element_is_written_and_none_beyond(size):
    gate, value, grad = (drawn(size, seed=s) for s in range(3))
    beyond = 64

    def guarded():
        return torch.full((size + beyond,), float("nan"), device=DEVICE)

    out, grad_gate, grad_value = guarded(), guarded(), guarded()
    kernels.launch_forward(gate, value, out[:size])
    kernels.launch_backward(grad, gate, value, grad_gate[:size], grad_value[:size])
    for written in (out, grad_gate, grad_value):
        assert torch.isfinite(written[:size]).all()
        assert torch.isnan(written[size:]).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates_stay_finite(dtype):
    gate = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], device=DEVICE, dtype=dtype)
    inputs = {"gate": gate, "value": torch.ones_like(gate)}
    results = accuracy.results(swiglu, inputs, torch.ones_like(gate))
    exact = accuracy.results(
        eager, {n: t.double() for n, t in inputs.items()}, torch.ones_like(gate)
    )
    for name, value in results.items():
        torch.testing.assert_close(value, exact[name].to(dtype), msg=name)


def test_any_strides_and_any_shape():
    gate, value = drawn(6, 5, 8), drawn(6, 5, 8, seed=1)
    expected = kernels.swiglu(gate, value)
    turned = kernels.swiglu(gate.transpose(0, 2), value.transpose(0, 2))
    assert torch.equal(turned, expected.transpose(0, 2))
    both = torch.cat([gate, value], dim=-1)
    assert torch.equal(kernels.swiglu(*both.chunk(2, dim=-1)), expected)
    row = gate[:1].expand(6, 5, 8)
    assert torch.equal(kernels.swiglu(row, value), kernels.swiglu(row.contiguous(), value))


def test_gradient_of_any_strides():
    gate, value = drawn(6, 8).requires_grad_(), drawn(6, 8, seed=1).requires_grad_()
    grad = drawn(8, 6, seed=2).t()
    expected = torch.autograd.grad(kernels.swiglu(gate, value), (gate, value), grad.contiguous())
    actual = torch.autograd.grad(kernels.swiglu(gate, value), (gate, value), grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_second_backward_gives_the_same_gradients():
    gate, value = drawn(1025).requires_grad_(), drawn(1025, seed=1).requires_grad_()
    out = kernels.swiglu(gate, value)
    grad = drawn(1025, seed=2)
    first = torch.autograd.grad(out, (gate, value), grad, retain_graph=True)
    second = torch.autograd.grad(out, (gate, value), grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivative_is_refused_with_a_way_out():
    gate, value = drawn(8).requires_grad_(), drawn(8, seed=1).requires_grad_()
    out = kernels.swiglu(gate, value).sum()
    (grad,) = torch.autograd.grad(out, gate, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'no second derivative.*use\("torch"\)'):
        grad.sum().backward()


def test_inputs_that_do_not_agree_are_refused():
    with pytest.raises(ValueError, match=r"gate is \(3, 4\) .* value is \(4, 3\)"):
        kernels.swiglu(drawn(3, 4), drawn(4, 3))
    with pytest.raises(ValueError, match=r"torch.float32 .*torch.float16 .*must agree"):
        kernels.swiglu(drawn(3), drawn(3, dtype=torch.float16))


def test_only_gate_and_value_are_kept_for_the_backward_pass():
    gate, value = drawn(1024).requires_grad_(), drawn(1024, seed=1).requires_grad_()
    kept = []

    def pack(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kernels.swiglu(gate, value)
    assert sorted(kept) == sorted([gate.data_ptr(), value.data_ptr()])


def test_registration_passes_opcheck():
    gate, value = drawn(5, 8).requires_grad_(), drawn(5, 8, seed=1).requires_grad_()
    torch.library.opcheck(torch.ops.megafold.swiglu.default, (gate, value))
    grad = drawn(5, 8, seed=2)
    tests = ("test_schema", "test_faketensor")  # it has no derivative, and says so
    torch.library.opcheck(
        torch.ops.megafold.swiglu_backward.default,
        (grad, gate.detach(), value.detach()),
        test_utils=tests,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_transition_with_the_kernel_is_as_accurate_as_eager(dtype):
    with ops.use("triton"):
        assert_case_accurate(cases.case("transition", "M67 C32 H128"), dtype, DEVICE)


def test_transition_with_the_kernel_keeps_less_than_pytorch():
    from megafold.bench.memory import saved_bytes

    case = cases.case("transition", "M64 C32 H128")
    inputs = case.make_inputs(DEVICE, torch.float32, torch.Generator().manual_seed(0))
    for t in inputs.values():
        t.requires_grad_()
    hidden = 64 * 128 * 4
    plain = saved_bytes(lambda: case.run_reference(inputs), inputs.values())
    with ops.use("triton"):
        fused = saved_bytes(lambda: case.run(inputs), inputs.values())
    assert plain - fused == hidden  # silu(gate)


def test_kernel_works_under_autocast():
    case = cases.case("transition", "M64 C32 H128")
    inputs = case.make_inputs(DEVICE, torch.float32, torch.Generator().manual_seed(0))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        with ops.use("triton"):
            fused = case.run(inputs)
        plain = case.run_reference(inputs)
    assert fused.dtype == plain.dtype == torch.bfloat16
    error, _ = accuracy.relative_errors(fused, plain.double())
    assert error < torch.finfo(torch.bfloat16).eps


def test_eps_reaches_the_norm_before_the_kernel():
    case = cases.case("transition", "M8 C8 H16")
    inputs = case.make_inputs(DEVICE, torch.float32, torch.Generator().manual_seed(0))
    with ops.use("triton"):
        fused = ops.transition(**inputs, eps=0.3)
    torch.testing.assert_close(fused, ops.reference.transition(**inputs, eps=0.3))
