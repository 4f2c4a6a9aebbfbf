"""``megafold bench-step``: what a training step of the whole model costs."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command; ``func`` takes the arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "bench-step",
        help="measure a training step of the model, beside PyTorch's operators",
        description="Forward, backward and update of one crop of a bundled entry, by the operators "
        "of megafold.ops, by PyTorch's (eager), and by PyTorch's with each block under "
        "torch.compile (compile). Prints a line for each; --out appends the rows to "
        "DIR/<device>/train_step.csv, which `megafold compare train_step` reads.",
    )
    parser.add_argument("entry", help="a bundled entry, see `megafold samples`")
    parser.add_argument("--tokens", type=int, nargs="+", required=True, help="of the crops")
    parser.add_argument(
        "--alignment", type=int, metavar="ROWS",
        help="rows of alignment, drawn at random (default: the entry's own)",
    )  # fmt: skip
    parser.add_argument("--model", default="small", help="configuration (default: small)")
    parser.add_argument(
        "--impl", nargs="+", help="default: megafold, eager and, of steps not captured, compile"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on GPU")
    parser.add_argument(
        "--captured",
        action="store_true",
        help="replay steps as CUDA graphs",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep what blocks compute for the backward pass, where it would be computed again",
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement (default: 3)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--out", type=Path, help="append the rows below this folder")
    parser.set_defaults(func=_bench_step)


def _bench_step(args: argparse.Namespace) -> int:
    """0 where every step fitted into memory."""
    import torch

    import megafold
    from megafold import data
    from megafold.bench import records
    from megafold.bench.training import IMPLEMENTATIONS, step_costs, with_alignment
    from megafold.model.config import config_from_name

    try:
        device = megafold.device(args.device)
        config_from_name(args.model)
        possible = [name for name in IMPLEMENTATIONS if name != "compile" or not args.captured]
        chosen = args.impl or possible
        unknown = sorted(set(chosen) - set(IMPLEMENTATIONS))
        if unknown:
            raise ValueError(f"unknown implementation {unknown}; choose from {IMPLEMENTATIONS}")
        crops = [data.example_batch(args.entry.upper(), crop=n) for n in args.tokens]
        if args.alignment is not None:
            crops = [with_alignment(crop, args.alignment) for crop in crops]
    except (OSError, ValueError) as error:
        print(f"megafold bench-step: {error}", file=sys.stderr)
        return 2
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    around, missed = records.environment(device), 0
    print(f"{around.device}, {dtype}, revision {around.revision}")
    for crop in crops:
        for implementation in chosen:
            torch.compiler.reset()
            gc.collect()  # what the last model and its recordings held
            if device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                (cost,) = step_costs(
                    [crop], args.model, device, checkpointing=not args.keep,
                    captured=args.captured, implementation=implementation,
                    bfloat16=dtype == "bfloat16", seconds=args.seconds, around=around,
                )  # fmt: skip
            except ValueError as error:
                print(f"megafold bench-step: {error}", file=sys.stderr)
                return 2
            except (MemoryError, torch.OutOfMemoryError) as error:
                missed += 1
                what = str(error).splitlines()[0]
                print(f"{args.model} N{crop.num_tokens} {implementation}: too large: {what}")
                continue
            print(
                f"{cost.shape} {implementation}: {cost.ms:.0f} ms ({cost.ms_q1:.0f} to "
                f"{cost.ms_q3:.0f}), peak {cost.peak_mb:.0f} MB",
                flush=True,
            )
            if args.out:  # at once: a step of a large model takes minutes
                records.append([cost], args.out, records.device_name(device))
    return 1 if missed else 0
