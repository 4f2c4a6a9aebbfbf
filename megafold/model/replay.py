"""The denoiser as a CUDA graph: many steps on one set of conditions without Python in between.

One step of the sampler is several hundred small kernels, which a GPU runs faster than Python can
queue them: five times and more for a few hundred tokens. Their order and their sizes are the same
in every step, so they are recorded once and replayed. What they read is copied to where it was
when they were recorded, so that the recording serves the next structure of the same sizes, too:
training with static shapes records once.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.func import functional_call

from megafold import ops
from megafold.ops.precision import allows_tf32

T = TypeVar("T")

_lock = threading.Lock()
_recordings: WeakKeyDictionary[nn.Module, Recording] = WeakKeyDictionary()


def replayed(module: nn.Module, example: torch.Tensor, *given: Any) -> Callable[..., torch.Tensor]:
    """``module(*changing, *given)`` as a function of the tensors that change from call to call.

    Without gradient. On a GPU the second call is recorded and later ones are replayed; a module
    keeps its latest recording, and another one replaces it for other sizes, dtypes, weights in
    another place, another autocast or another implementation of the operators. Elsewhere, and
    while something traces or records already, it is the plain call.

    Args:
        module: draws no random numbers, and does not wait for the device.
        example: a tensor on the device that it runs on.
        given: tensors, and tuples and dataclasses with tensors in them, the same in all calls.
    """

    def plain(*changing: torch.Tensor) -> torch.Tensor:
        return module(*changing, *given)

    device = example.device
    if device.type != "cuda" or torch.compiler.is_compiling():
        return plain
    if torch.cuda.is_current_stream_capturing():
        return plain
    key: Any = None

    def call(*changing: torch.Tensor) -> torch.Tensor:
        nonlocal key
        with _lock, torch.cuda.device(device):
            recording = _recordings.get(module)
            if key is None:
                key = surroundings(module, (changing, given))
                if recording is not None and recording.key == key:
                    recording.set_given(given)
                else:
                    # Compiles kernels and lets libraries take their memory: not to be recorded.
                    return plain(*changing)
            if recording is None or recording.key != key:
                _recordings.pop(module, None)
                recording = Recording(module, key, changing, given)
                _recordings[module] = recording
            return recording(*changing)

    return call


class Recording:
    """Kernels of one call, with the memory of what they read and write."""

    def __init__(
        self, module: nn.Module, key: Any, changing: tuple[torch.Tensor, ...], given: tuple
    ) -> None:
        self.key = key
        self._changing = copied(changing)
        self._given = copied(given)
        self._weights = cast_weights(module, changing[0].device.type)
        # Not the module itself, which must not live on because of its recording.
        self._uncast = [module.get_parameter(name) for name in self._weights]
        self._graph = torch.cuda.CUDAGraph()
        self._out = recorded(
            self._graph,
            torch.cuda.Stream(),
            lambda: functional_call(module, self._weights, (*self._changing, *self._given)),
        )

    def set_given(self, given: tuple) -> None:
        """Let the next replays read these values, and the weights as they are now."""
        if kept := list(tensors(self._given)):
            torch._foreach_copy_(kept, list(tensors(given)))
        if self._weights:
            torch._foreach_copy_(list(self._weights.values()), self._uncast)

    def __call__(self, *changing: torch.Tensor) -> torch.Tensor:
        torch._foreach_copy_(list(self._changing), list(changing))
        self._graph.replay()
        return self._out.clone()


def recorded(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, call: Callable[[], T], **pool: Any
) -> T:
    """What a call on a stream returns while it is recorded: memory, with nothing in it yet."""
    # A graph has memory of its own. What PyTorch keeps of calls that came before, on this stream
    # and on others, it cannot take while it records, nor give back.
    torch.cuda.empty_cache()
    stream.wait_stream(torch.cuda.current_stream())
    # What autocast has cast and keeps belongs to whoever entered it; casts are recorded.
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local", **pool)
            try:
                out = call()
            finally:
                graph.capture_end()
    finally:
        torch.set_autocast_cache_enabled(cached)
    torch.cuda.current_stream().wait_stream(stream)
    return out


def cast_weights(module: nn.Module, device: str) -> dict[str, torch.Tensor]:
    """Copies, by name, of the weights that autocast would cast in every call; none without it."""
    if not torch.is_autocast_enabled(device):
        return {}
    dtype = torch.get_autocast_dtype(device)
    return {
        name: parameter.detach().to(dtype)
        for prefix, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        for name, parameter in layer.named_parameters(prefix)
    }


def surroundings(module: nn.Module, inputs: tuple) -> Any:
    """All that a recording depends on beside the values of its inputs."""
    device = "cuda"
    return (
        torch.cuda.current_stream(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        allows_tf32(),
        ops.backend(),
        _state(module),
        tuple((t.shape, t.stride(), t.dtype) for t in tensors(inputs)),
    )


def _state(module: nn.Module) -> tuple[list[bool], list[int], list[torch.dtype]]:
    """Which of its parts are training, and where parameters and buffers lie, of which dtypes.

    Looked up before every call, so in a third of the time that naming thousands of them takes.
    """
    held: list[torch.Tensor | None] = []
    modules = [module]
    for one in modules:  # which grows
        held += one._parameters.values()
        held += one._buffers.values()
        modules += [part for part in one._modules.values() if part is not None]
    there = [tensor for tensor in held if tensor is not None]
    training = [one.training for one in modules]
    return training, [tensor.data_ptr() for tensor in there], [tensor.dtype for tensor in there]


def copied(tree: T) -> T:
    """The same tree with tensors in memory of their own."""
    return mapped(tree, lambda tensor: tensor.detach().clone())


def mapped(tree: T, function: Callable[[torch.Tensor], torch.Tensor]) -> T:
    """The same tree with another tensor for each, in the order of :func:`tensors`."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        return type(tree)(mapped(one, function) for one in tree)
    if dataclasses.is_dataclass(tree) and any(True for _ in tensors(tree)):
        fields = dataclasses.fields(tree)
        parts = {f.name: mapped(getattr(tree, f.name), function) for f in fields}
        return dataclasses.replace(tree, **parts)
    return tree


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a tree, in order."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for one in tree:
            yield from tensors(one)
    elif dataclasses.is_dataclass(tree):
        for field in dataclasses.fields(tree):
            yield from tensors(getattr(tree, field.name))
