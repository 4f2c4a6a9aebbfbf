"""Many damaged inputs at once: each is counted with its reason, none stops the build."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megafold import cli
from megafold.data import BuildReport, Cache, build_cache, sample_alignments, sample_path

INPUTS = 200  # of each kind of damage in turn; besides them the names below
SEED = 21

WHOLE = sample_path("1CRN").read_bytes()
TEXT = gzip.decompress(WHOLE).decode()
THREE = re.sub(r"(?m)^ATOM .* [A-Z]{3} A 1 (?![123] ).*\n", "", TEXT).encode()
ALIGNED = sample_path("102M").read_bytes()
ALIGNMENT = sample_alignments("102M")["A"].read_bytes()
ROWS = gzip.decompress(ALIGNMENT).decode().split("\n>")[:20]

NAMES = (
    "with space", " ", "-dash", "--json", "..", "...", ".hidden", "ünïcødé", "蛋白质🧬", "a" * 230,
    "line\nend", "tab\tand \x1b[31mred", "quote'\"`", "$(touch x)", "%s{0}", "a;b|c&d", "..\\..\\x",
    "*", "\udcff", "NUL", "a_b_", "cif.cif",
)  # fmt: skip

OK, FAILED, EXCLUDED = {"ok"}, {"failed"}, {"excluded"}
# The damage may hit what is not looked at, and a text cut between two atoms shows no damage.
ANY = OK | FAILED | EXCLUDED
# Of each damage: what is written for the structure (file ending, bytes) and for its alignment
# (None: no such file), and what may become of it.
Damaged = tuple[str, bytes, bytes | None, set[str]]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(1, len(content) - 1)]


def _flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _with_number(rng: random.Random) -> bytes:
    """One number of the entry, or the same one in each row, is made a huge one."""
    lines = TEXT.splitlines()
    numeric = [i for i, line in enumerate(lines) if re.search(r"(?<= )-?\d+(\.\d+)?(?= )", line)]
    atoms = [i for i in numeric if lines[i].startswith("ATOM")]
    huge = rng.choice(("1e30", "1e300", "9" * 30, "-99999999999", "2147483648", "nan", "-inf"))
    at = rng.choice(rng.choice((numeric, atoms)))
    column = rng.choice(
        [i for i, f in enumerate(lines[at].split()) if re.fullmatch(r"-?[\d.]+", f)]
    )
    for i in atoms if at in atoms and rng.random() < 0.3 else [at]:
        fields = lines[i].split(" ")
        places = [place for place, field in enumerate(fields) if field]
        fields[places[column]] = huge
        lines[i] = " ".join(fields)
    return "\n".join(lines).encode()


def _text(rows: list[str]) -> bytes:
    return gzip.compress("\n>".join(rows).encode("utf-8"), mtime=0)


def _with_row(change: Callable[[str], str], rng: random.Random, first: int = 1) -> bytes:
    """The alignment with the letters of one row changed."""
    rows = list(ROWS)
    at = rng.randrange(first, len(rows))
    head, _, letters = rows[at].partition("\n")
    rows[at] = f"{head}\n{change(letters)}"
    return _text(rows)


def _structure(ending: str, content: bytes, may_be: set[str]) -> Damaged:
    """A damaged structure, with an alignment that would fit it."""
    query = "TTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN"
    return ending, content, _text([f">query\n{query}"]), may_be


def _alignment(content: bytes | None, may_be: set[str]) -> Damaged:
    """A good structure with a damaged alignment."""
    return ".cif.gz", ALIGNED, content, may_be


DAMAGES: dict[str, Callable[[random.Random], Damaged]] = {
    "structure cut": lambda rng: _structure(".cif.gz", _cut(WHOLE, rng), FAILED),
    "structure's text cut": lambda rng: _structure(".cif", _cut(TEXT.encode(), rng), ANY),
    "structure flipped": lambda rng: _structure(".cif.gz", _flipped(WHOLE, rng), ANY),
    "structure's text flipped": lambda rng: _structure(".cif", _flipped(TEXT.encode(), rng), ANY),
    "structure empty": lambda rng: _structure(
        *rng.choice(
            [(".cif", b""), (".bcif", b""), (".cif.gz", b""), (".cif.gz", gzip.compress(b""))]
        ),
        FAILED,
    ),
    "structure random": lambda rng: _structure(
        rng.choice((".cif", ".bcif", ".cif.gz", ".bcif.gz")), rng.randbytes(3000), FAILED
    ),
    "structure of another kind": lambda rng: _structure(".bcif.gz", WHOLE, FAILED),
    "structure's components unknown": lambda rng: _structure(
        ".cif", TEXT.replace(rng.choice(("THR", "CYS", "ASN")), "Å1*").encode(), FAILED
    ),
    "structure's number huge": lambda rng: _structure(".cif", _with_number(rng), ANY),
    "structure of three residues": lambda rng: _structure(".cif", THREE, EXCLUDED),
    "structure whole": lambda rng: _structure(".cif.gz", WHOLE, OK),
    "alignment missing": lambda rng: _alignment(None, FAILED),
    "alignment cut": lambda rng: _alignment(_cut(ALIGNMENT, rng), FAILED),
    "alignment flipped": lambda rng: _alignment(_flipped(ALIGNMENT, rng), ANY),
    "alignment's text flipped": lambda rng: _alignment(
        gzip.compress(_flipped("\n>".join(ROWS).encode(), rng)), ANY
    ),
    "alignment empty": lambda rng: _alignment(rng.choice((b"", gzip.compress(b""))), FAILED),
    "alignment random": lambda rng: _alignment(rng.randbytes(3000), FAILED),
    "row too short": lambda rng: _alignment(_with_row(lambda row: row[2:], rng), FAILED),
    "row too long": lambda rng: _alignment(_with_row(lambda row: row + "AA", rng), FAILED),
    "row empty": lambda rng: _alignment(_with_row(lambda row: "", rng), FAILED),
    "another query": lambda rng: _alignment(_text([f">q\n{'A' * 154}"]), FAILED),
    "alphabet wrong": lambda rng: _alignment(
        _with_row(lambda row: row[:50] + rng.choice("0*@é漢~") + row[51:], rng, first=0), FAILED
    ),
    "insertion huge": lambda rng: _alignment(
        _with_row(lambda row: row[:50] + "a" * 100_000 + row[50:], rng), OK
    ),
    "description huge": lambda rng: _alignment(
        _text([*ROWS[:5], f"{'x' * 100_000}\n{ROWS[0].splitlines()[1]}"]), OK
    ),
    "line ends of Windows": lambda rng: _alignment(
        gzip.compress("\r\n>".join(ROWS).replace("\r\n", "\n").replace("\n", "\r\n").encode()), OK
    ),
}


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, set[str]]:
    """Name of each input -> what may become of it. They are written here."""
    rng, kinds = random.Random(SEED), list(DAMAGES)
    may_be = {}
    for i in range(INPUTS):
        kind = kinds[i % len(kinds)]
        ending, structure, alignment, may_be[name := f"{i:03} {kind}"] = DAMAGES[kind](rng)
        _write(folder, name, ending, structure, alignment)
    for name in NAMES:
        may_be[name] = OK
        _write(folder, name, ".cif.gz", ALIGNED, ALIGNMENT)
    (folder / "structures" / "a folder.cif").mkdir()
    (folder / "structures" / "a link.cif").symlink_to("to nowhere")
    return may_be | {"a folder": FAILED, "a link": FAILED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "structures").mkdir()
    (folder / "alignments").mkdir()
    return folder


def _write(folder: Path, name: str, ending: str, structure: bytes, alignment: bytes | None) -> None:
    (folder / "structures" / f"{name}{ending}").write_bytes(structure)
    if alignment is not None:
        (folder / "alignments" / f"{name}_A.a3m.gz").write_bytes(alignment)


@pytest.fixture(scope="module")
def built(folder: Path, expected: dict[str, set[str]]) -> BuildReport:
    return build_cache(folder / "structures", folder / "cache", alignments=folder / "alignments")


def test_none_stops_the_build_and_none_is_missing(built, expected) -> None:
    assert {entry.name for entry in built.entries} == set(expected)
    assert built.inputs == len(expected) == built.ok + built.failed + built.excluded


def test_each_becomes_what_its_damage_allows(built, expected) -> None:
    wrong = {
        e.name: (e.status, e.reason) for e in built.entries if e.status not in expected[e.name]
    }
    assert not wrong


def test_each_that_is_not_ok_says_why_in_words_of_ours(built) -> None:
    """Not with the name of a Python exception: what goes wrong was thought of."""
    reasons = {e.name: e.reason for e in built.entries if e.status != "ok"}
    assert all(reasons.values())
    unforeseen = {n: why for n, why in reasons.items() if re.match(r"\w+(Error|Exception): ", why)}
    assert not unforeseen


def test_whatever_is_ok_can_be_loaded(built, folder) -> None:
    cache = Cache(folder / "cache")
    assert cache.names == sorted(e.name for e in built.entries if e.status == "ok")
    for entry in built.entries:
        if entry.status == "ok":
            features = cache.load(entry.name)
            assert np.isfinite(features.positions).all()
            assert features.msa.shape == (entry.rows, entry.tokens)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_doctor_lists_all_of_them(options, built, folder, expected, capsys) -> None:
    assert cli.main(["cache", "doctor", str(folder / "cache"), *options]) == 1
    out = capsys.readouterr().out
    out.encode()  # no file name makes it impossible to print
    if options:
        said = json.loads(out)
        assert {e["name"]: e["status"] for e in said["entries"]} == {
            e.name: e.status for e in built.entries
        }
        assert all((e["status"] == "ok") != bool(e["reason"]) for e in said["entries"])
    else:
        numbers = re.fullmatch(
            r"(?P<inputs>\d+) inputs = (?P<ok>\d+) ok \+ (?P<failed>\d+) failed "
            r"\+ (?P<excluded>\d+) excluded \+ (?P<stale>\d+) stale",
            out.splitlines()[-1],
        )
        said = {status: int(number) for status, number in numbers.groupdict().items()}
        assert len(out.splitlines()) == 1 + len(expected) + 2
    assert said["stale"] == 0
    assert said["inputs"] == said["ok"] + said["failed"] + said["excluded"] == len(expected)
    assert (said["ok"], said["failed"]) == (built.ok, built.failed)
