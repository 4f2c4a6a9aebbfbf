"""Compile a Triton kernel for GPUs that are not here, and read what the compiler made of it.

Triton's wheel carries the assemblers for NVIDIA and AMD, so registers, spills and shared memory
of every shipped kernel are known, and tested, on a machine without a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megafold.ops.precision import TF32, name_of
from megafold.ops.variants import KernelVariant

if TYPE_CHECKING:
    import torch

    from megafold.bench.cases import Case
    from megafold.ops.tuning import Config

# Name -> backend, architecture, threads per warp, and the GPU people know.
TARGETS: dict[str, tuple[str, int | str, int, str]] = {
    "sm_80": ("cuda", 80, 32, "NVIDIA A100"),
    "sm_90": ("cuda", 90, 32, "NVIDIA H100, H200"),
    "sm_100": ("cuda", 100, 32, "NVIDIA B200"),
    "gfx90a": ("hip", "gfx90a", 64, "AMD MI250"),
    "gfx942": ("hip", "gfx942", 64, "AMD MI300X"),
}

# Part of a device's name in the tables of block sizes -> its target.
_KNOWN_AS = {
    "a100": "sm_80",
    "h100": "sm_90",
    "h200": "sm_90",
    "b200": "sm_100",
    "mi250": "gfx90a",
    "mi300x": "gfx942",
}

MOST_WORKERS = 5  # processes that compile at once

# The modules that ship kernels; each has variants() -> list[KernelVariant].
KERNEL_MODULES = (
    "megafold.ops.evo_attention.variants",
    "megafold.ops.transition.variants",
    "megafold.ops.layer_norm_linear.variants",
    "megafold.ops.gated_linear.variants",
    "megafold.ops.gated.variants",
    "megafold.ops.adaptive_layer_norm.variants",
    "megafold.ops.triangle_multiplication.variants",
    "megafold.ops.triangle_attention.variants",
    "megafold.ops.stepwise.variants",
)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel for one GPU."""

    kernel: str  # the variant's name
    target: str  # "sm_90"
    gpu: str  # "NVIDIA H100, H200"
    registers: int  # vector registers per thread
    spill_bytes: int  # memory per thread for what did not fit into registers
    shared_bytes: int  # shared memory (LDS) per program
    threads: int  # per program


def shipped(modules: Iterable[str] = KERNEL_MODULES) -> list[KernelVariant]:
    """Every kernel of the library, in every dtype, with the block sizes it ships with."""
    return [v for name in modules for v in importlib.import_module(name).variants()]


def targets_of(variant: KernelVariant) -> tuple[str, ...]:
    """The targets a shipped kernel is for: those of its devices, or all; TF32 is NVIDIA's alone."""
    if not variant.devices:
        nvidia_only = variant.constants.get("PRECISION") == TF32
        return tuple(t for t, (kind, *_) in TARGETS.items() if kind == "cuda" or not nvidia_only)
    return tuple(dict.fromkeys(target_of(device) for device in variant.devices))


def target_of(device: str) -> str:
    """The target of a device, by its name in the tables of block sizes (``"nvidia-h200"``).

    Raises:
        ValueError: a device that no target is known for.
    """
    for part, target in _KNOWN_AS.items():
        if part in device.split("-"):
            return target
    raise ValueError(f"no target is known for device {device!r}; known: {tuple(_KNOWN_AS)}")


def compile_kernel(variant: KernelVariant, target: str) -> Compiled:
    """Compile one kernel ahead of time.

    Args:
        target: a name in ``TARGETS``.

    Raises:
        ValueError: unknown target.
        RuntimeError: TRITON_INTERPRET=1 is set: the interpreter's kernels cannot be compiled.
    """
    _check_target(target)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set; compile in a process without it")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, architecture, warp, gpu = TARGETS[target]
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(variant.signature.items())
        if kind.startswith("*") or name in variant.multiples_of_16
    }
    options = {"num_warps": variant.num_warps}
    if not _is_gluon(variant):
        options["num_stages"] = variant.num_stages
    if variant.max_registers is not None:
        options["maxnreg"] = variant.max_registers
    source = (_gluon_source() if _is_gluon(variant) else ASTSource)(
        variant.kernel,
        signature=dict(variant.signature),
        constexprs=dict(variant.constants),
        attrs=aligned,
    )
    built = triton.compile(source, target=GPUTarget(backend, architecture, warp), options=options)
    if backend == "cuda":
        registers, spill_bytes = _nvidia_usage(built.asm["cubin"])
    else:
        registers, spill_bytes = _amd_usage(built.asm["amdgcn"])
    return Compiled(
        kernel=variant.name,
        target=target,
        gpu=gpu,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=built.metadata.shared,
        threads=built.metadata.num_warps * warp,  # those of warps with other roles as well
    )


def _is_gluon(variant: KernelVariant) -> bool:
    return getattr(variant.kernel, "is_gluon", bool)()


def _gluon_source() -> Any:
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def compile_all(
    targets: Iterable[str] = tuple(TARGETS), modules: Iterable[str] = KERNEL_MODULES
) -> list[Compiled]:
    """Compile every shipped kernel for every target it is for, in processes of their own.

    So it works where this process interprets Triton, too.

    Args:
        targets: names in ``TARGETS``.
        modules: those in ``KERNEL_MODULES`` whose kernels to compile.

    Raises:
        ValueError: unknown target.
        RuntimeError: a kernel does not compile; carries the compiler's message.
    """
    targets = tuple(targets)
    for target in targets:
        _check_target(target)
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    of = {"targets": targets, "modules": tuple(modules), "shares": workers}
    with ThreadPoolExecutor(workers) as pool:
        made = pool.map(lambda share: _apart("shipped", share=share, **of), range(workers))
        found = [compiled for share in made for compiled in share]
    return sorted(found, key=lambda compiled: targets.index(compiled.target))


def compile_config(
    of: Case, kernel: str, config: Config, dtype: torch.dtype, target: str
) -> Compiled:
    """Compile one kernel that a case launches with a configuration, in a process of its own.

    Products of fp32 are as torch is set to here.

    Args:
        of: whose sizes the kernel is compiled for.
        kernel: ``"evo_attention.forward"`` and the like.
        target: a name in ``TARGETS``.

    Raises:
        ValueError: unknown target.
        RuntimeError: it does not compile, or the case does not launch it; carries the message.
    """
    _check_target(target)
    (compiled,) = _apart(
        "config",
        op=of.op,
        shape=of.shape,
        kernel=kernel,
        config=asdict(config),
        operands=name_of(dtype),
        target=target,
    )
    return compiled


def _apart(work: str, **arguments: object) -> list[Compiled]:
    """Let a fresh process do what ``_WORK`` names, one that does not interpret Triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "megafold.bench.compile", work, json.dumps(arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"compiling ahead of time failed:\n{run.stderr.strip()[-4000:]}")
    return [Compiled(**json.loads(line)) for line in run.stdout.splitlines()]


def _compile_shipped(
    targets: list[str], modules: list[str], share: int, shares: int
) -> Iterator[Compiled]:
    pairs = ((one, target) for one in shipped(modules) for target in targets_of(one))
    # Shared pair by pair: one GPU's kernels take as long as those of all others together.
    wanted = (pair for pair in pairs if pair[1] in targets)
    for one, target in islice(wanted, share, None, shares):
        yield compile_kernel(one, target)


def _compile_config(
    op: str, shape: str, kernel: str, config: dict[str, Any], operands: str, target: str
) -> Iterator[Compiled]:
    from megafold.bench.cases import case
    from megafold.bench.launches import variant
    from megafold.ops.precision import adopt
    from megafold.ops.tuning import Config

    made = variant(case(op, shape), kernel, Config(**config), adopt(operands))
    yield compile_kernel(made, target)


_WORK = {"shipped": _compile_shipped, "config": _compile_config}


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; choose one of {tuple(TARGETS)}")


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread, as cuobjdump reports them."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(cuobjdump), "--dump-resource-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number(r"\bREG:(\d+)", report), _number(r"\bSTACK:(\d+)", report)


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers (accumulation registers included) and bytes of scratch per thread."""
    registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
    return registers, _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly)


def _number(pattern: str, report: str) -> int:
    found = re.search(pattern, report)
    if found is None:
        raise RuntimeError(f"the compiler's report has no {pattern!r}:\n{report[:2000]}")
    return int(found[1])


if __name__ == "__main__":
    for made in _WORK[sys.argv[1]](**json.loads(sys.argv[2])):
        print(json.dumps(asdict(made)), flush=True)
