"""What holds for every operator alike."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megafold import ops
from megafold.bench import accuracy, cases
from tests.numerics import DEVICE, assert_case_accurate, draw
from tests.ops import equations

CASES = [
    cases.case("evo_attention", "B2 S3 N9 H2 D8"),
    cases.case("evo_attention", "B3 S2 N5 K11 H2 D24 shared"),
    cases.case("layer_norm_linear", "M37 C24 O10"),
    cases.case("gated_linear", "N6 C24 O10"),
    cases.case("gated", "S2 N9 A16"),
    cases.case("gated", "S3 N9 A20 shared"),
    cases.case("transition", "M37 C16 H48"),
    cases.case("triangle_multiplication", "B2 N7 C8"),
    cases.case("triangle_multiplication", "B2 N7 C8 incoming"),
    cases.case("triangle_attention", "B2 N7 C8 H2"),
    cases.case("triangle_attention", "B2 N7 C12 H2 D8 ending"),
    cases.case("adaptive_layer_norm", "S2 N9 A16 C12"),
    cases.case("conditioned_transition", "S2 N9 A16 C12 H24"),
    cases.case("conditioned_transition", "S3 N9 A16 C12 H24 shared"),
]
WITHOUT_NORM = ("evo_attention", "gated_linear", "gated")
LARGER = [
    cases.case("evo_attention", "B1 S17 N33 H4 D32"),
    cases.case("layer_norm_linear", "M1025 C128 O16"),
    cases.case("gated_linear", "N33 C64"),
    cases.case("gated", "S3 N65 A96 shared"),
    cases.case("transition", "M257 C64 H256"),
    cases.case("triangle_multiplication", "B1 N33 C32"),
    cases.case("triangle_attention", "B1 N33 C32 H2"),
    cases.case("adaptive_layer_norm", "S3 N65 A96 C48"),
    cases.case("conditioned_transition", "S3 N65 A96 C48 H192"),
]


def name(case: cases.Case) -> str:
    return f"{case.op}: {case.shape}"


each_case = pytest.mark.parametrize("case", CASES, ids=name)


@each_case
def test_reference_is_the_equation(case):
    inputs, grad = draw(case, torch.float64)
    written_out = getattr(equations, case.op)

    def equation(inputs):
        return written_out(**inputs, **case.options)

    expected = accuracy.results(equation, inputs, grad)
    for result, value in accuracy.exact_results(case, inputs, grad).items():
        torch.testing.assert_close(value, expected[result], rtol=1e-10, atol=1e-12, msg=result)


@pytest.mark.parametrize("case", [c for c in CASES if c.op not in WITHOUT_NORM], ids=name)
def test_eps_reaches_every_norm(case):
    inputs, _ = draw(case, torch.float64)
    out = case.function(**inputs, **case.options, eps=0.3)
    expected = getattr(equations, case.op)(**inputs, **case.options, eps=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LARGER, ids=name)
def test_reference_is_as_exact_as_its_dtype_allows(case, dtype):
    inputs, grad = draw(case, dtype)
    exact = accuracy.exact_results(case, inputs, grad)
    for result, value in accuracy.results(case.run_reference, inputs, grad).items():
        error, _ = accuracy.relative_errors(value, exact[result])
        assert error < 8 * torch.finfo(dtype).eps, f"{result}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LARGER, ids=name)
def test_operator_is_as_accurate_as_eager(case, dtype):
    assert_case_accurate(case, dtype)


@each_case
def test_gradients_match_finite_differences(case):
    inputs, _ = draw(case, torch.float64)
    names = list(cases.differentiable(inputs))

    def function(*tensors):
        return case.run({**inputs, **dict(zip(names, tensors, strict=True))})

    leaves = [inputs[n].requires_grad_() for n in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@each_case
def test_strides_do_not_matter(case):
    inputs, grad = draw(case, torch.float32)

    def strided(t):  # the same values, every second element of a larger tensor
        return torch.stack([t, t], dim=-1).flatten(-2)[..., ::2]

    spread = {n: t if t is None else strided(t) for n, t in inputs.items()}
    assert not any(t.is_contiguous() for t in spread.values() if t is not None)
    expected = accuracy.results(case.run, inputs, grad)
    for result, value in accuracy.results(case.run, spread, strided(grad)).items():
        torch.testing.assert_close(value, expected[result], msg=result)


@each_case
def test_expanded_inputs_are_taken_and_never_written(case):
    inputs, _ = draw(case, torch.float32)
    main = next(iter(inputs))
    one = inputs[main][:1]
    inputs[main] = one.expand(inputs[main].shape)
    before = one.clone()
    out = case.run(inputs)
    torch.testing.assert_close(out, case.run({**inputs, main: inputs[main].contiguous()}))
    assert torch.equal(one, before)


@each_case
def test_result_has_the_shape_and_dtype_of_the_contract(case):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        inputs, _ = draw(case, dtype)
        out = case.run(inputs)
        assert (tuple(out.shape), out.dtype) == (case.output_shape, dtype)


@each_case
def test_inputs_are_left_as_they_were(case):
    inputs, grad = draw(case, torch.float32)
    before = {n: None if t is None else t.clone() for n, t in inputs.items()}
    accuracy.results(case.run, inputs, grad)
    assert all(t is None or torch.equal(t, before[n]) for n, t in inputs.items())


@each_case
def test_second_backward_gives_the_same_gradients(case):
    inputs, grad = draw(case, torch.float32)
    leaves = [t.requires_grad_() for t in cases.differentiable(inputs).values()]
    out = case.run(inputs)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_case
def test_checkpointing_changes_nothing(case):
    inputs, grad = draw(case, torch.float32)

    def checkpointed(inputs):
        return checkpoint(case.run, inputs, use_reentrant=False)

    expected = accuracy.results(case.run, inputs, grad)
    for result, value in accuracy.results(checkpointed, inputs, grad).items():
        assert torch.equal(value, expected[result]), result


@each_case
def test_compiles_into_one_graph(case):
    inputs, grad = draw(case, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(case.run, backend="aot_eager", fullgraph=True)
    expected = accuracy.results(case.run, inputs, grad)
    for result, value in accuracy.results(compiled, inputs, grad).items():
        torch.testing.assert_close(value, expected[result], msg=result)


@each_case
def test_autocast_is_like_casting_what_pytorch_would_cast(case):
    inputs, _ = draw(case, torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = case.run(inputs)
    # Where there is a residual it stays in fp32; the others end in a matrix product (or multiply
    # two of them), which autocast returns in bf16, or are rounded to it.
    adds_to_fp32 = case.op in ("gated_linear", "gated", "triangle_attention")
    assert out.dtype == (torch.float32 if adds_to_fp32 else torch.bfloat16)
    exact = accuracy.exact_results(case, inputs)["output"]
    error, _ = accuracy.relative_errors(out, exact)
    halves = {n: t.bfloat16() if t.is_floating_point() else t for n, t in inputs.items()}
    cast_error, _ = accuracy.relative_errors(case.run_reference(halves), exact)
    assert torch.finfo(torch.float32).eps < error <= accuracy.FACTOR * cast_error


@each_case
def test_autocast_takes_mixed_dtypes_and_nothing_else_does(case):
    inputs, _ = draw(case, torch.float32)
    main = next(iter(inputs))
    mixed = {**inputs, main: inputs[main].bfloat16()}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.isfinite(case.run(mixed)).all()
    with pytest.raises(TypeError, match=rf"{case.op}: \w+ is torch.float32, but {main} is"):
        case.run(mixed)


@pytest.mark.parametrize(
    "shape",
    [
        ("evo_attention", "B0 S3 N4 H2 D8"),
        ("evo_attention", "B1 S0 N4 H2 D8"),
        ("evo_attention", "B1 S2 N0 H2 D8"),
        ("layer_norm_linear", "M0 C8 O4"),
        ("layer_norm_linear", "M3 C8 O0"),
        ("gated_linear", "N0 C8"),
        ("gated_linear", "N3 C8 O0"),
        ("gated", "S0 N4 A8 shared"),
        ("transition", "M0 C8 H16"),
        ("triangle_multiplication", "B0 N4 C8"),
        ("triangle_multiplication", "B1 N0 C8"),
        ("triangle_attention", "B0 N4 C8 H2"),
        ("triangle_attention", "B1 N0 C8 H2"),
        ("adaptive_layer_norm", "S0 N4 A8 C6"),
        ("conditioned_transition", "S0 N4 A8 C6 H16"),
    ],
    ids=": ".join,
)
def test_empty_inputs_give_empty_results_and_zero_gradients(shape):
    case = cases.case(*shape)
    inputs, grad = draw(case, torch.float32)
    for result, value in accuracy.results(case.run, inputs, grad).items():
        assert not value.numel() or (value == 0).all(), result


@each_case
def test_every_wrong_shape_is_refused_by_name(case):
    inputs, _ = draw(case, torch.float32)
    for wrong in inputs:
        if wrong == next(iter(inputs)):
            continue  # the others are measured by the first
        cut = {**inputs, wrong: inputs[wrong][..., :-1]}
        with pytest.raises(ValueError, match=rf"^{case.op}: .*shape \(") as caught:
            case.run(cut)
        assert wrong in str(caught.value) or str(tuple(cut[wrong].shape)) in str(caught.value)


@each_case
def test_missing_dimension_of_the_first_argument_is_refused(case):
    inputs, _ = draw(case, torch.float32)
    main = next(iter(inputs))
    with pytest.raises(ValueError, match=rf"^{case.op}: "):
        case.run({**inputs, main: inputs[main].flatten()[:0]})


@each_case
def test_arguments_that_are_no_tensors_are_refused_by_name(case):
    inputs, _ = draw(case, torch.float32)
    for wrong in inputs:
        with pytest.raises(TypeError, match=rf"^{case.op}: {wrong} must be a tensor, got str"):
            case.run({**inputs, wrong: "text"})


@each_case
def test_integers_are_refused_by_name(case):
    inputs, _ = draw(case, torch.float32)
    main = next(iter(inputs))
    with pytest.raises(TypeError, match=rf"^{case.op}: {main} must be floating point"):
        case.run({**inputs, main: inputs[main].long()})


@each_case
def test_tensors_on_two_devices_are_refused_by_name(case):
    inputs, _ = draw(case, torch.float32)
    for elsewhere in list(inputs)[1:]:
        with pytest.raises(ValueError, match=f"{case.op}: {elsewhere} is on meta"):
            case.run({**inputs, elsewhere: inputs[elsewhere].to("meta")})


@each_case
def test_public_name_is_the_function_and_reference_holds_the_equation(case):
    assert getattr(ops, case.op) is case.function
    assert case.function.__name__ == case.op
    assert getattr(ops.reference, case.op) is case.reference


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.gpu)]
)
@each_case
def test_what_is_no_number_is_not_hidden(case, dtype):
    """It comes out wherever PyTorch has it come out, so that who looks at the loss finds it."""
    inputs, grad = draw(case, dtype)
    if inputs.get("mask") is not None:  # what is left out may be anything
        inputs["mask"] = torch.ones_like(inputs["mask"])

    def found(function, given, grad):
        return {n: torch.isnan(t) for n, t in accuracy.results(function, given, grad).items()}

    for name in (*cases.differentiable(inputs), "gradient"):
        given = {**inputs, "gradient": grad}
        given[name] = given[name].clone()
        given[name].view(-1)[given[name].numel() // 2] = torch.nan
        of_output = given.pop("gradient")
        with ops.use("triton"):
            fused = found(case.run, given, of_output)
        eager = found(case.run_reference, given, of_output)
        assert any(expected.any() for expected in eager.values())
        for result, expected in eager.items():
            hidden = int((expected & ~fused[result]).sum())
            assert not hidden, f"NaN in {name}: {hidden} of {result} are numbers"
