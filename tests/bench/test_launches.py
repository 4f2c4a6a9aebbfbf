"""What a case launches, of every operator in one way."""

from __future__ import annotations

import pytest
import torch

from megafold import ops
from megafold.bench import cases
from megafold.bench.launches import (
    META,
    OPERATORS,
    Pass,
    distinct_candidates,
    tunable,
    tunables,
    variant,
)
from megafold.ops.evo_attention import launch as attention
from megafold.ops.precision import products_in
from megafold.ops.tuning import Config, lookup, use_config
from megafold.ops.tuning.candidates import block_names, kernels
from tests.numerics import DEVICE

HALF = torch.bfloat16


def test_every_kernel_with_a_table_is_launched_by_a_case_of_training():
    """By the name that its table has: that of its folder and function."""
    found = set()
    for case in (c for op in OPERATORS for c in cases.registered(op, "full")):
        for dtype in (HALF, torch.float32):
            try:
                found |= set(tunables(case, dtype))
            except ValueError:
                continue
    assert found == set(kernels())


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_no_more_programs_are_launched_than_there_are_blocks(op, dtype):
    """By elements of the largest tensor: the least block is one of 16 keys of heads of 32.

    Programs beyond the last block do nothing, so that no result shows them: time alone does.
    """
    for case in cases.registered(op, "full"):
        for one in Pass(case, META, dtype).launched()[1]:
            largest = max(t.numel() for t in one.tensors if t is not None)
            (programs, *_) = one.launcher.grid
            assert programs * 512 <= largest, (case.shape, one.kernel)


@pytest.mark.parametrize("op", OPERATORS)
def test_the_kernels_of_a_case_are_those_its_operator_explains(op):
    case = cases.registered(op, "small")[-1]
    inputs = case.make_inputs("cpu", HALF, torch.Generator())
    with ops.use("triton"):
        explained = str(ops.explain(op, **inputs, **case.options))
    for kernel, of in tunables(case, HALF).items():
        line = f"{kernel}: {of.in_force(torch.device('cpu')).config} "
        assert line in explained


def test_a_case_launches_the_kernels_it_needs_and_no_other():
    shared = tunables(cases.case("evo_attention", "B1 S2 N5 H1 D8"), HALF)
    alone = tunables(cases.case("evo_attention", "B1 S1 N5 H1 D8"), HALF)
    assert tuple(shared) == attention.KERNELS
    assert tuple(alone) == tuple(k for k in attention.KERNELS if k != attention.GRAD_BIAS)


def test_a_case_that_launches_none_is_refused_by_name():
    case = cases.case("transition", "M3 C384 H768")
    with pytest.raises(ValueError, match=r"transition launches no kernel with tables .* bfloat16"):
        tunables(case, HALF)
    with pytest.raises(ValueError, match=r"does not launch 'transition.forward'; it launches lay"):
        tunable(cases.case("layer_norm_linear", "M3 C384 O8"), "transition.forward", HALF)


def test_the_configuration_in_force_is_that_of_the_call():
    of = tunable(cases.case("transition", "M300 C24 H100"), "transition.forward", HALF)
    sizes = {"C": 32, "M": 300, "H": 100}
    cpu = torch.device("cpu")
    assert (of.bits, of.sizes) == (16, (sizes,))
    assert of.in_force(cpu) == lookup(of.kernel, cpu, 16, tuple(sizes.items()))
    other = Config({"BLOCK_M": 16, "BLOCK_H": 16}, 4, 1)
    with use_config(of.kernel, other):
        assert of.in_force(cpu).config == other


def test_fp32_is_looked_up_and_compiled_as_its_products_are():
    case = cases.case("evo_attention", "B1 S20 N40 H1 D32")
    found = {}
    for precision, bits in (("ieee", 32), ("tf32", 19)):
        with products_in(precision):
            of = tunable(case, attention.FORWARD, torch.float32)
            config = of.in_force(torch.device("cpu")).config
            made = variant(case, of.kernel, config, torch.float32)
            found[precision] = made.constants["BLOCK_Q"]
            tried = distinct_candidates(case, of.kernel, torch.float32)
        assert of.bits == bits
        assert made.constants["PRECISION"] == precision
        assert config.blocks["BLOCK_Q"] in {one.blocks["BLOCK_Q"] for one in tried}
    assert found["ieee"] < found["tf32"]


def test_a_pass_without_memory_has_the_shapes_of_one_with():
    case = cases.case("adaptive_layer_norm", "S2 N3 A16 C8 shared")
    meta, launched = Pass(case, META, torch.float16).launched()
    real, ran = Pass(case, torch.device(DEVICE), torch.float16).launched()
    assert {n: (t.shape, t.dtype) for n, t in meta.items()} == {
        n: (t.shape, t.dtype) for n, t in real.items()
    }
    assert [one.kernel for one in launched] == [one.kernel for one in ran]
    assert list(real) == ["output", *(f"grad {name}" for name in case.arguments)]


def test_a_variant_is_what_the_case_launches_with_the_configuration():
    case = cases.case("triangle_multiplication", "B1 N64 C128")
    config = Config({"BLOCK_M": 32, "BLOCK_O": 16}, 8, 3, 128)
    made = variant(case, "triangle_multiplication.output", config, HALF)
    assert made.name == "triangle_multiplication.output bfloat16"
    assert (made.constants["BLOCK_M"], made.constants["BLOCK_O"]) == (32, 16)
    assert (made.num_warps, made.num_stages, made.max_registers) == (8, 3, 128)
    assert list(made.signature) == made.kernel.arg_names
    with pytest.raises(ValueError, match=r"has the blocks \('BLOCK_M', .* not \('BLOCK',\)"):
        variant(case, made.name.split()[0], Config({"BLOCK": 1}, 4, 1), HALF)
    config = Config(dict.fromkeys(block_names("transition.forward"), 16), 4, 1)
    with pytest.raises(ValueError, match=r"does not launch 'transition.forward'"):
        variant(case, "transition.forward", config, HALF)


def test_candidates_that_a_small_problem_cuts_alike_are_tried_once():
    kernel = "layer_norm_linear.forward"
    large = distinct_candidates(cases.case("layer_norm_linear", "M1024 C64 O512"), kernel, HALF)
    small = distinct_candidates(cases.case("layer_norm_linear", "M1024 C64 O16"), kernel, HALF)
    assert len({str(config) for config in large}) == len(large)
    assert len(small) == len(large) // 3  # three sizes of a block of outputs are one
    one_row = cases.case("evo_attention", "B1 S1 N300 H1 D8")
    rows = {c.blocks["ROWS"] for c in distinct_candidates(one_row, attention.FORWARD, HALF)}
    assert rows == {1}
