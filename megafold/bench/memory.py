"""How much memory a call takes, what it keeps for the backward pass, and what it calls."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

MB = 1e6  # bytes

# What kind of work a PyTorch operation is. Views, which compute nothing, are not listed.
KINDS = {
    "linear": ("mm", "addmm", "linear", "linear_backward"),
    "batched product": ("bmm", "baddbmm", "matmul"),
    "layer norm": ("native_layer_norm", "native_layer_norm_backward", "_fused_rms_norm"),
    "activation": (
        "silu", "silu_", "silu_backward", "sigmoid", "sigmoid_backward", "relu", "relu_",
        "threshold_backward", "gelu", "gelu_backward",
        "softplus", "softplus_backward",
    ),
    "softmax": (
        "_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data",
    ),
    "sum": ("sum", "mean", "any", "all", "cumsum", "logsumexp"),
    "copy": ("clone", "copy_", "_to_copy", "cat", "stack", "index", "gather", "embedding"),
    "fill": (
        "empty", "empty_like", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like",
        "new_zeros", "new_empty", "fill_", "zero_", "arange", "empty_strided", "scalar_tensor",
        "new_empty_strided", "new_full", "new_ones",
    ),
}  # fmt: skip
# Backward nodes of operations that only look at memory another one filled.
_VIEWS = {
    "View", "UnsafeView", "ReshapeAlias", "T", "Transpose", "Permute", "Expand", "Unsqueeze",
    "Squeeze", "Slice", "Select", "Split", "Alias",
}  # fmt: skip
_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}


def peak_bytes(call: Callable[[], object], device: torch.device | str) -> int:
    """The most memory in use during ``call`` beyond what was in use before it, in bytes.

    Inputs that exist already do not count; the result, every temporary and every gradient do.
    On a GPU this is what PyTorch's allocator handed out. On the CPU every allocation and
    release is recorded by PyTorch's profiler and summed up. (Scratch memory that a maths
    library takes from the operating system itself is in neither.)
    """
    if torch.device(device).type == "cuda":
        return _peak_bytes_gpu(call, torch.device(device))
    # Kineto would write two lines to stderr for every profile.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        result = call()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in run.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU
    ]
    del result
    in_use = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        in_use += change
        peak = max(peak, in_use)
    return peak


def _peak_bytes_gpu(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def recorded_bytes(device: torch.device | str) -> int:
    """Bytes that CUDA graphs have to themselves on a GPU, in use or not; 0 elsewhere."""
    device = torch.device(device)
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == index and tuple(segment["segment_pool_id"]) != (0, 0)
    )


@dataclass(frozen=True)
class SavedTensor:
    """One block of memory that autograd keeps for the backward pass."""

    shape: tuple[int, ...]  # of the first tensor saved that lies in it
    dtype: torch.dtype
    bytes: int  # of the whole block
    made_by: str  # operation that computed it: "Sigmoid"; "" where none with a gradient did
    existing: bool  # it is an input or a parameter, and there anyway


def saved_tensors(
    call: Callable[[], object], existing: Iterable[torch.Tensor | None] = ()
) -> list[SavedTensor]:
    """What autograd keeps alive for the backward pass of ``call``, in the order it is saved.

    Args:
        call: a forward pass with gradients enabled.
        existing: tensors whose memory is there anyway (inputs, parameters); marked so.

    Every storage appears once, however many views of it are saved.
    """
    known = {t.untyped_storage().data_ptr() for t in existing if t is not None}
    found: dict[int, SavedTensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if storage.nbytes() and address not in found:
            found[address] = SavedTensor(
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                bytes=storage.nbytes(),
                made_by=_maker(tensor),
                existing=address in known,
            )
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # kept until here: a released address could be given out again
        del result
    return list(found.values())


def _maker(tensor: torch.Tensor) -> str:
    """The operation that filled a tensor's memory: what its views are views of."""
    node = tensor.grad_fn
    while node is not None:
        # "SiluBackward0"; of a custom operator "GeneratedBackwardFor_megafold_swiglu_default..."
        custom = re.match(r"GeneratedBackwardFor_([a-z]+)_(\w+?)_default", node.name())
        name = f"{custom[1]}::{custom[2]}" if custom else node.name().split("Backward")[0]
        if name not in _VIEWS:
            return "" if "AccumulateGrad" in name else name
        node = node.next_functions[0][0]
    return ""


def saved_bytes(call: Callable[[], object], existing: Iterable[torch.Tensor | None] = ()) -> int:
    """Bytes of :func:`saved_tensors` that are not there anyway: the activations."""
    return sum(saved.bytes for saved in saved_tensors(call, existing) if not saved.existing)


class OperatorCounter(TorchDispatchMode):
    """Counts the operations PyTorch runs inside the ``with`` block, backward passes included.

    Attributes:
        calls: number of calls by operation (``"mm"``), views left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name != "_unsafe_view":  # which is one, under another flag
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))

    def by_kind(self) -> dict[str, int]:
        """Number of calls by kind of work (``KINDS``); the rest is ``"elementwise and other"``."""
        kinds: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        for name, count in self.calls.items():
            kinds[_KIND_OF.get(name, "elementwise and other")] += count
        return dict(kinds)


def bytes_by_maker(saved: Iterable[SavedTensor]) -> dict[str, int]:
    """Saved bytes by the operation that computed them, largest first; inputs left out."""
    total: Counter[str] = Counter()
    for one in saved:
        if not one.existing:
            total[one.made_by or "statistics, masks"] += one.bytes
    return dict(total.most_common())


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of one training step by what it holds, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int  # kept by autograd between forward and backward

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def training_memory(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], torch.Tensor],
    existing: Iterable[torch.Tensor] = (),
) -> TrainingMemory:
    """Run one training step and measure what it holds. The parameters are updated.

    Args:
        loss: computes the scalar loss of one example with ``module``.
        existing: the example's tensors, which are not activations.
    """
    parameters = list(module.parameters())
    kept: list[torch.Tensor] = []

    def forward() -> torch.Tensor:
        kept.append(loss())
        return kept[0]

    optimizer.zero_grad(set_to_none=True)
    activations = saved_bytes(forward, [*parameters, *module.buffers(), *existing])
    kept.pop().backward()
    optimizer.step()
    state = [
        value
        for per_parameter in optimizer.state.values()
        for value in per_parameter.values()
        if isinstance(value, torch.Tensor)
    ]
    return TrainingMemory(
        parameters=tensor_bytes(parameters),
        gradients=tensor_bytes(p.grad for p in parameters),
        optimizer=tensor_bytes(state),
        activations=activations,
    )


def tensor_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the elements of ``tensors``; None counts nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
