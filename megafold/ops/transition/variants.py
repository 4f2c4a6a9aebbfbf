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
# Between products: tokens of the diffusion transformer in bf16, single representations in fp32.
WIDE = ((36864, 768, torch.bfloat16), (768, 384, torch.float32))


def variants() -> list[KernelVariant]:
    """Every kernel with the block sizes of every table, and those that need no table."""
    found = [
        replace(variant(entry), name=f"{entry.kernel} bfloat16 C{entry.sizes['C']}")
        for entry in _entries(DEFAULT)
        if entry.sizes["C"] in WIDTHS
    ]
    sharing: dict[int, list[str]] = {}  # devices that have one table
    for device, entries in tables().items():
        sharing.setdefault(id(entries), []).append(device)
    for devices in sharing.values():
        if devices != [DEFAULT]:
            for entry in _entries(devices[0]):
                key = " ".join(f"{name}{size}" for name, size in entry.sizes.items())
                name = f"{entry.kernel} bfloat16 {key} {devices[0]}"
                found.append(replace(variant(entry), name=name, devices=tuple(devices)))
    between = (v for sizes in WIDE for v in _between_products(*sizes))
    return [*found, *_reduction(), *between, *_on_hopper()]


def _on_hopper() -> list[KernelVariant]:
    """The kernels that run on Hopper GPUs alone, with a norm and without."""
    if not hopper.has_gluon():
        return []
    found = []
    for dtype in HALVES:
        for norm in (True, False):
            with recording():
                found += _both_passes(dtype, norm)
    return [replace(v, devices=DEVICES) for v in distinct(found) if ".hopper" in v.name]


def _both_passes(dtype: torch.dtype, norm: bool) -> list[KernelVariant]:
    """What both passes launch, all gradients asked for."""
    channels, hidden, eps = WIDTHS[-1], 4 * WIDTHS[-1], 1e-5 if norm else None
    x = _empty(ROWS, channels, dtype=dtype)
    norms = [_empty(channels, dtype=dtype) if norm else None for _ in range(2)]
    weights = [_empty(*shape, dtype=dtype) for shape in 2 * [(hidden, channels)]]
    operands = (x, *norms, *weights, _empty(channels, hidden, dtype=dtype))

    def call() -> None:
        y, stats = passes.forward(*operands, eps)
        passes.backward(y, *operands, stats, eps, [t is not None for t in operands])

    name = f"{str(dtype).removeprefix('torch.')} {'' if norm else 'no norm'}".strip()
    return recorded(call, name)


def variant(entry: Entry) -> KernelVariant:
    """One kernel with tables, as a call of the sizes of an entry has it compiled."""
    channels, rows = entry.sizes["C"], entry.sizes.get("M", ROWS)
    hidden = entry.sizes.get("H", 4 * channels)
    x, normalised, y = (_empty(rows, channels) for _ in range(3))
    parameters = (_empty(channels), _empty(channels))
    weights = (_empty(hidden, channels), _empty(hidden, channels), _empty(channels, hidden))
    stats = _empty(2, rows, dtype=torch.float32)
    grad_hidden = _empty(rows, 3 * hidden)
    problem, of = launch.Problem(rows, channels, hidden), (x.device, x.dtype)

    def call() -> None:
        if entry.kernel == launch.FORWARD:
            launch.launch_forward(x, *parameters, *weights, y, stats, 1e-5)
        elif entry.kernel == launch.GRAD_ROWS:
            plan = launch.RowsPlan.of(problem, *of)
            written = (x, plan.sums(x), normalised, grad_hidden)
            launch.launch_grad_rows(plan, x, *parameters, *weights, stats, y, *written, 0)
        else:
            plan = launch.WeightsPlan.of(problem, rows, *of)
            partial = plan.partial(weights[0])
            # The second chunk: a first one only adds nothing.
            launch.launch_grad_weights(plan, grad_hidden, normalised, y, partial, False)

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
    x, other, third, fourth, fifth = (_empty(rows, channels, dtype=dtype) for _ in range(5))
    weight, bias = _empty(channels, dtype=dtype), _empty(channels, dtype=dtype)
    stats = _empty(2, rows, dtype=torch.float32)
    hidden = 2 * channels
    pairs, activation = _empty(rows, 2 * hidden, dtype=dtype), _empty(rows, hidden, dtype=dtype)
    both, gate, value = (_empty(n * hidden, channels, dtype=dtype) for n in (2, 1, 1))

    def call() -> None:
        launch.launch_norm_forward(x, weight, bias, other, stats, 1e-5)
        _, sums = launch.launch_norm_backward(other, x, weight, stats, third, True)
        launch.launch_swiglu(elementwise.swiglu_forward_kernel, pairs, activation)
        launch.launch_swiglu(elementwise.swiglu_backward_kernel, pairs, activation, pairs)
        launch.launch_split(both, sums, gate, value, weight, bias)
        period = x.numel()
        launch.launch_elementwise(elementwise.gate_forward_kernel, x, other, third, period=period)
        launch.launch_elementwise(
            elementwise.gate_backward_kernel, x, other, third, fourth, fifth, period=period
        )
        launch.launch_gate_rows_backward(x, other, third, other, fourth)

    return recorded(call, str(dtype).removeprefix("torch."))


def _entries(device: str) -> Iterator[Entry]:
    return (entry for entry in tables()[device] if entry.kernel in launch.KERNELS)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
