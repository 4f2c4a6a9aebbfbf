"""How products of fp32 are computed, and the names and bits of operands that follow."""

from __future__ import annotations

import pytest
import torch

from megafold.ops import precision
from megafold.ops.precision import META, adopt, bits_of, name_of, precision_of, products_in, reason

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SINGLE, HALF = torch.float32, torch.bfloat16


pytestmark = pytest.mark.usefixtures("fp32_setting")


@pytest.mark.parametrize("device", [CUDA, META])
def test_on_nvidia_fp32_follows_torchs_setting(device, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    assert (precision_of(SINGLE, device), bits_of(SINGLE, device)) == ("ieee", 32)
    assert name_of(SINGLE, device) == "float32"
    because = "for torch.backends.cuda.matmul"
    assert reason(SINGLE, device) == f"fp32 products in full, {because} does not allow TF32"
    torch.set_float32_matmul_precision("high")
    assert (precision_of(SINGLE, device), bits_of(SINGLE, device)) == ("tf32", 19)
    assert name_of(SINGLE, device) == "tf32"
    assert reason(SINGLE, device) == f"fp32 products in TF32, {because} allows TF32"
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert (precision_of(SINGLE, device), bits_of(SINGLE, device)) == ("ieee", 32)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch before 2.9"
)
def test_the_newer_setting_counts_too(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting, bits in (("tf32", 19), ("ieee", 32), ("tf32", 19)):
            matmul.fp32_precision = setting
            assert bits_of(SINGLE, CUDA) == bits
        assert "allows TF32" in reason(SINGLE, CUDA)
    finally:
        matmul.fp32_precision = before


def test_neither_the_cpu_nor_16_bits_have_tf32():
    torch.set_float32_matmul_precision("high")
    assert (precision_of(SINGLE, CPU), bits_of(SINGLE, CPU)) == ("ieee", 32)
    assert (precision_of(HALF, META), bits_of(HALF, META)) == ("ieee", 16)
    assert (name_of(SINGLE, CPU), name_of(HALF)) == ("float32", "bfloat16")
    assert (reason(HALF, META), reason(torch.float16, CPU)) == ("", "")
    assert reason(SINGLE, CPU) == "fp32 products in full, for there is no TF32 on cpu"


def test_products_in_holds_everywhere_until_it_ends():
    with products_in("tf32"):
        assert (bits_of(SINGLE, CPU), bits_of(HALF, CPU)) == (19, 16)
        with products_in("ieee"):
            torch.set_float32_matmul_precision("high")
            assert bits_of(SINGLE, META) == 32
        assert reason(SINGLE, CPU) == "fp32 products in TF32, as asked for"
    assert precision._everywhere is None


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float32", SINGLE), ("tf32", SINGLE), ("bfloat16", HALF), ("float16", torch.float16)],
)
def test_a_process_adopts_operands_by_their_name(name, dtype, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    assert adopt(name) == dtype
    assert name_of(dtype) == name
