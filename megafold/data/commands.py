"""``megafold samples``, ``megafold fetch`` and ``megafold cache``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps

from megafold.data.errors import DataError

_DASK_TIMEOUT = 10  # seconds to reach a scheduler


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add this module's commands."""
    samples = commands.add_parser("samples", help="list the bundled entries")
    samples.set_defaults(func=_reports_errors(_samples))

    fetch = commands.add_parser("fetch", help="download entries of the Protein Data Bank")
    fetch.add_argument("ids", nargs="+", metavar="ID", help="PDB id, such as 1ubq")
    fetch.add_argument("--out", default="structures", help="folder (default: structures)")
    fetch.add_argument("--base-url", help="another server that has ID.cif.gz")
    fetch.set_defaults(func=_reports_errors(_fetch))

    cache = commands.add_parser("cache", help="features worked out ahead of training")
    actions = cache.add_subparsers(required=True, metavar="ACTION")
    build = actions.add_parser("build", help="featurise structures; failures are listed, not fatal")
    build.add_argument("structures", nargs="+", help="structure files, or folders of them")
    build.add_argument(
        "--msa",
        metavar="ALIGNMENTS",
        help="folder of alignments: NAME_CHAIN.a3m[.gz] or docs/data.md",
    )
    build.add_argument("--out", required=True, metavar="CACHE", help="the cache's folder")
    build.add_argument(
        "--targets",
        action="store_true",
        help="exclude what AlphaFold 3 does not train on: by resolution, chains, release",
    )
    build.add_argument("--jobs", type=int, help="processes (default: 1)")
    build.add_argument("--dask", metavar="ADDRESS", help="build on the Dask cluster of a scheduler")
    build.set_defaults(func=_reports_errors(_build))
    doctor = actions.add_parser(
        "doctor",
        help="say what is in a cache, what failed, what was excluded, what is stale",
        description="Every input as ok, failed, excluded (nothing is left after cleaning) or stale "
        "(to be built again). Exit status 0 where all are ok or excluded, 1 where one is not, 2 "
        "where there is no cache.",
    )
    doctor.add_argument("cache", help="the cache's folder")
    doctor.add_argument("--json", action="store_true", help="one JSON document, for programs")
    doctor.set_defaults(func=_reports_errors(_doctor))
    inspect = actions.add_parser("inspect", help="say what a cache holds, or one entry of it")
    inspect.add_argument("cache", help="the cache's folder")
    inspect.add_argument("name", nargs="?", help="a structure, to list its inputs and arrays")
    inspect.set_defaults(func=_reports_errors(_inspect))
    merge = actions.add_parser(
        "merge",
        help="bring several caches into one",
        description="Every input of every source is in CACHE afterwards; sources stay as they "
        "are. Exit status 0 where all are ok or excluded, 1 where one is not, 2 where two sources "
        "disagree about a name: then nothing is written.",
    )
    merge.add_argument("sources", nargs="+", metavar="SOURCE", help="caches")
    merge.add_argument("--out", required=True, metavar="CACHE", help="the cache's folder")
    merge.set_defaults(func=_reports_errors(_merge))


def _reports_errors(
    command: Callable[[argparse.Namespace], int],
) -> Callable[[argparse.Namespace], int]:
    """Bad input is a sentence and exit status 2, not a traceback."""

    @wraps(command)
    def run(arguments: argparse.Namespace) -> int:
        try:
            return command(arguments)
        except DataError as error:
            print(f"megafold: {error}", file=sys.stderr)
            return 2

    return run


def _samples(arguments: argparse.Namespace) -> int:
    from megafold.data.bundled import samples, samples_directory

    rows = [("id", "tokens", "atoms", "chains", "alignments", "title")]
    for s in samples():
        numbers = (str(s.tokens), str(s.atoms), str(s.chains))
        title = s.title if len(s.title) <= 60 else f"{s.title[:57]}..."
        rows.append((s.id, *numbers, s.alignments or "-", title))
    _print_table(rows)
    print(f"\nin {samples_directory()}")
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from megafold.data.download import RCSB, Unreachable, fetch

    failed = 0
    ids = tqdm(arguments.ids, unit="entry", disable=not sys.stderr.isatty())
    for pdb_id in ids:
        try:
            path = fetch(pdb_id, arguments.out, base_url=arguments.base_url or RCSB)
            tqdm.write(str(path))
        except Unreachable:
            raise
        except DataError as error:
            failed += 1
            tqdm.write(f"megafold: {error}", file=sys.stderr)
    return 1 if failed else 0


def _build(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from megafold.data.building import build_cache, find_structures

    total = len(find_structures(arguments.structures))
    bar = tqdm(total=total, unit="entry", disable=not sys.stderr.isatty())
    with _cluster(arguments.dask), bar:
        report = build_cache(
            arguments.structures,
            arguments.out,
            alignments=arguments.msa,
            targets_only=arguments.targets,
            jobs=arguments.jobs,
            progress=lambda entry: bar.update(),
        )
    print(report)
    return 1 if report.failed else 0


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Send joblib's work to a Dask cluster, where an address is given."""
    if address is None:
        yield
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise DataError("--dask needs Dask: pip install megafold[dask]") from error
    from joblib import parallel_config

    try:
        client = Client(address, timeout=_DASK_TIMEOUT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise DataError(f"no Dask scheduler at {address}: {error}") from error
    with client, parallel_config("dask", client=client):
        yield


def _doctor(arguments: argparse.Namespace) -> int:
    from megafold.data.building import STATUSES, examine_cache, one_line

    entries = examine_cache(arguments.cache)
    counts = {status: sum(e.status == status for e in entries) for status in STATUSES}
    exit_status = 1 if counts["failed"] or counts["stale"] else 0
    if arguments.json:
        about_one_build = ("reused", "seconds")
        rows = [
            {key: value for key, value in asdict(e).items() if key not in about_one_build}
            for e in entries
        ]
        print(json.dumps({"inputs": len(entries), **counts, "entries": rows}, indent=1))
        return exit_status
    rows = [("name", "status", "tokens", "atoms", "rows", "reason")]
    for e in entries:
        numbers = (str(n) if e.status == "ok" else "" for n in (e.tokens, e.atoms, e.rows))
        rows.append((one_line(e.name), e.status, *numbers, one_line(e.reason)))
    _print_table(rows)
    numbers = " + ".join(f"{number} {status}" for status, number in counts.items())
    print(f"\n{len(entries)} inputs = {numbers}")
    return exit_status


def _inspect(arguments: argparse.Namespace) -> int:
    from megafold.data.building import one_line
    from megafold.data.cache import Cache
    from megafold.data.inspection import stored_arrays, summarize_cache

    cache = Cache(arguments.cache)
    if arguments.name is None:
        for label, value in asdict(summarize_cache(cache)).items():
            shown = f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
            print(f"{label.replace('_', ' '):18} {shown}")
        return 0
    rows = [("array", "shape", "dtype", "kB")]
    for array in stored_arrays(cache, arguments.name):
        shape = " x ".join(map(str, array.shape))
        rows.append((array.name, shape, array.dtype, f"{array.kilobytes:,.1f}"))
    structure, alignments = cache.inputs(arguments.name)
    print(f"key        {cache.index[arguments.name]['key']}")
    print(f"structure  {one_line(str(structure))}")
    for chain, path in (alignments or {}).items():
        print(f"alignment  {one_line(f'{chain}: {path}')}")
    print()
    _print_table(rows)
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from megafold.data.merging import merge_caches

    report = merge_caches(arguments.sources, arguments.out)
    print(report)
    return 0 if report.inputs == report.ok + report.excluded else 1


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
