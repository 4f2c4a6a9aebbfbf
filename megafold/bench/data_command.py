"""``megafold bench-data``: what the data pipeline costs, beside other designs of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command; ``func`` takes the arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "bench-data",
        help="measure the feature cache beside other stores, and the steps of a data loader",
        description="Keeps the features of some structures in each store and prints what that "
        "costs; then makes training examples afresh, by the paper's design and by ours, and "
        "prints the time of each stage and the wait for an example with 0, 1, ... workers. "
        "Crops are drawn of the first structure. A run takes some minutes.",
    )
    parser.add_argument("structures", nargs="+", type=Path, help="structure files")
    parser.add_argument(
        "--msa", required=True, type=Path, metavar="ALIGNMENTS", help="NAME_CHAIN.a3m[.gz]"
    )
    parser.add_argument(
        "--rows", type=int, default=16_000, help="alignments are made this deep (default: 16000)"
    )
    parser.add_argument("--crop", type=int, default=384, help="tokens of a crop (default: 384)")
    parser.add_argument("--workers", type=int, default=2, help="up to so many (default: 2)")
    parser.add_argument("--out", type=Path, help="append the rows below this folder")
    parser.set_defaults(func=_bench_data)


def _bench_data(args: argparse.Namespace) -> int:
    import tempfile

    import torch

    from megafold.bench import records, rows
    from megafold.bench.data_inputs import prepare_input
    from megafold.bench.data_pipeline import Plan, measure_steps, measure_stores
    from megafold.bench.store_records import StepRecord, StoreRecord
    from megafold.data.errors import DataError

    torch.set_num_threads(1)  # "on one core", and as many as a loader's worker has
    plan = Plan(crop=args.crop, workers=args.workers, readers=max(1, args.workers))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            inputs = [prepare_input(p, args.msa, folder, args.rows) for p in args.structures]
        except DataError as error:
            print(f"megafold bench-data: {error}", file=sys.stderr)
            return 2
        for given in inputs:
            for reason in given.left_out:
                print(f"left out: {reason}")
        entries = {given.name: given.features() for given in inputs}
        first = entries[inputs[0].name]
        print(
            f"{len(entries)} entries; crops of {plan.crop} tokens and {plan.rows} rows of "
            f"{inputs[0].name}: {first}, of the rows {inputs[0].made_up_rows} made up\n"
        )
        print(f"{'store':12} {'build s':>8} {'MB':>8} {'crop ms':>9} {'quartiles':>17} "
              f"{'crops/s':>8} {'torn':>5} {'wrong':>6}")  # fmt: skip
        stores = []
        for record in measure_stores(inputs[0], entries, folder, plan):
            print(_store_line(record), flush=True)
            stores.append(record)
        print(f"\ncrops/s of {plan.readers} processes together; torn and wrong: of {plan.kills} "
              f"kills while writing\n\n{'design':12} {'stage':11} {'workers':>7} {'ms':>10} "
              f"{'quartiles':>19}")  # fmt: skip
        steps = []
        for record in measure_steps(inputs[0], first, folder, plan):
            print(f"{record.design:12} {record.stage:11} {record.workers:7} {record.ms:10.2f} "
                  f"{record.ms_q1:9.2f}{record.ms_q3:10.2f}", flush=True)  # fmt: skip
            steps.append(record)
    if args.out:
        name = records.device_name("cpu")
        for kind, measured in ((StoreRecord, stores), (StepRecord, steps)):
            for path in rows.append(kind, measured, args.out, name):
                print(f"appended to {path}")
    return 0


def _store_line(r) -> str:
    def number(value, width: int, digits: int) -> str:
        return f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"

    return (
        f"{r.store:12} {number(r.build_s, 8, 2)} {number(r.size_mb, 8, 1)} {r.draw_ms:9.2f} "
        f"{r.draw_ms_q1:8.2f}{r.draw_ms_q3:9.2f} {number(r.draws_per_s, 8, 1)} "
        f"{number(r.torn, 5, 0)} {number(r.wrong, 6, 0)}"
    )
