"""Steps without gradient by what was prepared: the numbers of the blocks one after the other."""

from __future__ import annotations

import pytest
import torch

from megafold import ops
from megafold.model import AlphaFold3
from megafold.ops.stepwise import gated, modulated, swiglu
from tests.model.seeds import seeded
from tests.numerics import DEVICE

DTYPES = [torch.float32, torch.float16]


@pytest.fixture
def model() -> AlphaFold3:
    """With weights of which none is zero, or one."""
    model = AlphaFold3.from_name("tiny").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=seeded())
    return model.to(DEVICE)


def denoised(model, batch, prepared: bool, half: bool = False, samples: int = 2):
    batch = batch.to(DEVICE)
    x = 8 * torch.randn(samples, batch.num_atoms, 3, generator=seeded())
    t = torch.linspace(2.0, 60.0, samples)
    device = torch.device(DEVICE).type
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=half):
        trunk = model(batch, generator=seeded(), cycles=1)
        condition = model.diffusion.condition(batch, trunk)
        if prepared:
            condition = model.diffusion.before_steps(condition)
        return model.diffusion(x.to(DEVICE), t.to(DEVICE), batch, trunk.windows, condition)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("samples", [1, 3])
def test_steps_are_those_of_the_blocks(model, batch, samples, backend):
    with ops.use(backend):
        plain = denoised(model, batch, prepared=False, samples=samples)
        found = denoised(model, batch, prepared=True, samples=samples)
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-5)


def test_steps_in_bf16_err_as_those_of_the_blocks(model, batch):
    exact = denoised(model.double(), batch, prepared=False).float()
    model.float()
    errors = {
        prepared: (denoised(model, batch, prepared, half=True) - exact).square().mean().sqrt()
        for prepared in (False, True)
    }
    assert 0 < errors[True] <= 1.5 * errors[False]


def test_every_weight_reaches_the_steps(model, batch):
    """None is taken from another block, or from another layer of the same shape."""
    module = model.diffusion
    stacks = (module.blocks, module.atom_encoder.transformer, module.atom_decoder.transformer)
    changed = denoised(model, batch, prepared=True)
    for stack in stacks:
        for parameter in stack.parameters():
            with torch.no_grad():
                parameter += 0.1 * torch.randn(parameter.shape, generator=seeded()).to(DEVICE)
            before, changed = changed, denoised(model, batch, prepared=True)
            assert not torch.equal(before, changed)
    torch.testing.assert_close(
        changed, denoised(model, batch, prepared=False), atol=1e-3, rtol=1e-4
    )


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conditions", [1, 2])
@pytest.mark.parametrize(("tokens", "channels"), [(5, 24), (17, 128), (3, 768), (0, 16), (1, 1)])
def test_kernels_are_what_pytorch_computes(tokens, channels, conditions, dtype):
    wide = rows(2, tokens, 3 * channels, dtype=dtype)
    of = rows(conditions, tokens, 4 * channels, dtype=dtype, seed=1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3  # of one rounding

    def results(wide, of):
        a, (gate, shift, *_) = wide[..., channels : 2 * channels], of.chunk(4, dim=-1)
        results = modulated(a, gate, shift), gated(a, gate), gated(a, gate, a + 1), swiglu(of)
        return dict(zip(("modulated", "gated", "added", "swiglu"), results, strict=True))

    with ops.use("torch"):
        exact = results(wide.float(), of.float())
    with ops.use("triton"):
        found = results(wide, of)
    for name, value in found.items():
        assert value.dtype == dtype, name
        torch.testing.assert_close(
            value.float(), exact[name], atol=tolerance, rtol=tolerance, msg=name
        )


def test_a_gradient_is_refused():
    a = rows(1, 3, 8, dtype=torch.float32).requires_grad_()
    for call in (lambda: modulated(a, a, a), lambda: gated(a, a), lambda: swiglu(a)):
        with pytest.raises(RuntimeError, match=r"has no gradient; call it under torch.no_grad"):
            call()


def test_an_explicit_request_for_kernels_is_never_quietly_replaced():
    a = rows(1, 3, 8, dtype=torch.float64)
    for name, call in (
        ("modulated", lambda: modulated(a, a, a)),
        ("gated", lambda: gated(a, a)),
        ("swiglu", lambda: swiglu(a)),
    ):
        assert call().dtype == torch.float64
        with ops.use("triton"), pytest.raises(TypeError, match=rf"^{name}: .*not torch.float64"):
            call()
