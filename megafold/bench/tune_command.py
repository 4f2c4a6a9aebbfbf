"""``megafold tune``: find the best block sizes on this GPU, and keep them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megafold.bench.commands import DTYPES

if TYPE_CHECKING:
    from megafold.bench.cases import Case
    from megafold.bench.search import Best

WORKERS = 8  # each process holds the tensors of a case on the GPU as well


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command; ``func`` takes the arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "tune",
        help="find the best block sizes of the kernels on this GPU",
        description="Tries every candidate of every kernel that an operator launches, prints the "
        "best of each beside the time of the configuration in force, and writes them into a "
        "table. Processes that start afterwards use a table of the package. Minutes for each "
        "shape.",
    )
    parser.add_argument("op", nargs="*", help="operators to tune (default: all)")
    parser.add_argument(
        "--shape",
        nargs="+",
        metavar="SHAPE",
        help='such as "M147456 C128 H512", of one operator (default: those of training, which '
        "bench measures)",
    )
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, "tf32"),
        default="bfloat16",
        help="default: bfloat16; tf32: float32 with products in TF32, whose block sizes are others",
    )
    parser.add_argument("--device", help="cuda, cuda:1 (default: the first GPU)")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(WORKERS, os.cpu_count() or 1),
        help=f"processes that compile (default: one per core, at most {WORKERS})",
    )
    parser.add_argument(
        "--table", type=Path, help="table to write (default: the package's table of this GPU)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="append every trial to DIR/<device>/<operator>_tuning.csv, which the kernel tuner "
        "replays",
    )
    parser.set_defaults(func=_tune)


def _tune(args: argparse.Namespace) -> int:
    """0 where for every kernel some candidate ran."""
    import torch

    import megafold
    from megafold.bench import records, tuning_records
    from megafold.bench.search import add_to_table, check_table, search, table_of
    from megafold.ops.precision import adopt

    device = torch.device(args.device) if args.device else megafold.device()
    if device.type != "cuda" or not torch.cuda.is_available():
        print(
            "megafold tune: needs a GPU, because it times every candidate where it is to run; "
            f"PyTorch {torch.__version__} finds none on this machine",
            file=sys.stderr,
        )
        return 2
    dtype = adopt(args.dtype)
    try:
        if args.workers < 1:
            raise ValueError(f"--workers must be 1 or more, not {args.workers}")
        chosen = _cases(args.op, args.shape, dtype)
        path = args.table or table_of(device)
        check_table(path, device)
    except (OSError, ValueError) as error:
        print(f"megafold tune: {error}", file=sys.stderr)
        return 2
    print(f"{records.device_description(device)}, {args.dtype}, revision {records.revision()}")
    failed = 0
    for case in chosen:
        print(f"\n{case.op}, {case.shape}", flush=True)
        found = search(case, device, dtype, workers=args.workers)
        # Of each case, because it took minutes.
        add_to_table(path, device, [best.entry for best in found])
        if args.out:
            trials = [trial for best in found for trial in best.trials]
            tried = tuning_records.rows(case, dtype, trials, device)
            tuning_records.append(tried, args.out, records.device_name(device))
        _print_best(found)
        failed += sum(not best.ran for best in found)
    print(f"\nwritten to {path}")
    if args.out:
        print(f"trials appended below {args.out / records.device_name(device)}")
    if failed:
        print(f"megafold tune: no candidate ran for {failed} kernels", file=sys.stderr)
    return 1 if failed else 0


def _cases(ops: list[str], shapes: list[str] | None, dtype) -> list[Case]:
    """The cases to tune; of those of training, the ones that launch a kernel with tables.

    Raises:
        ValueError: an unknown operator or shape, or nothing to tune.
    """
    from megafold.bench import cases
    from megafold.bench.launches import OPERATORS, tunables

    unknown = sorted(set(ops) - set(OPERATORS))
    if unknown:
        raise ValueError(f"unknown operator {unknown[0]!r}; choose from {list(OPERATORS)}")
    if shapes:
        if len(ops) != 1:
            raise ValueError("--shape needs exactly one operator")
        chosen = [cases.case(ops[0], shape) for shape in shapes]
        for case in chosen:
            tunables(case, dtype)
        return chosen
    chosen, why = [], None
    for case in (c for op in ops or OPERATORS for c in cases.registered(op, "full")):
        try:
            tunables(case, dtype)
        except ValueError as error:
            why = error
        else:
            chosen.append(case)
    if not chosen:
        raise why
    return chosen


def _print_best(found: list[Best]) -> None:
    width = max(26, *(len(best.kernel) for best in found))
    print(f"  {'kernel':{width}} {'ran':>9} {'before ms':>10} {'best ms':>10} {'gain':>6}  best")
    for best in found:
        ran = f"{best.ran}/{len(best.trials)}"
        kept = " (as before)" if best.config == best.before.config else ""
        print(f"  {best.kernel:{width}} {ran:>9} {best.before_ms:10.4f} {best.ms:10.4f} "
              f"{best.gain:5.2f}x  {best.config}{kept}")  # fmt: skip
        if not best.ran:
            print(f"    none ran: {best.trials[0].note if best.trials else 'no candidate fits'}")
    before, after = sum(best.before_ms for best in found), sum(best.ms for best in found)
    print(f"  {'together':{width}} {'':9} {before:10.4f} {after:10.4f} {before / after:5.2f}x")
