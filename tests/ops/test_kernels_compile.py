"""Every shipped kernel compiles for every GPU we name, without that GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megafold.bench.compile import TARGETS, Compiled, compile_all, compile_kernel, shipped


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    return compile_all()


def test_every_kernel_compiles_for_every_target(compiled):
    expected = {(v.name, target) for v in shipped() for target in TARGETS}
    assert {(c.kernel, c.target) for c in compiled} == expected


def test_no_kernel_spills_registers(compiled):
    assert [c for c in compiled if c.spill_bytes] == []


def test_every_kernel_fits_its_gpu(compiled):
    for c in compiled:
        assert 0 < c.registers <= 255
        assert c.shared_bytes <= 64 * 1024  # what the smallest of them (AMD) has
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


SPILLING = """
from dataclasses import replace
from megafold.bench.compile import compile_kernel, shipped
variant = next(v for v in shipped() if v.name == "swiglu_backward float32")
greedy = replace(variant, constants={"BLOCK": 8192}, num_warps=1)
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
