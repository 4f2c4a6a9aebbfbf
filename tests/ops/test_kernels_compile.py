"""Every shipped kernel compiles for every GPU we name, without that GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megafold.bench.compile import TARGETS, compile_kernel, shipped

SCRIPT = """
import json
from dataclasses import asdict
from megafold.bench.compile import compile_all
print(json.dumps([asdict(c) for c in compile_all()]))
"""


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """All of them, by a process in which Triton compiles (here it may interpret)."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_kernel_compiles_for_every_target(compiled):
    expected = {(v.name, target) for v in shipped() for target in TARGETS}
    assert {(c["kernel"], c["target"]) for c in compiled} == expected


def test_no_kernel_spills_registers(compiled):
    assert [c for c in compiled if c["spill_bytes"]] == []


def test_every_kernel_fits_its_gpu(compiled):
    for c in compiled:
        assert 0 < c["registers"] <= 255
        assert c["shared_bytes"] <= 64 * 1024  # what the smallest of them (AMD) has
        assert 0 < c["threads"] <= 1024


def test_block_sizes_and_signatures_cover_every_argument():
    for variant in shipped():
        assert list(variant.signature) == variant.kernel.arg_names
        constants = {n for n, kind in variant.signature.items() if kind == "constexpr"}
        assert set(variant.constants) == constants


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="unknown target 'sm_70'; choose one of"):
        compile_kernel(shipped()[0], "sm_70")


def test_interpreted_kernels_are_not_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set"):
        compile_kernel(shipped()[0], "sm_90")
