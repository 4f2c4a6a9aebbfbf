"""Search for the block sizes of the kernels on this GPU, and write them as a table."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from megafold.atomic import atomic_write
from megafold.bench import accuracy, measure
from megafold.bench.cases import Case, case
from megafold.bench.occupancy import shortage
from megafold.ops.evo_attention import launch
from megafold.ops.tuning import Config, Entry, use_config

SEED = 20
# More registers for one tile of logits than this spill; fewer leave the tensor cores idle.
TILE_REGISTERS = (8, 64)


@dataclass(frozen=True)
class Trial:
    """One configuration of one kernel, tried."""

    kernel: str
    config: Config
    ms: float | None  # median; None where it did not run, was wrong, or spilt
    note: str = ""  # why there is no time


@dataclass(frozen=True)
class KernelRun:
    """One kernel on the inputs of one case: what to call, and what it writes."""

    kernel: str
    call: Callable[[], object]  # returns what Triton compiled
    outputs: tuple[torch.Tensor, ...]


def candidates(kernel: str, bits: int, rows_per_bias: int) -> list[Config]:
    """The configurations worth trying for operands of ``bits`` bits."""
    if bits == 16:
        blocks, warps, stages = (64, 128), (4, 8), (1, 2, 3)
        keys = (32, 64, 128)
    else:
        blocks, warps, stages = (16, 32, 64), (4, 8), (1, 2)
        keys = (16, 32, 64)
    rows = [r for r in (1, 2, 4) if r <= rows_per_bias]
    if kernel == launch.GRAD_KV:
        blocks, keys = keys, blocks
    # More programs at a time hide more waiting; NVIDIA's compiler can be held to fewer registers.
    registers = (None, 96, 128, 168) if bits == 16 and torch.version.hip is None else (None,)
    found = []
    for block_q, block_k, num_warps, num_stages in itertools.product(blocks, keys, warps, stages):
        low, high = TILE_REGISTERS
        if not low <= block_q * block_k // (32 * num_warps) <= high:
            continue
        tile = {"BLOCK_Q": block_q, "BLOCK_K": block_k}
        shapes = [tile] if kernel == launch.GRAD_BIAS else [{"ROWS": r, **tile} for r in rows]
        if kernel == launch.GRAD_KV:
            shapes = [{**one, "KEYS_FIRST": first} for one in shapes for first in (0, 1)]
        found += [
            Config(one, num_warps, num_stages, limit) for one in shapes for limit in registers
        ]
    return found


def runs(of: Case, device: torch.device, dtype: torch.dtype) -> list[KernelRun]:
    """Every kernel of EvoAttention on the inputs of a case.

    Raises:
        ValueError: the case is of an operator that has no tables.
    """
    if of.op != "evo_attention":
        raise ValueError(f"{of.op} has no kernels with tables of block sizes; evo_attention has")
    generator = torch.Generator().manual_seed(SEED)
    inputs = of.make_inputs(device, dtype, generator)
    q, k, v, mask, bias = (inputs[name] for name in ("q", "k", "v", "mask", "pair_bias"))
    grad = torch.randn(of.output_shape, generator=generator).to(device, dtype)
    scale = q.shape[-1] ** -0.5
    problem = launch.Problem.of(q, k, bias)
    out, stats = launch.forward(q, k, v, mask, bias, scale)
    delta = torch.empty_like(stats[0])
    of_q, of_k, of_v, of_bias = (torch.empty_like(t) for t in (q, k, v, bias))
    alone = of_bias if problem.rows_per_bias == 1 else None
    operands = (problem, q, k, v, launch.spread(mask, problem), bias)
    found = [
        KernelRun(
            launch.FORWARD,
            lambda: launch.launch_forward(*operands, out, stats, scale),
            (out, stats),
        ),
        KernelRun(
            launch.GRAD_Q,
            lambda: launch.launch_grad_q(*operands, out, stats, grad, delta, of_q, alone, scale),
            (of_q, delta) if alone is None else (of_q, delta, alone),
        ),
        KernelRun(
            launch.GRAD_KV,
            lambda: launch.launch_grad_kv(*operands, stats, grad, delta, of_k, of_v, scale),
            (of_k, of_v),
        ),
    ]
    if alone is None:
        found.append(
            KernelRun(
                launch.GRAD_BIAS,
                lambda: launch.launch_grad_bias(*operands, stats, grad, delta, of_bias, scale),
                (of_bias,),
            )
        )
    return found


def compile_candidates(
    of: Case, kernels: Iterable[str], device: torch.device, dtype: torch.dtype, workers: int
) -> None:
    """Fill Triton's cache with every candidate, several processes at a time.

    What does not compile here fails again, with its reason, when it is tried.
    """
    work = [
        (of.op, of.shape, str(device), str(dtype).removeprefix("torch."), kernel, share, workers)
        for kernel in kernels
        for share in range(workers)
    ]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_compile_share, work, chunksize=1)


def _compile_share(work: tuple[str, str, str, str, str, int, int]) -> None:
    op, shape, device_name, dtype_name, kernel, share, workers = work
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    for run in runs(case(op, shape), device, dtype):
        if run.kernel != kernel:
            continue
        for config in _candidates_of(case(op, shape), kernel, dtype)[share::workers]:
            try:
                with use_config(kernel, config):
                    run.call()
            except Exception:  # tried again, and reported, by `try_candidates`
                continue


def _candidates_of(of: Case, kernel: str, dtype: torch.dtype) -> list[Config]:
    q, bias = of.arguments["q"].shape, of.arguments["pair_bias"].shape
    per_bias = q[1] if bias[0] == q[0] and q[0] > 1 else q[0] * q[1]
    return candidates(kernel, dtype.itemsize * 8, per_bias)


def try_candidates(
    of: Case,
    device: torch.device,
    dtype: torch.dtype,
    *,
    kernels: Iterable[str] = launch.KERNELS,
    seconds: float = 0.02,
) -> Iterator[Trial]:
    """Run every candidate of every kernel of a case; wrong results and spills have no time.

    A result is right if it is that of the configuration in force, but for one rounding.
    """
    for run in runs(of, device, dtype):
        run.call()  # also where it is not tried: later kernels read what it writes
        if run.kernel not in kernels:
            continue
        right = [t.clone() for t in run.outputs]
        for config in _candidates_of(of, run.kernel, dtype):
            yield _try(run, config, right, device, seconds)
        run.call()  # later kernels read what this one wrote


def try_config(
    of: Case,
    kernel: str,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    *,
    seconds: float = 0.2,
) -> Trial:
    """Run one configuration of one kernel, as :func:`try_candidates` runs each.

    Raises:
        ValueError: the case does not launch this kernel.
    """
    of_case = runs(of, device, dtype)
    names = [run.kernel for run in of_case]
    if kernel not in names:
        raise ValueError(f"{of.shape} does not launch {kernel!r}; it launches {', '.join(names)}")
    for run in of_case[: names.index(kernel) + 1]:
        run.call()  # later kernels read what earlier ones wrote
    return _try(run, config, [t.clone() for t in run.outputs], device, seconds)


def _try(
    run: KernelRun, config: Config, right: list[torch.Tensor], device: torch.device, seconds: float
) -> Trial:
    for output in run.outputs:
        output.fill_(float("nan"))
    with use_config(run.kernel, config):
        try:
            compiled = run.call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except OutOfResources as error:
            why = shortage(error.name, error.required, error.limit)
            return Trial(run.kernel, config, None, why)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            return Trial(run.kernel, config, None, reason)
        spills = getattr(compiled, "n_spills", 0)
        if spills:
            return Trial(run.kernel, config, None, f"{spills} registers spilt")
        for output, expected in zip(run.outputs, right, strict=True):
            error, _ = accuracy.relative_errors(output, expected.double())
            if error > torch.finfo(output.dtype).eps * 8:
                return Trial(run.kernel, config, None, f"wrong: differs by {error:.1e}")
        timing = measure.time_call(run.call, device, seconds=seconds, min_repeats=7)
    return Trial(run.kernel, config, timing.ms)


def entry(trial: Trial, of: Case, dtype: torch.dtype) -> Entry:
    """The best trial of a kernel as a row of a table."""
    batch, rows, queries, _, width = of.arguments["q"].shape
    shared = of.arguments["pair_bias"].shape[0] == 1
    sizes = {
        "D": launch.padded_width(width),
        "N": queries,
        "K": of.arguments["k"].shape[2],
        "R": batch * rows if shared else rows,
    }
    blocks, config = dict(trial.config.blocks), trial.config
    return Entry(
        trial.kernel, dtype.itemsize * 8, sizes, blocks, config.num_warps, config.num_stages,
        config.max_registers,
    )  # fmt: skip


def merged(old: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """Entries with those of the same kernel, bits and sizes replaced by new ones."""
    by_key = {(e.kernel, e.bits, tuple(sorted(e.sizes.items()))): e for e in (*old, *new)}
    return list(by_key.values())


def write_table(path: Path | str, devices: Iterable[str], entries: Iterable[Entry]) -> None:
    """Write a table, one line for each entry, in one step."""
    ordered = sorted(entries, key=lambda e: (e.kernel, e.bits, *sorted(e.sizes.items())))
    lines = ",\n".join(f"    {json.dumps(asdict(entry))}" for entry in ordered)
    text = f'{{\n  "devices": {json.dumps(list(devices))},\n  "entries": [\n{lines}\n  ]\n}}\n'
    atomic_write(Path(path), text.encode())
