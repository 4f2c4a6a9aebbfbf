"""Training steps of one shape as CUDA graphs: a block's kernels recorded once, then replayed.

A training step is tens of thousands of small kernels. Queued one by one by Python they take as
long as the host needs, however fast the GPU is. :class:`CapturedSteps` records what
:func:`captured` is called with, forward and backward, the second time it sees the same sizes, and
replays it from then on: a few launches in place of thousands, with autograd around them as ever::

    steps = CapturedSteps()
    for batch in batches:          # of the same sizes
        with steps:
            loss = training_loss(model, batch, generator=generator).total
            loss.backward()

What it costs is memory: each recording has its own, for the activations that its forward pass
leaves to the backward pass (few of them with ``checkpointing``) and for what comes and goes. There
is one set of activations: each call has one backward pass, and that before the next call.

Single modules and a whole model are held to calls, in fp32 and bf16, by
``tests/model/test_capture.py``, which has passed on an H100 and an H200.
``megafold train memorise`` uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from megafold.model.blocks import Bound
from megafold.model.replay import (
    cast_weights,
    copied,
    mapped,
    recorded,
    surroundings,
    tensors,
)

_steps: ContextVar[CapturedSteps | None] = ContextVar("megafold_captured_steps", default=None)
_NOTHING = nn.Module()  # what a function without parameters is one of
PLAIN_CALLS = 1  # before one is recorded: what comes once is not worth it


def captured(function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``; inside of :class:`CapturedSteps`, on a GPU, as a graph.

    Args:
        function: a module, a method of one, or a function whose first input is one: whose
            parameters it uses; or a function without parameters. It waits for nothing and draws
            random numbers from torch's own generator of the device only, and those of blocks that
            are recomputed by ``megafold.model.dropout`` only. It returns tensors as it takes them.
        inputs: tensors, and tuples and dataclasses with tensors in them; what else these hold is
            as it was when the function was recorded.
    """
    steps = _steps.get()
    if steps is None or not next(tensors(inputs)).is_cuda or torch.compiler.is_compiling():
        return function(*inputs)
    return steps.run(function, inputs)


class CapturedSteps:
    """Recordings of one trainer; a context in which :func:`captured` uses them.

    They hold while sizes, dtypes, autocast and the places of the weights stay what they are, and
    are made anew when one changes; there is one for each function, with and without gradient.
    """

    def __init__(self) -> None:
        self._recordings: dict[Any, _Recording] = {}
        self._seen: dict[Any, tuple[Any, int]] = {}
        self._tokens: list[Token] = []

    def __enter__(self) -> CapturedSteps:
        self._tokens.append(_steps.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _steps.reset(self._tokens.pop())

    def run(self, function: Callable[..., Any], inputs: tuple) -> Any:
        """See :func:`captured`."""
        is_module = isinstance(function, nn.Module)
        owners = (function, getattr(function, "__self__", None), inputs[0], _NOTHING)
        module = next(one for one in owners if isinstance(one, nn.Module))
        grad = torch.is_grad_enabled()
        called = "" if is_module else f"{function.__module__}.{function.__qualname__}"
        name = (id(module), called, grad)
        key = surroundings(module, inputs)
        recording = self._recordings.get(name)
        if recording is None or recording.key != key:
            self._recordings.pop(name, None)
            seen, times = self._seen.get(name, (None, 0))
            times = times if seen == key else 0
            self._seen[name] = (key, times + 1)
            if times < PLAIN_CALLS:
                return function(*inputs)
            recording = self._recordings[name] = _Recording(function, module, key, inputs, grad)
        return recording(inputs)


class _Recording:
    """The kernels of a call and of its backward pass, with all memory they use."""

    def __init__(
        self, function: Callable[..., Any], module: nn.Module, key: Any, inputs: tuple, grad: bool
    ) -> None:
        self.key = key
        self.turn = 0  # changes when the activations do
        self._inputs = copied(inputs)
        self._copies = list(tensors(self._inputs))
        given = list(tensors(inputs))
        self._followed = [i for i, t in enumerate(given) if grad and t.requires_grad]
        for i in self._followed:
            self._copies[i].requires_grad_()
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad and grad}
        # What autocast would cast one by one, in every call and again where blocks are
        # recomputed, is cast at once, first of all.
        cast = cast_weights(module, "cuda")
        # Recorded with other names for the same memory: a parameter's own place in autograd may
        # be held by a graph made earlier, on another stream, which a recording must not touch.
        others = {n: p.detach() for n, p in trained.items() if n not in cast}
        names = {f"module.{n}": t for n, t in {**cast, **others}.items()}
        followed = [self._copies[i] for i in self._followed]
        leaves = [*followed, *(names[f"module.{n}"].requires_grad_() for n in trained)]

        def call() -> Any:
            return functional_call(Bound(module, function), names, self._inputs)

        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # One stream for all: autograd runs a backward pass where its forward pass ran.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            gradients = _prepare(call, leaves)
        if grad:  # a method need not use all parameters of its module, and has these alone
            of_trained = zip(trained, gradients[len(followed) :], strict=True)
            unused = {n for n, gradient in of_trained if gradient is None}
            trained = {n: p for n, p in trained.items() if n not in unused}
            cast = {n: t for n, t in cast.items() if n not in unused}
            names = {f"module.{n}": names[f"module.{n}"] for n in {**cast, **trained}}
            leaves = [*followed, *(names[f"module.{n}"] for n in trained)]
        del gradients
        self._parameters = list(trained.values())
        self._cast = list(cast.values())
        self._uncast = [module.get_parameter(name) for name in cast]

        def cast_and_call() -> Any:
            if self._cast:
                with torch.no_grad():
                    torch._foreach_copy_(self._cast, self._uncast)
            return call()

        out = recorded(self._forward, stream, cast_and_call)
        self._tree = mapped(out, torch.Tensor.detach)
        outputs = tuple(tensors(out))
        self._wanted = [i for i, t in enumerate(outputs) if t.requires_grad]
        self._grad_outputs, gradients = [], [None] * len(leaves)
        if self._wanted:
            results = [outputs[i] for i in self._wanted]
            self._grad_outputs = [torch.zeros_like(t) for t in results]
            with torch.autocast("cuda", enabled=False):  # which is for forward passes
                gradients = recorded(
                    self._backward,
                    stream,
                    lambda: torch.autograd.grad(
                        results, leaves, self._grad_outputs, allow_unused=True
                    ),
                    pool=self._forward.pool(),
                )
        many = len(followed)
        self._of_parameters = _Copies(gradients[many:], [p.dtype for p in self._parameters])
        self._of_inputs = [
            None if gradient is None else _Copies([gradient], [copy.dtype])
            for gradient, copy in zip(gradients[:many], followed, strict=True)
        ]
        # The graph of autograd ends here; what it kept is the recording's memory.
        self._outputs = tuple(tensors(self._tree))

    def __call__(self, inputs: tuple) -> Any:
        given = list(tensors(inputs))
        out = self.replay(given)
        if self._wanted:  # the GPU is at work while autograd goes through thousands of parameters
            followed = [given[i] for i in self._followed]
            out = _Replay.apply(self, out, *followed, *self._parameters)
        places = iter(out)
        return mapped(self._tree, lambda _: next(places))

    @torch.no_grad()
    def replay(self, given: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs for these inputs, in memory of their own."""
        self.turn += 1
        if given:
            torch._foreach_copy_(self._copies, given)
        self._forward.replay()
        return tuple(t.clone() for t in self._outputs)

    @torch.no_grad()
    def replay_backward(
        self, grads: tuple[torch.Tensor | None, ...], turn: int
    ) -> list[torch.Tensor | None]:
        """The gradients of what is followed, then of the parameters, in memory of their own.

        Raises:
            RuntimeError: the activations are no longer those of that turn of the forward pass.
        """
        if turn != self.turn:
            raise RuntimeError(
                "a captured forward pass has one backward pass, before it is called again: its "
                "activations are gone; call it outside of CapturedSteps where more is needed"
            )
        self.turn += 1  # operators write over what they kept
        for i, kept in zip(self._wanted, self._grad_outputs, strict=True):
            if grads[i] is None:
                kept.zero_()
            else:
                kept.copy_(grads[i])
        self._backward.replay()
        # Those of inputs, which are large and soon used up, have memory of their own.
        of_inputs = [None if one is None else one()[0] for one in self._of_inputs]
        return of_inputs + self._of_parameters()


class _Copies:
    """Copies of tensors in certain dtypes, contiguous, made anew by each call.

    Few kernels and few places in memory, as each of thousands would cost the host its time:
    copies of one dtype lie in one memory. PyTorch takes a list by a few kernels only if all are of
    one dtype and dense.
    """

    def __init__(self, tensors: list[torch.Tensor], dtypes: list[torch.dtype]) -> None:
        self._count = len(tensors)
        alike: dict[Any, list[int]] = {}
        for i, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
            key = tensor.dtype, dtype, tensor.device, tensor.is_contiguous()
            alike.setdefault(key, []).append(i)
        self._alike = []
        for (_, dtype, device, _), places in alike.items():
            # Odd sizes behind all others, so that these begin at whole lines of 16 bytes.
            places.sort(key=lambda i: tensors[i].numel() % 8 > 0)
            given = [tensors[i] for i in places]
            self._alike.append((places, given, [t.numel() for t in given], dtype, device))

    def __call__(self) -> list[torch.Tensor]:
        copies: dict[int, torch.Tensor] = {}
        for places, given, sizes, dtype, device in self._alike:
            memory = torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes)
            found = [part.view(t.shape) for part, t in zip(memory, given, strict=True)]
            torch._foreach_copy_(found, given)
            copies.update(zip(places, found, strict=True))
        return [copies[i] for i in range(self._count)]


def _prepare(
    call: Callable[[], Any], leaves: list[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """Both passes once, with the tensors that will be recorded: the leaves' gradients.

    Kernels are compiled and loaded for layouts, and the copies' are their own: while a stream
    is recorded nothing may be loaded.
    """
    out = call()
    results = [t for t in tensors(out) if t.requires_grad]
    if not results:
        return (None,) * len(leaves)
    with torch.autocast("cuda", enabled=False):
        zeros = [torch.zeros_like(t) for t in results]
        return torch.autograd.grad(results, leaves, zeros, allow_unused=True)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recording: _Recording, out: tuple[torch.Tensor, ...], *followed):
        ctx.recording = recording
        ctx.set_materialize_grads(False)
        ctx.turn = recording.turn
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return None, None, *ctx.recording.replay_backward(grads, ctx.turn)
