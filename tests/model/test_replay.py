"""Replaying the denoiser: the same numbers as calling it, whatever changes meanwhile."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call

from megafold.model import AlphaFold3, replay, sample
from tests.model.seeds import seeded


@dataclasses.dataclass(frozen=True)
class Conditions:
    offset: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    name: str


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.calls = 0

    def forward(self, x, t, conditions):
        self.calls += 1
        return self.linear(x) * t + conditions.offset + sum(conditions.parts)


def conditions(device="cpu", size=5, fill=1.0) -> Conditions:
    return Conditions(
        torch.full((size, 3), fill, device=device), (torch.ones(3, device=device),) * 2, "some"
    )


def test_on_the_cpu_every_call_is_a_call():
    denoiser, given = Denoiser(), conditions()
    denoise = replay.replayed(denoiser, given.offset, given)
    x, t = torch.randn(5, 3, generator=seeded()), torch.ones(())
    for i in range(3):
        assert torch.equal(denoise(x + i, t), denoiser(x + i, t, given))
    assert denoiser.calls == 6


def test_a_copy_shares_no_memory_and_has_all_else():
    given = conditions()
    copied = replay.copied((given, torch.arange(3)))
    assert copied[0].name == "some"
    tensors = list(replay.tensors((given, torch.arange(3))))
    assert len(tensors) == 4
    pairs = zip(tensors, replay.tensors(copied), strict=True)
    for one, other in pairs:
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


@torch.no_grad()
def test_weights_cast_ahead_change_no_number(batch):
    model = AlphaFold3.from_name("tiny").eval()
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=seeded())
    assert replay.cast_weights(model.diffusion, "cpu") == {}
    x, t = torch.randn(2, batch.num_atoms, 3, generator=seeded()), torch.tensor([3.0, 8.0])
    with torch.autocast("cpu", torch.bfloat16):
        trunk = model(batch, generator=seeded(), cycles=1)
        inputs = (x, t, batch, trunk.windows, model.diffusion.condition(batch, trunk))
        weights = replay.cast_weights(model.diffusion, "cpu")
        assert len(weights) > 100
        assert {w.dtype for w in weights.values()} == {torch.bfloat16}
        found = functional_call(model.diffusion, weights, inputs)
        assert torch.equal(found, model.diffusion(*inputs))
        weights = replay.cast_weights(model, "cpu")
        given = {"generator": seeded(), "cycles": 1}
        again = functional_call(model, weights, (batch,), given)
        assert torch.equal(again.z, trunk.z)
        assert torch.equal(again.s, trunk.s)
        of_diffusion = {n.removeprefix("diffusion."): w for n, w in weights.items() if "diff" in n}
        condition = model.diffusion.condition(batch, trunk)
        model.diffusion.load_state_dict(of_diffusion, strict=False)
        again = model.diffusion.condition(batch, trunk)
        assert all(map(torch.equal, replay.tensors(again), replay.tensors(condition)))


@pytest.mark.gpu
def test_replays_follow_inputs_conditions_and_weights():
    denoiser = Denoiser().cuda()
    x, t = torch.randn(5, 3, device="cuda"), torch.ones((), device="cuda")
    calls = []
    with torch.no_grad():
        for fill in (1.0, 2.0):
            given = conditions("cuda", fill=fill)
            denoise = replay.replayed(denoiser, x, given)
            for i in range(4):
                denoiser.linear.weight.add_(0.1)  # in place, as optimisers do
                found = denoise(x + i, t + i)
                calls.append(denoiser.calls)
                assert torch.equal(found, denoiser(x + i, t + i, given))
        # One plain call, one that is recorded, then none; beside those that they are held to.
        assert [b - a for a, b in itertools.pairwise(calls)] == [2, 1, 1, 1, 1, 1, 1]
        wider = conditions("cuda", size=7)
        denoise = replay.replayed(denoiser, x, wider)
        more = torch.randn(7, 3, device="cuda")
        for i in range(3):
            assert torch.equal(denoise(more + i, t), denoiser(more + i, t, wider))
        denoiser.double().float()  # the weights lie elsewhere
        denoise = replay.replayed(denoiser, x, wider)
        for i in range(3):
            assert torch.equal(denoise(more + i, t), denoiser(more + i, t, wider))


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_sampling_is_the_same_replayed(batch, half, monkeypatch):
    model, batch = AlphaFold3.from_name("tiny").cuda(), batch.to("cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)

    def sampled():
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            return [sample(model, batch, generator=seeded(), steps=6, samples=2) for _ in range(2)]

    replays = sampled()
    monkeypatch.setattr(
        "megafold.model.sampler.replayed", lambda module, _, *given: lambda *x: module(*x, *given)
    )
    called = sampled()
    # A token's atoms are added up in any order on a GPU.
    for one in (*replays, called[1]):
        torch.testing.assert_close(one, called[0], atol=0.5 if half else 1e-2, rtol=0)
