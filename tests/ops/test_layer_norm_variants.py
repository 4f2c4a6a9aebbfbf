"""What is compiled ahead of time of the kernels with a LayerNorm is what a call launches."""

from __future__ import annotations

import pytest
import torch

from megafold import ops
from megafold.ops.adaptive_layer_norm import launch as adaptive
from megafold.ops.adaptive_layer_norm import variants as of_adaptive
from megafold.ops.layer_norm import launch as rows
from megafold.ops.layer_norm_linear import launch as linear
from megafold.ops.layer_norm_linear import variants as of_linear
from megafold.ops.recording import recorded

HALF = torch.bfloat16


def kernels(variants) -> list[str]:
    return [variant.name.split()[0] for variant in variants]


@pytest.mark.parametrize("module", [of_linear, of_adaptive], ids=["linear", "adaptive"])
def test_every_argument_has_a_type_and_every_constant_a_value(module):
    shipped = module.variants()
    assert len({variant.name for variant in shipped}) == len(shipped)
    for variant in shipped:
        assert list(variant.signature) == variant.kernel.arg_names
        constants = {name for name, kind in variant.signature.items() if kind == "constexpr"}
        assert set(variant.constants) == constants
        whole = {n for n, kind in variant.signature.items() if kind in ("i32", "i64")}
        assert variant.multiples_of_16 <= whole


def test_every_kernel_with_a_table_ships():
    shipped = set(kernels(of_linear.variants())) | set(kernels(of_adaptive.variants()))
    tables = {*linear.KERNELS, *rows.KERNELS, *adaptive.KERNELS}
    others = {
        "layer_norm_linear.finish",
        "layer_norm_linear.hopper_backward",
        "layer_norm_linear.hopper_forward",
        "adaptive_layer_norm.finish",
    }
    assert shipped == tables | others


def test_a_call_launches_what_its_dtype_and_width_ask_for():
    fused = ["layer_norm_linear.forward", "layer_norm_linear.backward", "layer_norm_linear.finish"]
    products = ["layer_norm.normalise", "layer_norm.gradient"]
    assert kernels(of_linear.variants_of(64, 128, 128, HALF)) == fused
    assert kernels(of_linear.variants_of(64, 128, 129, HALF)) == [
        linear.FORWARD,
        linear.GRAD_X,
        linear.PRODUCT,
        fused[-1],
    ]
    assert kernels(of_linear.variants_of(64, 129, 32, HALF)) == [
        products[0],
        *products,
    ]
    assert set(kernels(of_linear.variants_of(64, 128, 32, torch.float32))) == set(products)


def test_the_configuration_is_that_in_force():
    wanted = ops.Config({"BLOCK_M": 16, "BLOCK_O": 32, "WAVES": 1}, 8, 3, max_registers=96)
    with ops.use_config(linear.GRAD_X, wanted):
        (made,) = (
            variant
            for variant in of_linear.variants_of(4096, 128, 256, HALF)
            if variant.name.startswith(linear.GRAD_X)
        )
    assert (made.constants["BLOCK_M"], made.constants["BLOCK_O"]) == (16, 32)
    assert (made.num_warps, made.num_stages, made.max_registers) == (8, 3, 96)


@pytest.mark.parametrize(
    ("rows", "outs", "held"),
    [
        (147456, 512, 4),
        (147456, 528, 5),
        (147456, 656, 0),  # 192 KB
        (768, 512, 0),  # programs share rows
        (768, 128, 1),
    ],
)
def test_a_weight_is_held_where_it_has_room_and_rows_are_many(rows, outs, held):
    def launched(wanted: int, of: torch.dtype) -> int:
        def call() -> None:
            x, norm = torch.empty(rows, 128, dtype=of, device="meta"), None
            linear.forward(x, norm, norm, weight, None, 1e-5)

        blocks = {"BLOCK_M": 64, "BLOCK_O": 128, "HELD": wanted}
        with ops.use_config(linear.FORWARD, ops.Config(blocks, 8, 3)):
            (made,) = recorded(call)
        return made.constants["HELD"]

    weight = torch.empty(outs, 128, dtype=HALF, device="meta")
    assert launched(1, HALF) == held
    least = int(outs <= 128)  # a single block always is
    assert launched(0, HALF) == least
    assert launched(1, torch.float32) == least  # x takes the room


def test_nothing_stays_replaced_afterwards():
    before = linear.forward_kernel, rows.multiprocessors, adaptive.modulate_kernel
    of_adaptive.variants()
    assert (linear.forward_kernel, rows.multiprocessors, adaptive.modulate_kernel) == before
