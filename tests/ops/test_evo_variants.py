"""What is compiled ahead of time is what a call launches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megafold.bench.cases import case
from megafold.ops.evo_attention import launch
from megafold.ops.evo_attention import variants as module
from megafold.ops.evo_attention.variants import variant, variants
from megafold.ops.hopper import DEVICES
from megafold.ops.tuning import Config, Entry, tables
from megafold.ops.tuning.candidates import block_names

WIDE = "B1 S384 N384 H4 D32"


def config(kernel: str = launch.FORWARD, size: int = 64) -> Config:
    blocks = {name: 1 if name in ("ROWS", "KEYS_FIRST") else size for name in block_names(kernel)}
    return Config(blocks, num_warps=4, num_stages=2)


def inputs(shape: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(argument.shape, dtype=argument.stored_as(dtype), device="meta")
        for name, argument in case("evo_attention", shape).arguments.items()
    }


@pytest.mark.parametrize("kernel", launch.KERNELS)
def test_every_argument_has_a_type_and_every_constant_a_value(kernel):
    made = variant(kernel, config(kernel), **inputs(WIDE))
    assert list(made.signature) == made.kernel.arg_names
    constants = {name for name, kind in made.signature.items() if kind == "constexpr"}
    assert set(made.constants) == constants
    assert made.multiples_of_16 <= {n for n, k in made.signature.items() if k in ("i32", "i64")}


@pytest.mark.parametrize("kernel", launch.KERNELS)
def test_operands_have_the_type_of_the_call_and_statistics_are_fp32(kernel):
    made = variant(kernel, config(kernel), **inputs(WIDE, torch.float16))
    assert {made.signature[name] for name in ("p_q", "p_k", "p_v")} == {"*fp16"}
    assert made.signature["p_stats"] == made.signature["p_bias"] == "*fp32"
    assert made.signature["scale"] == "fp32"


def test_numbers_are_specialised_as_triton_does():
    """1 is a constant, multiples of 16 are compiled as such, what is large has 64 bits."""
    wide = variant(launch.FORWARD, config(), **inputs(WIDE))
    assert (wide.signature["stride_qd"], wide.constants["stride_qd"]) == ("constexpr", 1)
    assert wide.signature["queries"] == wide.signature["heads"] == "i32"
    assert {"queries", "stride_qh", "stride_qn"} <= wide.multiples_of_16
    assert "heads" not in wide.multiples_of_16
    odd = variant(launch.FORWARD, config(), **inputs("B1 S1 N33 H1 D24"))
    assert (odd.signature["rows"], odd.constants["rows"]) == ("constexpr", 1)
    assert not {"queries", "stride_qn", "stride_bq"} & odd.multiples_of_16
    large = variant(launch.FORWARD, config(), **inputs("B1 S4096 N8192 H4 D32"))
    assert large.signature["stride_qb"] == "i64"


def test_constants_say_what_the_sizes_allow():
    wide = variant(launch.FORWARD, config(), **inputs(WIDE)).constants
    assert (wide["EVEN_Q"], wide["EVEN_K"], wide["EVEN_D"], wide["BLOCK_D"]) == (*[True] * 3, 32)
    odd = variant(launch.FORWARD, config(), **inputs("B1 S2 N33 H1 D24")).constants
    assert (odd["EVEN_Q"], odd["EVEN_K"], odd["EVEN_D"], odd["BLOCK_D"]) == (*[False] * 3, 32)


def test_a_mask_and_a_bias_that_there_are_not_are_constants():
    q, k, v, mask, bias = inputs(WIDE).values()
    plain = variant(launch.FORWARD, config(), q, k, v)
    for name, has in (("p_mask", "HAS_MASK"), ("p_bias", "HAS_BIAS")):
        assert (plain.signature[name], plain.constants[name]) == ("constexpr", None)
        assert plain.constants[has] is False
    both = variant(launch.FORWARD, config(), q, k, v, mask, bias)
    assert both.constants["HAS_MASK"]
    assert both.constants["HAS_BIAS"]


def test_the_configuration_is_that_asked_for():
    wanted = replace(config(size=32), num_warps=8, num_stages=3, max_registers=128)
    made = variant(launch.FORWARD, wanted, **inputs(WIDE))
    assert {name: made.constants[name] for name in wanted.blocks} == wanted.blocks
    assert (made.num_warps, made.num_stages, made.max_registers) == (8, 3, 128)


def test_nothing_stays_replaced_afterwards():
    before = {name: getattr(launch, name) for name in ("forward_kernel", "multiprocessors")}
    variant(launch.FORWARD, config(), **inputs(WIDE))
    assert {name: getattr(launch, name) for name in before} == before


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match=r"unknown kernel 'magic'; choose one of"):
        variant("magic", config(), **inputs(WIDE))
    with pytest.raises(ValueError, match=r"has the blocks \(.*BLOCK_Q.*\), not \('BLOCK',\)"):
        variant(launch.FORWARD, Config({"BLOCK": 64}, 4, 2), **inputs(WIDE))
    q, k, v, mask, _ = inputs(WIDE).values()
    with pytest.raises(LookupError, match=r"does not launch evo_attention\.grad_bias"):
        variant(launch.GRAD_BIAS, config(launch.GRAD_BIAS), q, k, v, mask)


def test_the_default_table_ships_every_kernel_for_every_gpu():
    shipped = [v for v in variants() if not v.devices]
    names = [v.name for v in shipped]
    assert len(set(names)) == len(names)
    for kernel in launch.KERNELS:
        for operands, widths in (
            ("float32", (32, 128)), ("bfloat16", (32, 128)), ("tf32", (16, 32, 64, 128)),
        ):  # fmt: skip
            expected = {f"{kernel} {operands} D{width}" for width in widths}
            assert {n for n in names if n.startswith(f"{kernel} {operands}")} == expected
    precisions = {v.name.split()[1]: v.constants["PRECISION"] for v in shipped}
    assert precisions == {"float32": "ieee", "bfloat16": "ieee", "tf32": "tf32"}


def test_the_table_of_a_device_ships_for_that_device_and_each_variant_once(monkeypatch):
    made = config()
    same = [
        Entry(launch.FORWARD, 16, {"D": 32, "N": n, "K": n, "R": n}, made.blocks, 4, 2)
        for n in (256, 512)
    ]
    other = replace(same[0], num_warps=8)
    devices, entries = ("nvidia-h100", "nvidia-h200"), [*same, other]
    default = {"default": tables()["default"]}
    monkeypatch.setattr(module, "tables", lambda: default | dict.fromkeys(devices, entries))
    names = [(v.name, v.num_warps) for v in variants() if v.devices == devices]
    key = "evo_attention.forward bfloat16 D32 N256 K256 R256 nvidia-h100"
    assert names == [(key, 4), (key, 8)]
    assert {v.devices for v in variants()} == {(), devices, DEVICES}
