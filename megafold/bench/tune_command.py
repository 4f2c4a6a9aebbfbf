"""``megafold tune``: find the best block sizes on this GPU, and keep them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megafold.bench.commands import DTYPES

if TYPE_CHECKING:
    from megafold.bench.search import Best

WORKERS = 8  # each process holds the tensors of a case on the GPU as well


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command; ``func`` takes the arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "tune",
        help="find the best block sizes of the attention kernels on this GPU",
        description="Tries every candidate of every kernel of evo_attention, prints the best of "
        "each beside the time of the configuration in force, and writes them into a table. "
        "Processes that start afterwards use a table of the package. Minutes for each shape.",
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        metavar="SHAPE",
        help='such as "B1 S384 N384 H4 D32" (default: those of training, which bench measures)',
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--device", help="cuda, cuda:1 (default: the first GPU)")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(WORKERS, os.cpu_count() or 1),
        help=f"processes that compile (default: one per core, at most {WORKERS})",
    )
    parser.add_argument(
        "--out", type=Path, help="table to write (default: the package's table of this GPU)"
    )
    parser.set_defaults(func=_tune)


def _tune(args: argparse.Namespace) -> int:
    """0 where for every kernel some candidate ran."""
    import torch

    import megafold
    from megafold.bench import cases, records
    from megafold.bench.search import add_to_table, check_table, entries, search, table_of

    device = torch.device(args.device) if args.device else megafold.device()
    if device.type != "cuda" or not torch.cuda.is_available():
        print(
            "megafold tune: needs a GPU, because it times every candidate where it is to run; "
            f"PyTorch {torch.__version__} finds none on this machine",
            file=sys.stderr,
        )
        return 2
    dtype = getattr(torch, args.dtype)
    try:
        if args.workers < 1:
            raise ValueError(f"--workers must be 1 or more, not {args.workers}")
        if args.shape:
            chosen = [cases.case("evo_attention", shape) for shape in args.shape]
        else:
            chosen = cases.registered("evo_attention", "full")
        path = args.out or table_of(device)
        check_table(path, device)
    except (OSError, ValueError) as error:
        print(f"megafold tune: {error}", file=sys.stderr)
        return 2
    print(f"{records.device_description(device)}, {dtype}, revision {records.revision()}")
    failed = 0
    for case in chosen:
        print(f"\n{case.op}, {case.shape}", flush=True)
        found = search(case, device, dtype, workers=args.workers)
        add_to_table(path, device, entries(found, case, dtype))  # of each case: it took minutes
        _print_best(found)
        failed += sum(not best.ran for best in found)
    print(f"\nwritten to {path}")
    if failed:
        print(f"megafold tune: no candidate ran for {failed} kernels", file=sys.stderr)
    return 1 if failed else 0


def _print_best(found: list[Best]) -> None:
    print(f"  {'kernel':26} {'ran':>9} {'before ms':>10} {'best ms':>10} {'gain':>6}  best")
    for best in found:
        ran = f"{best.ran}/{len(best.trials)}"
        kept = " (as before)" if best.config == best.before.config else ""
        print(f"  {best.kernel:26} {ran:>9} {best.before_ms:10.4f} {best.ms:10.4f} "
              f"{best.gain:5.2f}x  {best.config}{kept}")  # fmt: skip
        if not best.ran:
            print(f"    none ran: {best.trials[0].note if best.trials else 'no candidate fits'}")
    before, after = sum(best.before_ms for best in found), sum(best.ms for best in found)
    print(f"  {'together':26} {'':9} {before:10.4f} {after:10.4f} {before / after:5.2f}x")
