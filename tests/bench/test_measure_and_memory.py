"""Time, peak memory, saved activations and operation counts are measured, and right."""

from __future__ import annotations

import time

import pytest
import torch

from megafold.bench import cases, measure, memory

CASE = cases.case("transition", "M8 C4 H12")


def inputs_of(case):
    return case.make_inputs("cpu", torch.float32, torch.Generator().manual_seed(0))


def test_time_is_that_of_the_call():
    timing = measure.time_call(lambda: time.sleep(0.02), "cpu", seconds=0.05)
    assert 20 <= timing.ms_q1 <= timing.ms <= timing.ms_q3
    assert timing.repeats == 5  # at least five, however short the time


def test_repeats_stop_at_their_bound():
    calls = []
    timing = measure.time_call(lambda: calls.append(1), "cpu", seconds=60, max_repeats=7)
    assert timing.repeats == 7
    assert len(calls) == 8  # and one to warm up


def test_calls_are_timed_in_turns():
    order = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    timings = measure.time_in_turns(calls, "cpu", seconds=0, min_repeats=3)
    assert order == ["a", "b"] * 4  # one warm-up, three repeats
    assert [t.repeats for t in timings] == [3, 3]


class OnGpu:
    """A GPU as `measure` sees it: overwriting the cache takes 0.1 ms, calls what Python says."""

    def __init__(self, monkeypatch, queueing):
        self.queueing = list(queueing)  # of the calls, ms
        self.busy_until = self.now = 0.0
        self.flushes = 0
        monkeypatch.setattr(measure, "host_ms", lambda call, device: 0.1)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: OnGpu.Event(self))
        monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: self)

    def zero_(self):
        self.flushes += 1
        self.busy_until = max(self.busy_until, self.now) + 0.1

    def call(self):
        self.now += self.queueing.pop(0)
        self.busy_until = max(self.busy_until, self.now) + 1.0

    class Event:
        def __init__(self, gpu):
            self.gpu = gpu

        def record(self, stream):
            self.at = max(self.gpu.busy_until, self.gpu.now)

        def query(self):
            return self.at <= self.gpu.now

        def synchronize(self):
            self.gpu.now = max(self.gpu.now, self.at)

        def elapsed_time(self, end):
            return end.at - self.at


def test_a_run_that_waited_for_python_is_timed_again(monkeypatch):
    # Queueing the first call takes longer than overwriting the cache three times: 1.2 ms.
    gpu = OnGpu(monkeypatch, [0.0, 0.5, 0.5, 0.2])
    run = measure._timed_on_gpu(gpu.call, torch.device("cuda"))
    before = gpu.flushes
    assert run() == pytest.approx(1.0)
    assert gpu.flushes - before == 3 + 6
    assert run() == pytest.approx(1.0)
    assert gpu.flushes - before == 3 + 6 + 6


def test_no_call_is_waited_for_without_end(monkeypatch):
    gpu = OnGpu(monkeypatch, [0.0] + [30.0] * 20)
    run = measure._timed_on_gpu(gpu.call, torch.device("cuda"))
    assert run() > 1.0
    assert len(gpu.queueing) == 20 - len((3, 6, 12, 24, 48, 96, 192, 200))


def test_forward_call_builds_no_graph():
    assert not measure.call_for(CASE.run, inputs_of(CASE), "forward")().requires_grad


def test_full_call_computes_every_gradient():
    inputs = inputs_of(CASE)
    gradients = measure.call_for(CASE.run, inputs, "full")()
    assert [g.shape for g in gradients] == [t.shape for t in inputs.values()]
    assert all((g != 0).any() for g in gradients)


def test_peak_counts_what_is_in_use_at_once():
    def call():
        a = torch.empty(1000)
        b = torch.empty(2000)
        del a
        c = torch.empty(500)
        return b, c

    assert memory.peak_bytes(call, "cpu") == 3000 * 4


def test_peak_leaves_out_what_was_there_before():
    x = torch.ones(1000, 10)
    assert memory.peak_bytes(lambda: x.sum(0), "cpu") == 10 * 4


def test_peak_sees_temporaries_inside_pytorch():
    x = torch.ones(100, 100)
    one = memory.peak_bytes(lambda: x @ x, "cpu")
    assert one == 100 * 100 * 4
    assert memory.peak_bytes(lambda: x @ x @ x, "cpu") == 2 * one


def test_saved_bytes_are_what_autograd_keeps():
    x = torch.ones(1000, requires_grad=True)
    assert memory.saved_bytes(lambda: x.sigmoid(), [x]) == 4000  # its output
    assert memory.saved_bytes(lambda: x + 1, [x]) == 0
    assert memory.saved_bytes(lambda: x * x) == 4000  # x, counted where it is not named


def test_saved_storage_counts_once_however_many_views():
    x = torch.ones(1000, requires_grad=True)

    def call():
        y = x * 2
        return y[:10] * y[5:15]

    assert memory.saved_bytes(call, [x]) == 4000


def test_saved_bytes_are_grouped_by_what_computed_them():
    x = torch.ones(100, 10, requires_grad=True)
    saved = memory.saved_tensors(lambda: (x @ x.sigmoid().t()).sigmoid(), [x])
    assert [s.made_by for s in saved if s.existing] == [""]
    assert memory.bytes_by_maker(saved) == {"Sigmoid": 4 * (100 * 10 + 100 * 100)}


def test_saved_tensor_of_a_custom_operator_bears_its_name():
    from megafold.ops.transition import library  # noqa: F401, registers the operator

    x, weight = torch.ones(2, 4, requires_grad=True), torch.ones(4, 4)

    def call():
        out, _ = torch.ops.megafold.transition(x, None, None, weight, weight, weight, 1e-5, False)
        return out.sigmoid() * out

    saved = memory.saved_tensors(call, [x, weight])
    assert "megafold::transition" in {s.made_by for s in saved}


def test_attention_saves_its_weights():
    case = cases.case("evo_attention", "B1 S16 N16 H2 D8")
    inputs = {n: t.requires_grad_(t.is_floating_point()) for n, t in inputs_of(case).items()}
    saved = memory.saved_bytes(lambda: case.run_reference(inputs), inputs.values())
    weights = 16 * 16 * 16 * 2 * 4
    copies = 3 * 16 * 16 * 2 * 8 * 4  # q, k, v with heads before tokens
    mask = 16  # rows that attend to something
    assert saved == weights + copies + mask


def test_counter_counts_forward_and_backward():
    call = measure.call_for(CASE.run_reference, inputs_of(CASE), "full")
    with memory.OperatorCounter() as counter:
        call()
    kinds = counter.by_kind()
    assert kinds["linear"] == 9  # three products forward, six backward
    assert kinds["layer norm"] == 2
    assert kinds["activation"] == 2
    assert sum(kinds.values()) == sum(counter.calls.values())


def test_counter_leaves_views_out():
    x = torch.ones(4, 4)
    with memory.OperatorCounter() as counter:
        x.t().reshape(2, 8)[0].expand(3, 8)
    assert counter.calls == {"clone": 1}  # the reshape of a transposed tensor


def test_training_memory_of_a_linear_layer_and_adam():
    layer = torch.nn.Linear(10, 20)
    optimizer = torch.optim.Adam(layer.parameters())
    x = torch.ones(5, 10)
    found = memory.training_memory(layer, optimizer, lambda: layer(x).sigmoid().sum(), [x])
    parameters = (10 * 20 + 20) * 4
    assert found.parameters == found.gradients == parameters
    assert found.optimizer == 2 * parameters + 2 * 4  # two moments, and a step count each
    assert found.activations == 5 * 20 * 4
    assert found.total == 4 * parameters + 8 + 400


def test_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="unknown direction 'backward'"):
        measure.call_for(CASE.run, {}, "backward")
