"""Which implementation runs: the switch, the explanation, the refusals."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

from megafold import ops
from megafold.bench import cases
from megafold.ops import dispatch
from megafold.ops.evo_attention import hopper, launch
from megafold.ops.precision import TF32, products_in
from tests.numerics import DEVICE, draw

ATTENTION = cases.case("evo_attention", "B1 S2 N3 H1 D8")
TRANSITION = cases.case("transition", "M3 C8 H16")


def inputs_of(case, dtype=torch.float32, device=DEVICE):
    return draw(case, dtype, device)[0]


def test_auto_is_the_default_and_use_is_undone():
    assert ops.backend() == "auto"
    with ops.use("torch"):
        assert ops.backend() == "torch"
        with ops.use("triton"):
            assert ops.backend() == "triton"
        assert ops.backend() == "torch"
    assert ops.backend() == "auto"


def test_use_is_undone_after_an_error():
    with pytest.raises(KeyError), ops.use("torch"):
        raise KeyError
    assert ops.backend() == "auto"


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"'cuda'; choose one of \('auto', 'torch', 'triton'\)"):
        ops.use("cuda").__enter__()


def test_use_holds_in_its_own_thread_only():
    seen = []
    with ops.use("torch"):
        thread = threading.Thread(target=lambda: seen.append(ops.backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_use_holds_in_its_own_asyncio_task_only():
    async def task(backend):
        with ops.use(backend):
            await asyncio.sleep(0)
            return ops.backend()

    async def both():
        return await asyncio.gather(task("torch"), task("triton"))

    assert asyncio.run(both()) == ["torch", "triton"]


@pytest.mark.parametrize("op", sorted(dispatch.REGISTRY))
def test_explicit_triton_never_runs_something_else(op):
    case = cases.registered(op)[0]
    inputs = inputs_of(case)
    if dispatch.REGISTRY[op].kernels is None:
        with (
            ops.use("triton"),
            pytest.raises(NotImplementedError, match=f"{op} has no Triton kernel"),
        ):
            case.run(inputs)
    else:
        with ops.use("triton"):
            assert ops.explain(op, **inputs, **case.options).implementation == "triton"


def test_auto_takes_pytorch_where_there_is_no_kernel_and_says_so(monkeypatch):
    without = replace(dispatch.REGISTRY["transition"], kernels=None, configs=None)
    monkeypatch.setitem(dispatch.REGISTRY, "transition", without)
    choice = ops.explain("transition", **inputs_of(TRANSITION))
    assert choice.implementation == "torch"
    assert str(choice) == "transition: torch (transition has no Triton kernel yet)"


@pytest.mark.parametrize(
    ("shape", "without", "spared"),
    [
        ("B1 S2 N3 H1 D8", (), ()),
        ("B1 S1 N3 H1 D8", (), (launch.GRAD_BIAS,)),  # no rows share the bias
        ("B1 S2 N3 H1 D8", ("pair_bias",), (launch.GRAD_BIAS,)),
    ],
    ids=str,
)
def test_explain_lists_the_block_sizes_of_every_kernel_a_call_would_run(shape, without, spared):
    inputs = inputs_of(cases.case("evo_attention", shape)) | dict.fromkeys(without)
    assert ops.explain("evo_attention", **inputs_of(ATTENTION, device="cpu")).kernels == ()
    with ops.use("triton"):
        choice = ops.explain("evo_attention", **inputs)
    assert choice.implementation == "triton"
    kernels = [kernel for kernel in launch.KERNELS if kernel not in spared]
    lines = [line for line in choice.kernels if not line.startswith("evo_attention.hopper")]
    assert [line.split(":")[0] for line in lines] == kernels
    assert len(choice.kernels) - len(lines) == (2 if hopper.is_hopper(inputs["q"].device) else 0)
    problem = launch.Problem.of(inputs["q"], inputs["k"], inputs["pair_bias"])
    for kernel, line in zip(kernels, lines, strict=True):
        found = launch.config_of(kernel, problem, inputs["q"])
        for name, size in found.config.blocks.items():
            assert f"{name} {size}" in line
        assert f"warps {found.config.num_warps} stages {found.config.num_stages}" in line
        assert f"({found.source})" in line
    assert str(choice).splitlines()[1:] == [f"  {line}" for line in choice.kernels]


def test_auto_takes_pytorch_on_the_cpu_and_says_so():
    choice = ops.explain(ops.transition, **inputs_of(TRANSITION, device="cpu"))
    assert choice.implementation == "torch"
    assert "CPU" in choice.reason or "on cpu" in choice.reason


FEW = cases.case("layer_norm_linear", "M96 C384 O8")


@contextmanager
def cuda_autocast(enabled):
    """In bf16; ``torch.autocast`` itself needs a GPU for it."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("op", "shape", "dtype", "under", "reason"),
    [
        ("layer_norm_linear", "M96 C384 O8", BF16, {}, "faster below 6144 rows, here 96"),
        ("layer_norm_linear", "M96 C384 O8", BF16, {"gradients": False}, None),
        ("layer_norm_linear", "M6143 C129 O8", FP16, {}, "rows of 129 channels"),
        ("layer_norm_linear", "M6144 C384 O8", BF16, {}, None),
        ("layer_norm_linear", "M96 C128 O8", BF16, {}, None),
        ("layer_norm_linear", "M96 C128 O8", FP32, {}, "float32 operands"),
        ("layer_norm_linear", "M96 C128 O8", FP32, {"autocast": True}, None),
        ("gated_linear", "N78 C16", BF16, {}, "below 6144 rows, here 6084"),
        ("gated_linear", "N78 C16", BF16, {"gradients": False}, None),
        ("gated_linear", "N79 C16", BF16, {}, None),
        ("gated_linear", "N79 C16", FP32, {}, "in full fp32 PyTorch's products"),
        ("gated_linear", "N79 C16", FP32, {"tf32": True}, None),
        ("gated_linear", "N79 C16", FP32, {"autocast": True}, None),
        ("transition", "M96 C128 H8", FP32, {}, "in full fp32 PyTorch is faster"),
        ("transition", "M6144 C129 H8", FP32, {"gradients": False}, "here 129"),
        ("transition", "M6144 C128 H8", FP32, {}, None),
        ("transition", "M96 C129 H8", FP32, {"tf32": True}, None),
        ("transition", "M96 C129 H8", FP32, {"autocast": True}, None),
        ("transition", "M96 C129 H8", BF16, {}, None),
        ("conditioned_transition", "S1 N9 A129 C8 H8", FP32, {}, "here 129"),
        ("conditioned_transition", "S1 N9 A128 C8 H8", FP32, {}, None),
        ("conditioned_transition", "S1 N9 A129 C8 H8", FP32, {"tf32": True}, None),
        ("triangle_multiplication", "B1 N9 C64", FP32, {}, "in full fp32 PyTorch's products"),
        ("triangle_multiplication", "B1 N9 C64", FP32, {"tf32": True}, None),
        ("triangle_multiplication", "B1 N9 C65", FP32, {"tf32": True}, "here 65"),
        ("triangle_multiplication", "B1 N9 C65", FP32, {"autocast": True}, None),
        ("triangle_multiplication", "B1 N9 C65", FP16, {}, None),
    ],
)
def test_auto_takes_pytorch_where_it_is_faster_and_says_so(op, shape, dtype, under, reason):
    case = cases.case(op, shape)
    with (
        FakeTensorMode(),
        torch.set_grad_enabled(under.get("gradients", True)),
        cuda_autocast(under.get("autocast", False)),
        products_in(TF32) if under.get("tf32") else nullcontext(),
    ):
        inputs = [
            torch.empty(a.shape, dtype=a.stored_as(dtype), device="cuda")
            for a in case.arguments.values()
        ]
        choice = dispatch.choose(op, *inputs, **case.options)
        with ops.use("triton"):
            assert dispatch.choose(op, *inputs, **case.options).implementation == "triton"
    assert choice.implementation == ("triton" if reason is None else "torch")
    assert reason is None or reason in choice.reason


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        ("layer_norm_linear", "M96 C384 O8"),
        ("gated_linear", "N3 C16"),
        ("transition", "M96 C129 H8"),
        ("conditioned_transition", "S1 N9 A129 C8 H8"),
        ("triangle_multiplication", "B1 N9 C65"),
    ],
)
def test_what_is_faster_is_found_out_without_a_graph_break(op, shape):
    case = cases.case(op, shape)
    inputs = tuple(inputs_of(case).values())

    def reason(*tensors):
        why = dispatch.REGISTRY[op].slower(*tensors, **case.options)
        return tensors[0] * (1 if why is None else 2)

    found = torch.compile(reason, fullgraph=True, backend="eager")(*inputs)
    assert torch.equal(found, inputs[0] * 2)


@pytest.mark.gpu
def test_what_is_explained_as_pytorch_s_is_pytorch_s_on_a_gpu():
    inputs = inputs_of(FEW, torch.bfloat16)
    assert ops.explain(FEW.op, **inputs).implementation == "torch"
    with ops.use("torch"):
        expected = FEW.run(inputs)
    assert torch.equal(FEW.run(inputs), expected)


@pytest.mark.gpu
def test_auto_takes_triton_on_a_gpu():
    inputs = inputs_of(TRANSITION, torch.bfloat16)
    assert ops.explain("transition", **inputs).implementation == "triton"


def test_explain_says_which_pass_hopper_s_own_kernels_do(monkeypatch):
    inputs = inputs_of(ATTENTION)
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "has_gluon", lambda: True)
    with ops.use("triton"):
        forward, gradients = ops.explain("evo_attention", **inputs).kernels[-2:]
        assert forward.endswith("forward pass by the kernels above: float32 operands")
        assert gradients.endswith("gradients by the kernels above: float32 operands")
        monkeypatch.setattr(hopper, "why_not_backward", lambda *_: "")
        gradients = ops.explain("evo_attention", **inputs).kernels[-1]
    assert gradients.startswith("evo_attention.hopper: gradients by Hopper's own kernels, where")


@pytest.mark.parametrize("case", [ATTENTION, TRANSITION], ids=lambda case: case.op)
def test_explicit_triton_runs_on_no_other_device(case):
    inputs = {name: t.to("meta") for name, t in inputs_of(case).items()}
    with ops.use("triton"), pytest.raises(RuntimeError, match=f"{case.op}: .*input is on meta"):
        case.run(inputs)


def test_auto_takes_pytorch_for_fp64_and_explicit_triton_refuses_it():
    inputs = inputs_of(TRANSITION, torch.float64)
    assert ops.explain("transition", **inputs).implementation == "torch"
    with ops.use("triton"), pytest.raises(TypeError, match=r"not torch\.float64"):
        ops.transition(**inputs)


def test_explicit_torch_runs_torch():
    with ops.use("torch"):
        choice = ops.explain("transition", **inputs_of(TRANSITION))
    assert (choice.implementation, choice.reason) == ("torch", 'use("torch") asks for it')


def test_explicit_triton_without_a_gpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ops.use("triton"), pytest.raises(RuntimeError, match="its input is on cpu: Triton needs"):
        ops.transition(**inputs_of(TRANSITION, device="cpu"))


def test_explain_refuses_what_the_call_would_refuse():
    inputs = inputs_of(TRANSITION)
    with pytest.raises(ValueError, match="weight_out has shape"):
        ops.explain("transition", **{**inputs, "weight_out": inputs["weight_out"].T})
    with pytest.raises(ValueError, match="unknown operator 'softmax'; choose one of"):
        ops.explain("softmax", inputs["x"])


def test_explain_computes_nothing():
    inputs = {name: t.to("meta") for name, t in inputs_of(ATTENTION).items()}
    assert ops.explain("evo_attention", **inputs).implementation == "torch"


def test_compiled_code_follows_the_switch():
    inputs = inputs_of(TRANSITION)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(TRANSITION.run, backend=counter, fullgraph=True)
    compiled(inputs)
    compiled(inputs)
    assert counter.frame_count == 1
    with ops.use("triton"):
        compiled(inputs)
    assert counter.frame_count == 2  # compiled again, for the other implementation


def test_use_inside_compiled_code_is_honoured():
    inputs = inputs_of(TRANSITION)

    def run(inputs):
        with ops.use("triton"):
            return TRANSITION.run(inputs)

    torch.compiler.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(inputs), run(inputs))
    assert ops.backend() == "auto"


def python(code: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


INTERPRETED = """
import torch
from megafold import ops
{before}
ops.interpret()
x, w = torch.randn(2, 4), torch.randn(8, 4)
with ops.use("triton"):
    print(ops.transition(x, None, None, w, w, torch.randn(4, 8)).shape)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the GPU runs the kernels")
def test_interpreter_runs_kernels_on_the_cpu_once_asked_for():
    run = python(INTERPRETED.format(before=""))
    assert run.stdout.strip() == "torch.Size([2, 4])", run.stderr


def test_interpreter_asked_for_too_late_is_an_error():
    run = python(INTERPRETED.format(before="import triton"))
    assert "RuntimeError: Triton is imported already" in run.stderr
