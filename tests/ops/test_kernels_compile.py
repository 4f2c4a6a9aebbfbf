"""Every shipped kernel compiles for every GPU we name, without that GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megafold.bench.cases import case
from megafold.bench.compile import (
    TARGETS,
    Compiled,
    compile_all,
    compile_config,
    compile_kernel,
    shipped,
    target_of,
    targets_of,
)
from megafold.bench.occupancy import LIMITS
from megafold.ops.precision import adopt
from megafold.ops.tuning import Config, use_config
from megafold.ops.tuning.candidates import block_names
from megafold.ops.variants import KernelVariant

# Kernels that spill on some GPU with the block sizes of the default table, and the most bytes.
SPILLS = {
    # Twelve warps with 128 registers each; what is spilt is read between walks, not for each tile.
    "evo_attention.hopper_backward bfloat16 S384 N384 D32": 32,
    "evo_attention.hopper_backward float16 S384 N384 D32": 32,
    "evo_attention.hopper_backward bfloat16 of triangle attention": 32,
    "evo_attention.hopper_backward float16 of triangle attention": 32,
    "evo_attention.hopper_backward bfloat16 S1024 N1024 D32": 40,
    "evo_attention.hopper_backward float16 S1024 N1024 D32": 40,
    # A number that a thread needs once, after its last row.
    "evo_attention.hopper_bias bfloat16 S384 N384 D64": 8,
    "evo_attention.hopper_bias float16 S384 N384 D64": 8,
    # Two numbers that a thread needs once, before its first rows.
    "layer_norm_linear.hopper_backward float16 M147456 C128 O576": 8,
    "layer_norm_linear.hopper_backward float16 M147456 C128 O512": 8,
    "layer_norm_linear.hopper_backward float16 M147456 C128 O256": 8,
    # fp32 rows under autocast, on an A100 and a B200: addresses of rows take 64 registers. Without
    # the residual such rows spill there, too: 64 bytes.
    "transition.grad_rows bfloat16 C128 residual float32": 168,
}


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    return compile_all()


def test_every_kernel_compiles_for_every_target(compiled):
    expected = {(v.name, target) for v in shipped() for target in targets_of(v)}
    assert {(c.kernel, c.target) for c in compiled} == expected


def test_no_kernel_spills_registers_but_for_those_named(compiled):
    assert [c for c in compiled if c.spill_bytes > SPILLS.get(c.kernel, 0)] == []


def test_every_kernel_fits_its_gpu(compiled):
    for c in compiled:
        assert 0 < c.registers <= LIMITS[c.target].registers_per_thread
        assert c.shared_bytes <= LIMITS[c.target].shared_per_program
        assert 0 < c.threads <= 1024


def test_block_sizes_and_signatures_cover_every_argument():
    for variant in shipped():
        assert list(variant.signature) == variant.kernel.arg_names
        constants = {n for n, kind in variant.signature.items() if kind == "constexpr"}
        assert set(variant.constants) == constants


def test_unknown_target_is_refused():
    for compiling in (
        lambda: compile_kernel(shipped()[0], "sm_70"),
        lambda: compile_all(["sm_70"]),
    ):
        with pytest.raises(ValueError, match="unknown target 'sm_70'; choose one of"):
            compiling()


def test_a_kernel_from_a_devices_table_is_compiled_for_that_device_alone():
    variant = KernelVariant("kernel", None, {}, {}, 4)
    assert targets_of(variant) == tuple(TARGETS)
    devices = ("nvidia-h200", "nvidia-h100-80gb-hbm3", "amd-instinct-mi300x-oam")
    of_devices = KernelVariant("kernel", None, {}, {}, 4, devices=devices)
    assert targets_of(of_devices) == ("sm_90", "gfx942")
    # AMD's GPUs have no TF32.
    in_tf32 = KernelVariant("kernel", None, {}, {"PRECISION": "tf32"}, 4)
    assert targets_of(in_tf32) == ("sm_80", "sm_90", "sm_100")
    with pytest.raises(ValueError, match=r"no target is known for device 'nvidia-rtx-4090'"):
        target_of("nvidia-rtx-4090")


CASE = case("evo_attention", "B1 S64 N64 H4 D32")
KERNEL = "evo_attention.forward"


def small(**options):
    blocks = {name: 1 if name in ("ROWS", "KEYS_FIRST") else 32 for name in block_names(KERNEL)}
    return Config(blocks, **{"num_warps": 4, "num_stages": 1, **options})


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_one_configuration_is_compiled_where_this_process_interprets(target):
    compiled = compile_config(CASE, KERNEL, small(), torch.bfloat16, target)
    assert (compiled.kernel, compiled.target) == (f"{KERNEL} bfloat16", target)
    assert compiled.threads == 4 * TARGETS[target][2]
    assert compiled.registers > 16


@pytest.mark.usefixtures("fp32_setting")
def test_a_configuration_is_compiled_in_tf32_where_torch_allows_it(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    found = {}
    for setting in ("highest", "high"):
        torch.set_float32_matmul_precision(setting)
        made = compile_config(CASE, KERNEL, small(), torch.float32, "sm_90")
        found[made.kernel] = made.registers
    assert set(found) == {f"{KERNEL} float32", f"{KERNEL} tf32"}
    assert found[f"{KERNEL} float32"] != found[f"{KERNEL} tf32"]


def test_a_limit_on_registers_is_kept():
    free, limited = (
        compile_config(CASE, KERNEL, small(max_registers=n), torch.bfloat16, "sm_90")
        for n in (None, 64)
    )
    assert limited.registers <= 64 < free.registers


@pytest.mark.parametrize("kernel", ["forward", "grad_q", "grad_kv"])
def test_heads_of_24_channels_are_read_as_those_of_32_are(kernel):
    """Ahead of time and 16 bytes at a time: by less nothing is fetched into shared memory."""
    name = f"evo_attention.{kernel}"
    blocks = {block: 1 if block == "ROWS" else 64 for block in block_names(name)}
    config = Config({**blocks, **({"KEYS_FIRST": 0} if "KEYS_FIRST" in blocks else {})}, 4, 3)
    of_24, of_32 = (
        compile_config(
            case("evo_attention", f"B1 S1 N128 H2 D{width}"), name, config, torch.bfloat16, "sm_90"
        )
        for width in (24, 32)
    )
    assert of_24.shared_bytes == of_32.shared_bytes
    assert of_24.registers <= of_32.registers + 8


def test_what_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match=r"arange's range must be a power of 2$"):
        compile_config(
            CASE, KERNEL, Config({**small().blocks, "BLOCK_Q": 48}, 4, 1), torch.bfloat16, "sm_90"
        )
    with pytest.raises(RuntimeError, match=r"does not launch 'evo_attention.forward'$"):
        compile_config(case("transition", "M1 C8 H8"), KERNEL, small(), torch.bfloat16, "sm_90")


@pytest.mark.gpu
@pytest.mark.usefixtures("fp32_setting")
@pytest.mark.parametrize("operands", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        ("evo_attention", "B1 S64 N128 H4 D32"),
        ("evo_attention", "B1 S3 N50 H2 D24"),
        ("evo_attention", "B1 S1 N128 H16 D64"),
        ("layer_norm_linear", "M300 C64 O48"),
        ("gated_linear", "N20 C64 O48"),
        ("gated", "S4 N40 A64 shared"),
        ("adaptive_layer_norm", "S4 N128 A768 C384"),
        ("triangle_multiplication", "B1 N40 C64"),
    ],
)
def test_what_is_compiled_ahead_of_time_is_what_runs(op, shape, operands):
    """Registers and shared memory of every kernel as launched here, and compiled apart."""
    from megafold.bench.launches import Pass, tunables
    from megafold.bench.records import device_name

    device, target, of = torch.device("cuda"), target_of(device_name("cuda")), case(op, shape)
    dtype = adopt(operands)
    call = Pass(of, device, dtype)
    for kernel, tunable in tunables(of, dtype).items():
        config = tunable.in_force(device).config
        with use_config(kernel, config):  # or kernels of the GPU's own may take its place
            _, launched = call.launched()
        ran = next(one.compiled for one in launched if one.kernel == kernel)
        apart = compile_config(of, kernel, config, dtype, target)
        assert (apart.registers, apart.shared_bytes) == (ran.n_regs, ran.metadata.shared)
        assert apart.spill_bytes == ran.n_spills * 4


SPILLING = """
from dataclasses import replace
from megafold.bench.compile import compile_kernel, shipped
variant = next(v for v in shipped() if v.name == "transition.swiglu_backward float32")
greedy = replace(variant, constants={**variant.constants, "BLOCK_H": 8192}, num_warps=1)
print(compile_kernel(greedy, "sm_90").spill_bytes)
"""


def test_spills_are_seen_where_a_block_is_far_too_large():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SPILLING], env=environment, capture_output=True, text=True
    )
    assert int(run.stdout) > 1000, run.stderr


def test_interpreted_kernels_are_not_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set"):
        compile_kernel(shipped()[0], "sm_90")
