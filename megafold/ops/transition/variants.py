"""The kernels of the transition as calls have them compiled, for compiling ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from megafold.ops.hopper import DEVICES, HALVES, recording
from megafold.ops.recording import distinct, recorded
from megafold.ops.transition import elementwise, hopper, launch, passes
from megafold.ops.tuning import Config, Entry, tables, use_config
from megafold.ops.tuning.table import DEFAULT
from megafold.ops.variants import KernelVariant

# The pair representation of 384 tokens; of the default table two widths, the usual one and that
# of the tiny model. bf16 stands for fp16 as well: the two compile alike.
ROWS, WIDTHS = 147456, (32, 128)
ADDED = "residual"  # what kernels are called that add x, or the gradient that is also that of x
# Between products: tokens of the diffusion transformer in bf16, single representations in fp32.
WIDE = ((36864, 768, torch.bfloat16), (768, 384, torch.float32))


def variants() -> list[KernelVariant]:
    """Every kernel with the block sizes of every table, and those that need no table."""
    found = []
    for entry in _entries(DEFAULT):
        if entry.sizes["C"] in WIDTHS:
            found += _with_and_without(entry, f"C{entry.sizes['C']}", ())
    sharing: dict[int, list[str]] = {}  # devices that have one table
    for device, entries in tables().items():
        sharing.setdefault(id(entries), []).append(device)
    for devices in sharing.values():
        if devices != [DEFAULT]:
            for entry in _entries(devices[0]):
                key = " ".join(f"{name}{size}" for name, size in entry.sizes.items())
                found += _with_and_without(entry, f"{key} {devices[0]}", tuple(devices))
    between = (v for sizes in WIDE for v in _between_products(*sizes))
    return [*found, *_reduction(), *between, *_on_hopper()]


def _on_hopper() -> list[KernelVariant]:
    """The kernels that run on Hopper GPUs alone, with a norm and without, on the residual."""
    if not hopper.has_gluon():
        return []
    found = []
    for dtype in HALVES:
        for norm, residual in ((True, False), (True, True), (False, False)):
            with recording():
                found += _both_passes(dtype, norm, residual)
    return [replace(v, devices=DEVICES) for v in distinct(found) if ".hopper" in v.name]


def _both_passes(dtype: torch.dtype, norm: bool, residual: bool) -> list[KernelVariant]:
    """What both passes launch, all gradients asked for."""
    channels, hidden, eps = WIDTHS[-1], 4 * WIDTHS[-1], 1e-5 if norm else None
    x = _empty(ROWS, channels, dtype=dtype)
    norms = [_empty(channels, dtype=dtype) if norm else None for _ in range(2)]
    weights = [_empty(*shape, dtype=dtype) for shape in 2 * [(hidden, channels)]]
    operands = (x, *norms, *weights, _empty(channels, hidden, dtype=dtype))

    def call() -> None:
        y, stats = passes.forward(*operands, eps, residual)
        passes.backward(y, *operands, stats, eps, residual, [t is not None for t in operands])

    how = [str(dtype).removeprefix("torch."), *(() if norm else ("no norm",)), *residual * (ADDED,)]
    return recorded(call, " ".join(how))


def _with_and_without(entry: Entry, key: str, devices: tuple[str, ...]) -> list[KernelVariant]:
    """One kernel with tables as calls have it compiled: alone, on the residual, on one in fp32."""
    name = f"{entry.kernel} bfloat16 {key}"
    found = [replace(variant(entry), name=name, devices=devices)]
    for dtype, added in ((torch.bfloat16, ADDED), (torch.float32, f"{ADDED} float32")):
        made = variant(entry, residual=dtype)
        found.append(replace(made, name=f"{name} {added}", devices=devices))
    return distinct(found)


def variant(entry: Entry, residual: torch.dtype | None = None) -> KernelVariant:
    """One kernel with tables, as a call of the sizes of an entry has it compiled.

    Args:
        residual: the dtype of x, where that is added.
    """
    channels, rows = entry.sizes["C"], entry.sizes.get("M", ROWS)
    hidden = entry.sizes.get("H", 4 * channels)
    of_x = residual or torch.bfloat16
    x, y, normalised, grad = (
        _empty(rows, channels, dtype=dtype) for dtype in (of_x, of_x, *2 * (torch.bfloat16,))
    )
    parameters = (_empty(channels), _empty(channels))
    weights = (_empty(hidden, channels), _empty(hidden, channels), _empty(channels, hidden))
    stats = _empty(2, rows, dtype=torch.float32)
    grad_hidden = _empty(rows, 3 * hidden)
    problem, of = launch.Problem(rows, channels, hidden), (x.device, torch.bfloat16)
    added = None if residual is None else y

    def call() -> None:
        if entry.kernel == launch.FORWARD:
            on_x = residual is not None
            launch.launch_forward(x, *parameters, *weights, y, stats, 1e-5, on_x)
        elif entry.kernel == launch.GRAD_ROWS:
            plan = launch.RowsPlan.of(problem, *of)
            written = (x, plan.sums(x), normalised, grad_hidden)
            read = (x, *parameters, *weights, stats, grad, added)
            launch.launch_grad_rows(plan, *read, *written, 0)
        else:
            plan = launch.WeightsPlan.of(problem, rows, *of)
            partial = plan.partial(weights[0])
            # The second chunk: a first one only adds nothing.
            launch.launch_grad_weights(plan, grad_hidden, normalised, grad, partial, False)

    config = Config(entry.blocks, entry.num_warps, entry.num_stages, entry.max_registers)
    with use_config(entry.kernel, config):
        (found,) = recorded(call)
    return found


def _reduction() -> list[KernelVariant]:
    channels, hidden = WIDTHS[-1], 4 * WIDTHS[-1]
    found = [_empty(n) for n in (channels, channels)]
    found = [*(_empty(hidden, channels) for _ in range(2)), _empty(channels, hidden), *found]
    partial = _empty(11, 3 * hidden, channels, dtype=torch.float32)
    sums = _empty(ROWS // 64, 2, channels, dtype=torch.float32)
    problem = launch.Problem(ROWS, channels, hidden)
    return recorded(lambda: launch.launch_reduce(problem, partial, sums, *found), "bfloat16")


def _between_products(rows: int, channels: int, dtype: torch.dtype) -> list[KernelVariant]:
    x, other, third, fourth = (_empty(rows, channels, dtype=dtype) for _ in range(4))
    weight, bias = _empty(channels, dtype=dtype), _empty(channels, dtype=dtype)
    stats = _empty(2, rows, dtype=torch.float32)
    hidden = 2 * channels
    pairs, activation = _empty(rows, 2 * hidden, dtype=dtype), _empty(rows, hidden, dtype=dtype)
    both, gate, value = (_empty(n * hidden, channels, dtype=dtype) for n in (2, 1, 1))

    def call() -> None:
        launch.launch_norm_forward(x, weight, bias, other, stats, 1e-5)
        _, sums = launch.launch_norm_backward(other, x, weight, stats, None, third, True)
        launch.launch_swiglu(elementwise.swiglu_forward_kernel, pairs, activation)
        launch.launch_swiglu(elementwise.swiglu_backward_kernel, pairs, activation, pairs)
        launch.launch_split(both, sums, gate, value, weight, bias)
        launch.launch_gate_rows_backward(x, other, third, other, fourth)

    def on_residual() -> None:
        launch.launch_norm_backward(other, x, weight, stats, fourth, third, True)

    name = str(dtype).removeprefix("torch.")
    return [*recorded(call, name), *recorded(on_residual, f"{name} {ADDED}")]


def _entries(device: str) -> Iterator[Entry]:
    return (entry for entry in tables()[device] if entry.kernel in launch.KERNELS)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
