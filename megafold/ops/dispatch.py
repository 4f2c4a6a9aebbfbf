"""Which implementation of an operator runs, and why.

Every operator has a PyTorch implementation; some have Triton kernels too. The choice is made
in one place, here, and can be asked for before the call::

    with megafold.ops.use("torch"):      # every operator inside, in this thread or task only
        ...
    print(megafold.ops.explain("transition", x, ...))

``"auto"`` (the default) takes Triton for the operators that have kernels, on a GPU, in a dtype
they take, unless PyTorch was measured to be faster for a call of its size; otherwise PyTorch.
``"torch"`` and ``"triton"`` are explicit: what was asked for runs, or an error says why it cannot.
Nothing is ever replaced quietly.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

from megafold.ops import launcher
from megafold.ops.interpreter import interpreted

BACKENDS = ("auto", "torch", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# The backend in force, per thread and asyncio task. torch.compile can neither read a context
# variable nor guard on one, so `use` mirrors it in a plain global, which Dynamo guards:
# compiled code is compiled again when the backend changes.
_backend: ContextVar[str] = ContextVar("megafold_operator_backend", default="auto")
_backend_for_dynamo = "auto"


@dataclass(frozen=True)
class Choice:
    """What would run for one call, and why; printed, one line and one more for each kernel."""

    operator: str
    implementation: str  # "torch" or "triton"
    reason: str
    kernels: tuple[str, ...] = ()  # block sizes of each kernel, and where they are from

    def __str__(self) -> str:
        first = f"{self.operator}: {self.implementation} ({self.reason})"
        return "\n  ".join((first, *self.kernels))


@dataclass(frozen=True)
class Operator:
    """One entry of the registry of operators."""

    name: str
    function: Callable[..., torch.Tensor]  # the public function
    check: Callable[..., None]  # raises for bad input; the same signature
    kernels: str | None  # what Triton computes of it; None where there is no kernel
    configs: Callable[..., tuple[str, ...]] | None = None  # block sizes, in words, for a call
    # Why the kernels cannot take a call of such shapes, of the same signature; None where they can.
    limit: Callable[..., str | None] | None = None
    # Why PyTorch is faster for a call, of the same signature; None where it is not.
    slower: Callable[..., str | None] | None = None
    known_from: str = "measured on an H100"  # that it is


REGISTRY: dict[str, Operator] = {}


def register(operator: Operator) -> None:
    """Make an operator known to ``explain`` and ``choose``."""
    REGISTRY[operator.name] = operator


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Choose the implementation of every operator called inside.

    Holds for the current thread or asyncio task only, and is restored on the way out. (Code
    under ``torch.compile`` follows the switch too, but process-wide: do not switch in one
    thread while another runs compiled code.) The choice is made in the forward call; the
    backward follows it.

    Args:
        backend: ``"torch"``, ``"triton"`` or ``"auto"``.

    Raises:
        ValueError: for any other name.
    """
    global _backend_for_dynamo
    if backend not in BACKENDS:
        raise ValueError(f"unknown operator backend {backend!r}; choose one of {BACKENDS}")
    token = None if torch.compiler.is_dynamo_compiling() else _backend.set(backend)
    previous, _backend_for_dynamo = _backend_for_dynamo, backend
    try:
        yield
    finally:
        _backend_for_dynamo = previous
        if token is not None:
            _backend.reset(token)


def backend() -> str:
    """The backend in force here: ``"auto"``, ``"torch"`` or ``"triton"``."""
    return _backend_for_dynamo if torch.compiler.is_dynamo_compiling() else _backend.get()


def choose(operator: str, tensor: torch.Tensor, *others: Any, **more: Any) -> Choice:
    """The implementation for a call of ``operator`` whose (main) input is ``tensor``.

    Args:
        operator: its name.
        tensor: its main input, the first.
        others, more: the other arguments of the call, for an operator with ``limit`` or ``slower``.

    Raises:
        NotImplementedError: Triton was asked for and the operator has no Triton kernel, or none
            for inputs of these shapes.
        RuntimeError: Triton was asked for and cannot run on this device.
        TypeError: Triton was asked for and takes no input of this dtype.
    """
    asked = backend()
    if asked == "torch":
        return Choice(operator, "torch", 'use("torch") asks for it')
    kernels = REGISTRY[operator].kernels
    obstacle = _obstacle(operator, kernels, tensor, *others, **more)
    if asked == "triton":
        if obstacle is not None:
            error, why = obstacle
            raise error(f'{operator}: use("triton") asks for Triton, but {why}')
        return Choice(operator, "triton", f'use("triton") asks for it; {kernels}')
    if obstacle is not None:
        return Choice(operator, "torch", obstacle[1])
    if tensor.device.type != "cuda":
        return Choice(operator, "torch", "on the CPU the Triton interpreter is for tests only")
    slower = REGISTRY[operator].slower
    why = None if slower is None else slower(tensor, *others, **more)
    if why is not None:
        return Choice(operator, "torch", f"{why}; {REGISTRY[operator].known_from}")
    return Choice(operator, "triton", f"{tensor.dtype} on a GPU; {kernels}")


def by_kernels(name: str, tensor: torch.Tensor) -> bool:
    """Whether kernels run that are right for every GPU and shape, of what is no operator.

    Under ``torch.compile`` PyTorch's operations do, of which it makes one kernel itself.

    Raises:
        RuntimeError, TypeError: Triton was asked for and cannot run on this device, or takes no
            input of this dtype.
    """
    asked = backend()
    if asked == "torch" or torch.compiler.is_compiling():
        return False
    obstacle = _not_taken(tensor) or _not_here(tensor)
    if asked == "triton" and obstacle is not None:
        error, why = obstacle
        raise error(f'{name}: use("triton") asks for Triton, but {why}')
    return obstacle is None and (asked == "triton" or tensor.device.type == "cuda")


def explain(operator: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Which implementation ``operator(*args, **kwargs)`` would run here and now, and why.

    Args:
        operator: an operator of ``megafold.ops``, or its name.
        args, kwargs: as for the call itself. They are validated, and nothing is computed.

    Raises:
        ValueError: no operator of that name.
        Whatever the call itself would raise for these arguments under the backend in force.
    """
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", repr(operator))
    if name not in REGISTRY:
        raise ValueError(f"unknown operator {name!r}; choose one of {tuple(REGISTRY)}")
    REGISTRY[name].check(*args, **kwargs)
    call = inspect.signature(REGISTRY[name].check).bind(*args, **kwargs)
    choice = choose(name, *call.args, **call.kwargs)
    configs = REGISTRY[name].configs
    if choice.implementation == "triton" and configs is not None:
        return replace(choice, kernels=configs(*args, **kwargs))
    return choice


def interpret() -> None:
    """Let Triton's interpreter run the kernels on CPU tensors, from now on in this process.

    For looking at a kernel where there is no GPU: it computes the same numbers, thousands of
    times slower. Only an explicit ``use("triton")`` runs it; bf16 is cut off where a GPU rounds.
    Does nothing where ``TRITON_INTERPRET=1`` is set already.

    Raises:
        RuntimeError: Triton was imported before, so that it is too late.
    """
    if interpreted():
        return
    if "triton" in sys.modules:
        raise RuntimeError(
            "Triton is imported already; call megafold.ops.interpret() first, "
            "or start Python with TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"


def _obstacle(
    operator: str, kernels: str | None, tensor: torch.Tensor, *others: Any, **more: Any
) -> tuple[type[Exception], str] | None:
    """Why Triton cannot run this call, with the error to raise for it; None where it can."""
    if kernels is None:
        return NotImplementedError, f"{operator} has no Triton kernel yet"
    not_taken = _not_taken(tensor)
    if not_taken is not None:
        return not_taken
    limit = REGISTRY[operator].limit
    too_much = None if limit is None else limit(tensor, *others, **more)
    if too_much is not None:
        return NotImplementedError, too_much
    return _not_here(tensor)


def _not_taken(tensor: torch.Tensor) -> tuple[type[Exception], str] | None:
    """Why no kernel takes a tensor, wherever it is; None where one may."""
    if not TRITON_INSTALLED:
        return RuntimeError, "triton is not installed"
    if tensor.dtype not in TRITON_DTYPES:
        return TypeError, f"the kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    return None


def _not_here(tensor: torch.Tensor) -> tuple[type[Exception], str] | None:
    """Why no kernel runs where a tensor is; None where one does."""
    if tensor.device.type == "cuda" or (tensor.device.type == "cpu" and interpreted()):
        return None
    if tensor.device.type == "meta" and launcher.recording:
        return None
    return RuntimeError, (
        f"its input is on {tensor.device}: Triton needs a GPU "
        "(or its interpreter: see megafold.ops.interpret)"
    )
