"""Captured training steps: the same losses and gradients as steps that are not."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megafold import ops
from megafold.model import CONFIGS, AlphaFold3, training_loss
from megafold.model.blocks import recomputed
from megafold.model.capture import CapturedSteps, _Copies, _Recording, captured
from megafold.model.dropout import shared_mask
from megafold.model.replay import _state
from megafold.train import TrainConfig, Trainer
from tests.model.seeds import seeded


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)
        self.calls = 0

    def forward(self, x, others):
        self.calls += 1
        return self.linear(x) * others[0], x.detach() + others[1]


def outcome(module, x, others, how):
    x = x.clone().requires_grad_()
    module.zero_grad()
    first, second = how(module, x, others)
    (first.square().sum() + second.sum()).backward()
    grads = [x.grad, *(p.grad for p in module.parameters())]
    return [first.detach(), second, *(g for g in grads if g is not None)]


def plainly(module, x, others):
    return module(x, others)


def test_outside_and_on_the_cpu_a_call_is_a_call():
    module, x, others = Twice(), torch.randn(4, 3), (torch.ones(3), torch.ones(3))
    for _ in range(4):
        captured(module, x, others)
    with CapturedSteps():
        for _ in range(4):
            captured(module, x, others)
    assert module.calls == 8


def test_a_recording_is_of_one_state_of_all_parts():
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    states = [_state(module)]
    assert _state(module) == states[0]
    for change in (
        lambda: module[1][0].eval(),
        lambda: setattr(module[0], "weight", nn.Parameter(torch.ones(2, 2))),
        lambda: module[1][1].register_buffer("running_mean", torch.ones(2)),
        lambda: module.double(),
    ):
        change()
        states.append(_state(module))
        assert states[-1] not in states[:-1]


def test_a_cycle_is_recorded_with_the_weights_of_the_trunk_alone():
    model = AlphaFold3.from_name("tiny")
    assert not any(name.startswith("cycle") for name in model.state_dict())
    names = {name for name, _ in model.cycle.named_parameters()}
    parts = ("recycle_z", "template_embedder", "msa_module", "recycle_s", "pairformer")
    assert names == {name for name, _ in model.named_parameters() if name.startswith(parts)}
    assert copy.deepcopy(model).cycle.pairformer is not model.pairformer


def test_activations_of_another_turn_are_refused():
    recording = object.__new__(_Recording)
    recording.turn, recording._copies, recording._outputs = 0, [], ()
    recording._wanted, recording._grad_outputs, recording._of_inputs = [], [], []
    recording._of_parameters = _Copies([], [])
    recording._forward = recording._backward = SimpleNamespace(replay=lambda: None)
    recording.replay([])
    turn = recording.turn
    assert recording.replay_backward((), turn) == []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="one backward pass, before it is called again"):
            recording.replay_backward((), turn)
        recording.replay([])
    assert recording.replay_backward((), recording.turn) == []


def test_copies_of_many_tensors_are_theirs():
    wide = torch.randn(4, 6)
    given = [wide, wide.half(), wide.t(), wide[:, ::2], wide[0, 0], wide[:1].expand(3, 6), wide[:0]]
    for dtype in (None, torch.float64):
        copies = _Copies(given, [dtype or t.dtype for t in given])
        first, second = copies(), copies()
        for one, again, other in zip(first, second, given, strict=True):
            assert torch.equal(one, other.to(one.dtype))
            assert one.dtype == (dtype or other.dtype)
            assert one.is_contiguous()
            places = {one.data_ptr(), again.data_ptr(), other.data_ptr()}
            assert len(places) == 3 or not one.numel()
        first[0].zero_()  # changes no other
        for one, again in zip(first[1:], second[1:], strict=True):
            assert torch.equal(one, again)
    assert _Copies([], [])() == []


@pytest.mark.gpu
def test_replays_have_the_outputs_and_gradients_of_calls():
    module = Twice().cuda()
    calls = []
    with CapturedSteps():
        for i in range(6):
            x = torch.randn(4, 3, device="cuda")
            others = (torch.full((3,), 2.0 + i, device="cuda"), torch.ones(3, device="cuda"))
            with torch.no_grad():
                module.linear.weight.mul_(1.1)
            got = outcome(module, x, others, captured)
            calls.append(module.calls)
            expected = outcome(module, x, others, plainly)
            assert len(got) == len(expected) == 5
            for one, other in zip(got, expected, strict=True):
                assert torch.equal(one, other)
    assert calls[-1] - calls[-2] == 1  # the last captured call was none of the module


@dataclasses.dataclass(frozen=True)
class Parts:
    product: torch.Tensor
    rest: tuple[torch.Tensor, torch.Tensor]
    count: int


class Apart(Twice):
    def parts(self, given):
        product = self.linear(given.product)
        return Parts(product, (product.sin(), given.rest[0].detach()), given.count + 1)


@pytest.mark.gpu
def test_a_method_takes_and_returns_trees():
    module = Apart().cuda()

    def gradients(how, x):
        x = x.clone().requires_grad_()
        module.zero_grad()
        out = how(module.parts, Parts(x, (x, x), 2))
        assert (type(out), out.count) == (Parts, 3)
        (out.product.square().sum() + out.rest[0].sum()).backward()
        assert module.unused.weight.grad is None
        found = [out.product.detach(), *(t.detach() for t in out.rest)]
        return [*found, x.grad, module.linear.weight.grad, module.linear.bias.grad]

    with CapturedSteps():
        for _ in range(4):
            x = torch.randn(4, 3, device="cuda")
            got = gradients(captured, x)
            for one, other in zip(got, gradients(lambda f, *x: f(*x), x), strict=True):
                assert torch.equal(one, other)


def scaled(x, factor):
    return x.sin() * factor, factor + 1


def through(module, x):
    out = recomputed(lambda x: module.linear(x).sin(), x, of=module)
    return out, out.detach().exp()


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_functions_are_recorded_with_a_module_and_without(half):
    module, names = Twice().cuda(), set()
    module.linear.bias.requires_grad_(False)

    def gradients(how, x, factor):
        module.zero_grad()
        x = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            (one, two), (three, four) = how(scaled, x, factor), how(through, module, x)
        (one.sum() + three.square().sum()).backward()
        return [one.detach(), two, three.detach(), four, x.grad, module.linear.weight.grad]

    steps = CapturedSteps()
    for i in range(4):
        x, factor = torch.randn(4, 3, device="cuda"), torch.full((3,), 2.0 + i, device="cuda")
        with torch.no_grad():
            module.linear.weight.mul_(1.1)
        with steps:
            got = gradients(captured, x, factor)
        for one, other in zip(got, gradients(lambda f, *x: f(*x), x, factor), strict=True):
            assert torch.equal(one, other)
        names |= {name[1].split(".")[-1] for name in steps._recordings}
    assert names == {"scaled", "through"}


@pytest.mark.gpu
def test_gradients_of_two_replays_add_up():
    module = Twice().cuda()
    x, others = torch.randn(4, 3, device="cuda"), (torch.ones(3, device="cuda"),) * 2

    def added(how):
        module.zero_grad()
        how(module, 2 * x, others)[0].sum().backward()
        how(module, x, others)[0].sum().backward()
        return module.linear.weight.grad.clone()

    with CapturedSteps():
        for _ in range(3):
            got = added(captured)
    torch.testing.assert_close(got, added(plainly))


@pytest.mark.gpu
def test_a_replay_has_one_backward_pass_and_that_before_the_next():
    module = Twice().cuda()
    x, others = torch.randn(4, 3, device="cuda"), (torch.ones(3, device="cuda"),) * 2
    with CapturedSteps():
        for _ in range(3):
            first = captured(module, x, others)[0].sum()
            first.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="one backward pass, before it is called again"):
            first.backward()
        first, second = (captured(module, x, others)[0].sum() for _ in range(2))
        second.backward()
        with pytest.raises(RuntimeError, match="one backward pass, before it is called again"):
            first.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_model_learns_the_same_captured(batch, half, checkpointing, backend):
    config = dataclasses.replace(
        CONFIGS["tiny"], checkpointing=checkpointing, pair_dropout=0.0, msa_dropout=0.0
    )

    def losses(is_captured):
        torch.manual_seed(0)
        model = AlphaFold3(config).cuda()
        steps = CapturedSteps() if is_captured else None
        found = []
        for i in range(6):
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                if steps is None:
                    loss = training_loss(model, batch.to("cuda"), generator=seeded(i)).total
                else:
                    with steps:
                        loss = training_loss(model, batch.to("cuda"), generator=seeded(i)).total
            loss.backward()
            found.append(loss.detach())
        return torch.stack(found), model

    with ops.use(backend):
        (one, first), (two, second) = losses(False), losses(True)
    torch.testing.assert_close(one, two, rtol=5e-2 if half else 1e-3, atol=0)
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and p.grad.norm() > 1e-4:
            difference = (p.grad - q.grad).norm() / p.grad.norm()
            assert difference < (0.2 if half else 2e-2), name


@pytest.mark.gpu
def test_a_recomputed_block_has_the_gradient_of_its_own_dropout_in_each_replay():
    class Recomputing(nn.Module):
        def forward(self, x):
            for _ in range(2):
                x = recomputed(lambda x: x.sin() * shared_mask(x, 0.5, 1), x)
            return x, x.detach()

    module, zeros = Recomputing(), set()
    with CapturedSteps():
        for _ in range(6):
            x = torch.rand(64, 3, device="cuda").requires_grad_()
            (out, _), inner = captured(module, x), x.sin()
            # Both masks at once: what is left of a row has gone through two factors of 2.
            (grad,) = torch.autograd.grad(out.sum(), x)
            there = (out != 0).any(1, keepdim=True)
            expected = there * 4 * (2 * inner).cos() * x.cos()
            torch.testing.assert_close(grad, expected.detach())
            zeros.add(tuple(there.flatten().tolist()))
    assert len(zeros) == 6  # each turn has draws of its own


def test_a_trainer_on_the_cpu_captures_nothing_and_learns(batch):
    trainer = Trainer(AlphaFold3.from_name("tiny"), TrainConfig(captured=True))
    assert trainer.step(batch).losses["total"] > 0
