"""Peers that need not be installed: stand-ins compute each one's equation in its own layout."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from megafold.bench import accuracy, cases, peers, records
from megafold.bench.run import run
from tests.numerics import draw

PACKAGES = {"cuequivariance": "cuequivariance_torch", "trifast": "trifast"}
each_package = pytest.mark.parametrize("impl", PACKAGES)
SQUARE = cases.case("evo_attention", "B2 S6 N6 H2 D16")
CPU = torch.device("cpu")


def cuequivariance(q, k, v, bias, mask=None, scale=None, return_aux=False, *, kv_lengths=None):
    """As cuequivariance_torch 0.13 documents it; True in the mask = attend."""
    batch, rows, heads, queries, width = q.shape
    keys = k.shape[3]
    assert k.shape == v.shape == (batch, rows, heads, keys, width)
    assert bias.shape == (batch, 1, heads, queries, keys)
    assert mask.shape == (batch, rows, 1, 1, keys)
    logits = torch.einsum("bnhqd,bnhkd->bnhqk", q, k) * width**-0.5 + bias
    weights = logits.masked_fill(~mask, -1e9).softmax(dim=-1).to(v.dtype)
    return torch.einsum("bnhqk,bnhkd->bnhqd", weights, v)


def trifast(q, k, v, b, mask):
    """As trifast 0.1.13 declares it; True in the mask = do not attend."""
    batch, heads, tokens, _, width = q.shape
    assert q.shape == k.shape == v.shape == (batch, heads, tokens, tokens, width)
    assert b.shape == (batch, heads, tokens, tokens)
    assert mask.shape == (batch, tokens, tokens)
    logits = torch.einsum("bhijd,bhikd->bhijk", q, k) * width**-0.5 + b[:, :, None]
    logits = logits.masked_fill(mask[:, None, :, None, :], torch.finfo(q.dtype).min)
    return torch.einsum("bhijk,bhikd->bhijd", logits.softmax(dim=-1), v)


@pytest.fixture
def installed(monkeypatch):
    """Both packages, as stand-ins."""
    for name, function in (("cuequivariance_torch", cuequivariance), ("trifast", trifast)):
        module = ModuleType(name)
        module.triangle_attention = function
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("impl", "shape"),
    [
        ("cuequivariance", "B2 S3 N5 K7 H2 D16"),
        ("cuequivariance", "B2 S1 N6 H3 D24 shared"),
        ("trifast", "B2 S6 N6 H2 D16"),
        ("trifast", "B2 S5 N5 H3 D32 shared"),
    ],
)
def test_layouts_are_those_of_the_package(impl, shape):
    case = cases.case("evo_attention", shape)
    inputs, grad = draw(case, torch.float32, CPU)
    inputs["mask"][..., 0] = True  # where no key is left the packages take a mean, and we do not
    found = accuracy.results(peers.implementation(impl, case), inputs, grad)
    for name, exact in accuracy.exact_results(case, inputs, grad).items():
        assert accuracy.relative_errors(found[name], exact)[0] < 1e-6, name


@each_package
def test_package_that_is_not_installed_is_a_reason_not_a_failure(impl, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[impl], None)
    (outcome,) = run([SQUARE], [impl], ["forward"], CPU, torch.float32)
    assert (outcome.record, outcome.failed) == (None, False)
    assert outcome.reason.startswith(f"{PACKAGES[impl]} is not installed, or does not load: ")


@pytest.mark.usefixtures("installed")
@each_package
def test_other_operators_are_not_theirs(impl):
    with pytest.raises(peers.Unavailable, match=f"{PACKAGES[impl]} does not compute transition"):
        peers.implementation(impl, cases.case("transition", "M4 C8 H16"))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ("B1 S3 N6 H2 D16", "not 3 rows of 6 x 6"),
        ("B1 S6 N6 K8 H2 D16", "not 6 rows of 6 x 8"),
        ("B1 S6 N6 H2 D24", "powers of two from 16 for D, not 24"),
        ("B1 S6 N6 H2 D8", "powers of two from 16 for D, not 8"),
    ],
)
def test_trifast_computes_triangle_shapes_alone(shape, reason):
    with pytest.raises(peers.Unavailable, match=reason):
        peers.implementation("trifast", cases.case("evo_attention", shape))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("width", "dtype", "computes"),
    [
        (32, torch.float32, True),
        (40, torch.float32, False),
        (18, torch.float32, False),
        (128, torch.bfloat16, True),
        (20, torch.bfloat16, False),
    ],
)
def test_cuequivariance_is_not_measured_where_it_would_run_pytorch(width, dtype, computes):
    case = cases.case("evo_attention", f"B1 S2 N4 H1 D{width}")
    (outcome,) = run([case], ["cuequivariance"], ["forward"], CPU, dtype, seconds=0.01)
    assert not outcome.failed
    if computes:
        assert outcome.record.impl == "cuequivariance"
    else:
        assert outcome.reason == f"cuEquivariance has no kernel for {dtype} and D {width}"


@pytest.mark.usefixtures("installed")
def test_cuequivariance_without_its_kernels_is_a_reason(monkeypatch):
    def without_kernels(*_):
        raise ImportError("Error importing triangle_attention from cuequivariance_ops_torch.")

    monkeypatch.setattr(sys.modules["cuequivariance_torch"], "triangle_attention", without_kernels)
    (outcome,) = run([SQUARE], ["cuequivariance"], ["forward"], CPU, torch.float32)
    assert not outcome.failed
    assert outcome.reason.startswith("cuEquivariance's kernels do not load here: Error importing")


def test_every_peer_can_be_recorded():
    assert set(peers.PEERS) == set(records.IMPLEMENTATIONS)
