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
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from megafold.ops.variants import KernelVariant

# Name -> backend, architecture, threads per warp, and the GPU people know.
TARGETS: dict[str, tuple[str, int | str, int, str]] = {
    "sm_80": ("cuda", 80, 32, "NVIDIA A100"),
    "sm_90": ("cuda", 90, 32, "NVIDIA H100, H200"),
    "sm_100": ("cuda", 100, 32, "NVIDIA B200"),
    "gfx90a": ("hip", "gfx90a", 64, "AMD MI250"),
    "gfx942": ("hip", "gfx942", 64, "AMD MI300X"),
}

# The modules that ship kernels; each has variants() -> list[KernelVariant].
KERNEL_MODULES = ("megafold.ops.transition.kernels",)

POINTER_ALIGNMENT = 16  # bytes; PyTorch's allocators give more


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


def shipped() -> list[KernelVariant]:
    """Every kernel of the library, in every dtype, with the block sizes it ships with."""
    return [v for name in KERNEL_MODULES for v in importlib.import_module(name).variants()]


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
        (index,): [["tt.divisibility", POINTER_ALIGNMENT]]
        for index, kind in enumerate(variant.signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(
        variant.kernel,
        signature=dict(variant.signature),
        constexprs=dict(variant.constants),
        attrs=aligned,
    )
    built = triton.compile(
        source,
        target=GPUTarget(backend, architecture, warp),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
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
        threads=variant.num_warps * warp,
    )


def compile_all(targets: Iterable[str] = tuple(TARGETS)) -> list[Compiled]:
    """Compile every shipped kernel for every target, in a process of its own.

    So it works where this process interprets Triton, too.

    Raises:
        ValueError: unknown target.
        RuntimeError: a kernel does not compile; carries the compiler's message.
    """
    targets = tuple(targets)
    for target in targets:
        _check_target(target)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "megafold.bench.compile", *targets]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"compiling ahead of time failed:\n{run.stderr[-4000:]}")
    return [Compiled(**json.loads(line)) for line in run.stdout.splitlines()]


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
    for one in sys.argv[1:]:
        for shipped_kernel in shipped():
            print(json.dumps(asdict(compile_kernel(shipped_kernel, one))), flush=True)
