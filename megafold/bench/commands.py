"""``megafold bench`` and ``megafold compare``: measure the operators and their peers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megafold.bench.compare import Comparison

DTYPES = ("float32", "bfloat16", "float16")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the commands; ``func`` takes the arguments and returns the exit code."""
    _add_bench(subparsers)
    _add_compare(subparsers)


def _add_bench(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure the operators on this machine",
        description="Time, peak memory and error of the operators and of what could be used "
        "instead. Prints a table; --out appends the rows to DIR/<device>/<operator>.csv.",
    )
    parser.add_argument("op", nargs="*", help="operators to measure (default: all)")
    parser.add_argument("--shape", help='one shape, like "B1 S64 N64 H4 D32" (one operator only)')
    parser.add_argument(
        "--scale", choices=("small", "full"), help="registered shapes (default: full on a GPU)"
    )
    parser.add_argument(
        "--impl",
        nargs="+",
        default=None,
        help="implementations (default: every one of the operator)",
    )
    parser.add_argument("--direction", nargs="+", choices=("forward", "full"), default=None)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the first GPU, else cpu)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement (default: 1)")
    parser.add_argument("--out", type=Path, help="append the rows below this folder")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="instead compile every Triton kernel for GPUs that need not be here, "
        "and print registers, spills and shared memory",
    )
    parser.set_defaults(func=_bench)


def _add_compare(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="hold the measurements of the operators to those of their peers",
        description="Prints from the records in data/records the time of every implementation, "
        "the time of the best peer over ours (above 1: ours is faster), our peak memory and that "
        "over FlexAttention's (of attention), eager's (of training steps) or torch.compile's (of "
        "all else). Each line is of one run, the newest that measured ours and a peer.",
    )
    parser.add_argument("op", nargs="?", help="one operator (default: all)")
    parser.add_argument("--device", metavar="FOLDER", help="of the records (default: this device)")
    parser.add_argument("--dtype", choices=DTYPES, help="one dtype (default: all)")
    parser.set_defaults(func=_compare)


def _bench(args: argparse.Namespace) -> int:
    """0 where everything that should run did."""
    return _kernels() if args.kernels else _measure(args)


def _measure(args: argparse.Namespace) -> int:
    import torch

    import megafold
    from megafold.bench import cases, peers, records
    from megafold.bench.run import run

    device = torch.device(args.device) if args.device else megafold.device()
    gpu = device.type == "cuda"
    try:
        if args.shape is None:
            scale = args.scale or ("full" if gpu else "small")
            chosen = [c for op in args.op or cases.SHAPES for c in cases.registered(op, scale)]
        elif len(args.op) == 1:
            chosen = [cases.case(args.op[0], args.shape)]
        else:
            raise ValueError("--shape needs exactly one operator")
        unknown = sorted(set(args.impl or ()) - set(peers.PEERS))
        if unknown:
            raise ValueError(f"unknown implementation {unknown}; choose from {list(peers.PEERS)}")
    except ValueError as error:
        print(f"megafold bench: {error}", file=sys.stderr)
        return 2
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    print(f"{records.device_description(device)}, {dtype}, revision {records.revision()}\n")
    print(f"{'operator, shape':48} {'implementation':14} {'direction':9} {'ms':>9} "
          f"{'quartiles':>19} {'peak MB':>9} {'error':>8}")  # fmt: skip
    measured, failed = [], 0
    directions = args.direction or cases.DIRECTIONS
    for outcome in run(chosen, args.impl, directions, device, dtype, seconds=args.seconds):
        print(_line(outcome), flush=True)
        failed += outcome.failed
        if outcome.record:
            measured.append(outcome.record)
    print(f"\n{len(measured)} measured, {failed} failed")
    if args.out:
        for path in records.append(measured, args.out, records.device_name(device)):
            print(f"appended to {path}")
    return 1 if failed else 0


def _line(outcome) -> str:
    start = (
        f"{outcome.case.op + ', ' + outcome.case.shape:48} {outcome.impl:14} {outcome.direction:9} "
    )
    r = outcome.record
    if r is None:
        return f"{start}{'FAILED: ' if outcome.failed else 'not run: '}{outcome.reason}"
    quartiles = f"{r.ms_q1:.3f} to {r.ms_q3:.3f}"
    error = "unknown" if r.error is None else f"{r.error:.1e}"
    return f"{start}{r.ms:9.3f} {quartiles:>19} {r.peak_mb:9.2f} {error:>8}"


def _kernels() -> int:
    from megafold.bench.compile import compile_all

    compiled = compile_all()
    width = max(len(c.kernel) for c in compiled)
    head = f"{'target':8} {'GPU':20} {'registers':>9} {'spill B':>8} {'shared B':>9}"
    print(f"{'kernel':{width}} {head}")
    for c in compiled:
        print(
            f"{c.kernel:{width}} {c.target:8} {c.gpu:20} {c.registers:9} {c.spill_bytes:8} "
            f"{c.shared_bytes:9}"
        )
    return 0


def _compare(args: argparse.Namespace) -> int:
    """0 where there is something to compare."""
    from megafold.bench import records
    from megafold.bench.compare import compare

    device = args.device or records.device_name()
    try:
        root = records.folder()
        found = [
            r for r in records.read(root, device, args.op) if args.dtype in (None, r.dtype)
        ]  # fmt: skip
    except (FileNotFoundError, ValueError) as error:
        print(f"megafold compare: {error}", file=sys.stderr)
        return 1 if isinstance(error, FileNotFoundError) else 2
    comparisons = compare(found)
    if not comparisons:
        which = (f" of {args.op}" if args.op else "") + (f" in {args.dtype}" if args.dtype else "")
        missing = "run measured megafold beside another implementation" if found else "records"
        others = sorted({path.parent.name for path in root.glob("*/*.csv")} - {device})
        elsewhere = f"; there are some of {', '.join(others)}" if others and not found else ""
        print(f"megafold compare: no {missing}{which} on {device}{elsewhere}", file=sys.stderr)
        return 1
    for title in dict.fromkeys((c.op, c.dtype, c.device) for c in comparisons):
        print(", ".join(title))
        _print_comparisons([c for c in comparisons if (c.op, c.dtype, c.device) == title])
        print()
    print(
        "milliseconds are medians; peer/ours above 1: ours is faster; peak MB: ours, beyond the "
        "inputs;\nmemory: ours over flex's (evo_attention), eager's (train_step) or compile's "
        "(the others);\nwork: the same beyond output and gradients, which all of them hold"
    )
    return 0


def _print_comparisons(comparisons: list[Comparison]) -> None:
    from megafold.bench.compare import OURS
    from megafold.bench.records import IMPLEMENTATIONS

    widths = {
        name: max(9, len(name))
        for name in IMPLEMENTATIONS
        if any(name in c.ms for c in comparisons)
    }
    columns = " ".join(f"{name:>{width}}" for name, width in widths.items())
    print(f"  {'shape':24} {'direction':9} {columns}  {'best peer':14} {'peer/ours':>9} "
          f"{'peak MB':>9} {'memory':>7} {'work':>7}  run")  # fmt: skip
    for c in comparisons:
        times = " ".join(
            f"{c.ms[name]:{width}.3f}" if name in c.ms else f"{'-':>{width}}"
            for name, width in widths.items()
        )
        memory, work = (
            "-" if ratio is None else f"{ratio:.2f}x" for ratio in (c.memory_ratio, c.work_ratio)
        )
        print(f"  {c.shape:24} {c.direction:9} {times}  {c.best_peer:14} {c.speedup:8.2f}x "
              f"{c.peak_mb[OURS]:9.1f} {memory:>7} {work:>7}  {c.date} {c.revision}")  # fmt: skip
