"""``merge_caches``: nothing is lost, and what does not fit together is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megafold import cli
from megafold.data import Cache, DataError, build_cache, examine_cache, merge_caches, sample_path

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """(name of the cache, ids of samples) -> a cache of copies of them; CUT is a broken file."""

    def build(name: str, *ids: str) -> Path:
        folder = tmp_path / f"inputs of {name}"
        folder.mkdir()
        for one in ids:
            if one == "CUT":
                (folder / "CUT.cif.gz").write_bytes(sample_path("1CRN").read_bytes()[:5000])
            else:
                shutil.copy(sample_path(one), folder)
        build_cache(folder, tmp_path / name)
        return tmp_path / name

    return build


def _status(folder: Path) -> dict[str, str]:
    return {e.name: e.status for e in examine_cache(folder)}


def test_parts_of_a_build_give_what_one_build_gives(make, tmp_path) -> None:
    parts = [make("one", "1CRN", "CUT"), make("two", "1AS5")]
    report = merge_caches(parts, tmp_path / "out")
    assert (report.inputs, report.ok, report.failed, report.stale) == (3, 2, 1, 0)
    assert _status(tmp_path / "out") == {"1AS5": "ok", "1CRN": "ok", "CUT": "failed"}
    whole = make("whole", "1CRN", "1AS5", "CUT")
    files = [
        {p.name: p.read_bytes() for p in (f / "entries").iterdir()}
        for f in (whole, tmp_path / "out")
    ]
    assert files[0] == files[1]


def test_the_inputs_are_found_from_where_the_merged_cache_stands(make, tmp_path) -> None:
    source = make("one", "1CRN")
    merge_caches([source], tmp_path / "deep" / "out")
    path, _ = Cache(tmp_path / "deep" / "out").inputs("1CRN")
    assert path == tmp_path / "inputs of one" / "1CRN.cif.gz"


def test_a_cache_is_merged_into_one_that_is_there(make) -> None:
    one, two = make("one", "1CRN"), make("two", "1AS5", "1CRN")
    report = merge_caches([two], one)
    assert (report.ok, report.reused) == (2, 1)
    assert Cache(one).names == ["1AS5", "1CRN"]
    assert Cache(two).names == ["1AS5", "1CRN"]


def test_an_entry_takes_the_place_of_one_not_built_yet(make, tmp_path) -> None:
    half, whole = make("half", "1CRN"), make("whole", "1CRN")
    cache = Cache(half)
    cache.index["1CRN"] |= {"status": "stale", "key": "", "reason": "not built yet"}
    cache.save_index()
    for i, order in enumerate(([half, whole], [whole, half])):
        assert merge_caches(order, tmp_path / f"out{i}").ok == 1


def test_one_name_for_two_contents_is_refused_before_anything_is_written(make, tmp_path) -> None:
    one, two = make("one", "1CRN"), tmp_path / "two"
    (tmp_path / "other").mkdir()
    shutil.copy(sample_path("1AS5"), tmp_path / "other" / "1CRN.cif.gz")
    build_cache(tmp_path / "other", two)
    with pytest.raises(DataError, match=r"one and .*two disagree about 1CRN: ok from .*other name"):
        merge_caches([one, two], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_entry_is_listed_as_stale_with_the_reason(make, tmp_path) -> None:
    source = make("one", "1CRN", "1AS5")
    path = Cache(source).entry_path(Cache(source).index["1CRN"]["key"])
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    report = merge_caches([source], tmp_path / "out")
    assert (report.ok, report.stale, report.inputs) == (1, 1, 2)
    assert "1CRN: stale: " in str(report)
    assert str(report).endswith("2 inputs = 1 ok (0 already there) + 0 failed + 1 stale")
    assert _status(tmp_path / "out") == {"1AS5": "ok", "1CRN": "stale"}


def test_a_merge_that_is_killed_leaves_every_name_and_the_next_one_ends_it(
    make, tmp_path, monkeypatch
) -> None:
    from megafold.data import merging

    def killed(*arguments) -> None:
        raise KeyboardInterrupt

    source = make("one", "1CRN", "CUT")
    with monkeypatch.context() as patch:
        patch.setattr(merging, "_bring", killed)
        with pytest.raises(KeyboardInterrupt):
            merge_caches([source], tmp_path / "out")
    assert _status(tmp_path / "out") == {"1CRN": "stale", "CUT": "stale"}
    merge_caches([source], tmp_path / "out")
    assert _status(tmp_path / "out") == {"1CRN": "ok", "CUT": "failed"}


def test_a_source_that_is_no_cache_is_refused(make, tmp_path) -> None:
    with pytest.raises(DataError, match="not a feature cache"):
        merge_caches([make("one", "1CRN"), tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("ids", "exit_status"), [(("1CRN",), 0), (("1CRN", "CUT"), 1)])
def test_the_command_says_what_became_of_all(ids, exit_status, make, tmp_path, capsys) -> None:
    source, out = make("one", *ids), tmp_path / "out"
    assert cli.main(["cache", "merge", str(source), "--out", str(out)]) == exit_status
    assert f"{len(ids)} inputs = 1 ok" in capsys.readouterr().out


class TestInspect:
    """``megafold cache inspect``."""

    def test_of_a_cache_it_gives_the_numbers(self, make, capsys) -> None:
        folder = make("one", "1CRN", "1AS5", "CUT")
        (folder / "entries" / f"{'0' * 64}.safetensors").write_bytes(b"unused")
        assert cli.main(["cache", "inspect", str(folder)]) == 0
        said = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        tokens = sum(Cache(folder).load(name).num_tokens for name in ("1CRN", "1AS5"))
        assert {k: said[k] for k in ("inputs", "ok", "tokens", "entries", "unused entries")} == {
            "inputs": "3", "ok": "2", "tokens": str(tokens), "entries": "3", "unused entries": "1",
        }  # fmt: skip

    def test_of_an_entry_it_lists_inputs_and_arrays(self, make, tmp_path, capsys) -> None:
        folder = make("one", "1CRN")
        assert cli.main(["cache", "inspect", str(folder), "1CRN"]) == 0
        said = capsys.readouterr().out
        assert str(tmp_path / "inputs of one" / "1CRN.cif.gz") in said
        assert "profile" in said
        assert "46 x 32" in said

    def test_what_is_not_there_is_a_sentence(self, make, capsys) -> None:
        folder = make("one", "1CRN", "CUT")
        assert cli.main(["cache", "inspect", str(folder), "9ZZZ"]) == 2
        assert "no structure '9ZZZ'" in capsys.readouterr().err
        assert cli.main(["cache", "inspect", str(folder), "CUT"]) == 2
        assert "CUT was not cached: " in capsys.readouterr().err
