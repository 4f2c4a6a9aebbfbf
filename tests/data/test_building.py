"""``build_cache`` and ``examine_cache``: past failures, with counts that add up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megafold.data import Cache, DataError, build_cache, examine_cache, sample_path


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Two good entries and two bad ones."""
    folder = tmp_path / "structures"
    folder.mkdir()
    for sample_id in ("1CRN", "1AS5"):
        shutil.copy(sample_path(sample_id), folder)
    (folder / "EMPTY.cif").write_text("")
    (folder / "CUT.cif.gz").write_bytes(sample_path("1CRN").read_bytes()[:5000])
    (folder / "notes.txt").write_text("no structure")
    return folder


def test_bad_inputs_are_counted_and_named_and_the_rest_is_built(inputs, tmp_path) -> None:
    report = build_cache(inputs, tmp_path / "cache")
    assert (report.inputs, report.ok, report.failed, report.reused) == (4, 2, 2, 0)
    assert [e.name for e in report.entries] == ["1AS5", "1CRN", "CUT", "EMPTY"]
    cache = Cache(tmp_path / "cache")
    assert cache.names == ["1AS5", "1CRN"]
    assert set(cache.failures) == {"CUT", "EMPTY"}
    assert str(inputs / "EMPTY.cif") in cache.failures["EMPTY"]
    assert "4 inputs = 2 ok (0 already there) + 2 failed" in str(report)


def test_what_is_there_is_not_made_again(inputs, tmp_path) -> None:
    build_cache(inputs, tmp_path / "cache")
    entries = sorted((tmp_path / "cache" / "entries").iterdir())
    before = [path.stat().st_mtime_ns for path in entries]
    report = build_cache(inputs, tmp_path / "cache")
    assert (report.ok, report.failed, report.reused) == (2, 2, 2)
    assert [path.stat().st_mtime_ns for path in entries] == before


def test_a_failure_is_tried_again_and_can_be_mended(inputs, tmp_path) -> None:
    build_cache(inputs, tmp_path / "cache")
    shutil.copy(sample_path("1LCD"), inputs / "CUT.cif.gz")
    report = build_cache(inputs, tmp_path / "cache")
    assert (report.ok, report.failed) == (3, 1)
    assert Cache(tmp_path / "cache").load("CUT").num_tokens == 74


def test_a_failed_entry_says_why_when_it_is_loaded(inputs, tmp_path) -> None:
    build_cache(inputs, tmp_path / "cache")
    with pytest.raises(DataError, match=r"CUT was not cached: .*truncated"):
        Cache(tmp_path / "cache").load("CUT")


def test_processes_give_what_one_gives(inputs, tmp_path) -> None:
    one = build_cache(inputs, tmp_path / "one")
    two = build_cache(inputs, tmp_path / "two", jobs=2)
    assert [(e.name, e.status, e.key) for e in one.entries] == [
        (e.name, e.status, e.key) for e in two.entries
    ]
    for name in ("1AS5", "1CRN"):
        paths = [Cache(tmp_path / n).entry_path(one.entries[0].key) for n in ("one", "two")]
        assert paths[0].read_bytes() == paths[1].read_bytes(), name


def test_progress_hears_of_every_input(inputs, tmp_path) -> None:
    heard = []
    report = build_cache(inputs, tmp_path / "cache", progress=heard.append)
    assert sorted(e.name for e in heard) == [e.name for e in report.entries]


def test_a_missing_file_is_a_failure_like_another(tmp_path) -> None:
    report = build_cache([sample_path("1CRN"), tmp_path / "gone.cif"], tmp_path / "cache")
    assert (report.ok, report.failed) == (1, 1)
    assert "gone.cif: no such file" in str(report)


def test_a_path_that_no_file_can_have_is_a_failure_like_another(tmp_path) -> None:
    report = build_cache([sample_path("1CRN"), f"{'x' * 300}.cif"], tmp_path / "cache")
    assert (report.ok, report.failed) == (1, 1)
    assert "xxx.cif: no such file" in str(report)


def test_a_name_that_no_terminal_can_show_is_shown_in_other_words(tmp_path) -> None:
    (tmp_path / "a\n\x1b[31m\udcff é.cif").write_text("")
    report = build_cache(tmp_path, tmp_path / "cache")
    shown, total = str(report).splitlines()
    assert shown.startswith(r"a\n\x1b[31m\udcff é: failed: ")
    assert total.startswith("1 inputs")


def test_two_inputs_of_one_name_are_refused(inputs, tmp_path) -> None:
    shutil.copy(inputs / "EMPTY.cif", inputs / "1CRN.cif")
    with pytest.raises(DataError, match="are both called 1CRN"):
        build_cache(inputs, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_folder_without_structures_is_refused(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no structure file"):
        build_cache(tmp_path / "empty", tmp_path / "cache")


class TestAlignments:
    """With ``alignments`` a protein must have one."""

    @pytest.fixture
    def alignments(self, tmp_path: Path) -> Path:
        folder = tmp_path / "alignments"
        folder.mkdir()
        query = "TTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN"
        (folder / "1CRN_A.a3m").write_text(f">q\n{query}\n>h\n{query[::-1]}\n")
        return folder

    def test_they_are_found_by_name_and_chain(self, alignments, tmp_path) -> None:
        report = build_cache(sample_path("1CRN"), tmp_path / "cache", alignments=alignments)
        assert report.entries[0].rows == 2

    def test_a_missing_one_is_a_failure(self, inputs, alignments, tmp_path) -> None:
        report = build_cache(inputs, tmp_path / "cache", alignments=alignments)
        failed = {e.name: e.reason for e in report.entries if e.status == "failed"}
        assert set(failed) == {"1AS5", "CUT", "EMPTY"}
        assert "no alignment for protein chain A: expected a file 1AS5_A.a3m" in failed["1AS5"]

    def test_an_entry_made_without_alignments_is_not_taken_for_one_with(
        self, inputs, alignments, tmp_path
    ) -> None:
        build_cache(inputs, tmp_path / "cache")
        report = build_cache(inputs, tmp_path / "cache", alignments=alignments)
        assert (report.ok, report.failed, report.reused) == (1, 3, 0)

    def test_one_alignment_serves_all_copies_of_a_chain(self, alignments, tmp_path) -> None:
        sequence = "MDIRQGPKEPFRDYVDRFYKTLRAEQASQEVKNWMTETLLVQNANPDCKTILKALGPGATLEEMMTACQG"
        (alignments / "1A8O_A.a3m").write_text(f">q\n{sequence}\n")
        report = build_cache(sample_path("1A8O"), tmp_path / "cache", alignments=alignments)
        assert report.ok == 1

    def test_a_wrong_one_is_a_failure(self, alignments, tmp_path) -> None:
        (alignments / "1CRN_A.a3m").write_text(">q\nACDE\n")
        report = build_cache(sample_path("1CRN"), tmp_path / "cache", alignments=alignments)
        assert "1CRN_A.a3m: the query has 4 residues" in report.entries[0].reason

    def test_two_of_one_chain_are_refused_before_anything_is_built(
        self, alignments, tmp_path
    ) -> None:
        (alignments / "1CRN_A.a3m.gz").write_bytes(b"")
        with pytest.raises(DataError, match=r"1CRN_A\.a3m and .*\.a3m\.gz are both of chain A"):
            build_cache(sample_path("1CRN"), tmp_path / "cache", alignments=alignments)
        assert not (tmp_path / "cache").exists()

    def test_a_missing_folder_is_refused(self, tmp_path) -> None:
        with pytest.raises(DataError, match="gone: no such folder of alignments"):
            build_cache(sample_path("1CRN"), tmp_path / "cache", alignments=tmp_path / "gone")


class TestLock:
    """One build at a time writes to a cache."""

    def test_a_second_build_is_refused_while_one_is_at_work(self, inputs, tmp_path) -> None:
        said = []

        def another(report) -> None:
            with pytest.raises(DataError, match=r"another build is at work here \(process \d+ on"):
                build_cache(inputs, tmp_path / "cache")
            said.append(report.name)

        assert build_cache(inputs, tmp_path / "cache", progress=another).ok == 2
        assert len(said) == 4

    def test_the_next_build_may_begin_when_one_has_failed(self, inputs, tmp_path) -> None:
        def interrupted(report) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build_cache(inputs, tmp_path / "cache", progress=interrupted)
        assert build_cache(inputs, tmp_path / "cache").ok == 2


class TestPlaces:
    """The index finds the inputs again wherever they and the cache have gone."""

    @pytest.fixture
    def made(self, tmp_path, monkeypatch) -> Path:
        """``made/cache`` of ``made/in/1CRN.cif.gz`` and its alignment, by relative paths."""
        (tmp_path / "made" / "in").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "made")
        shutil.copy(sample_path("1CRN"), "in")
        Path("in/1CRN_A.a3m").write_text(">q\nTTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN\n")
        build_cache("in", "cache", alignments="in")
        return tmp_path / "made"

    def _status(self, folder: Path | str) -> str:
        (entry,) = examine_cache(folder)
        return f"{entry.status}: {entry.reason}" if entry.reason else entry.status

    def test_from_another_working_folder(self, made, tmp_path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert self._status("made/cache") == "ok"

    def test_when_all_is_moved_together(self, made, tmp_path) -> None:
        made.rename(tmp_path / "moved")
        assert self._status(tmp_path / "moved" / "cache") == "ok"

    def test_when_the_cache_alone_is_moved(self, made, tmp_path) -> None:
        (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
        (made / "cache").rename(tmp_path / "elsewhere" / "deep" / "cache")
        assert self._status(tmp_path / "elsewhere" / "deep" / "cache") == "ok"

    def test_a_copy_looks_at_the_inputs_beside_it(self, made, tmp_path) -> None:
        shutil.copytree(made, tmp_path / "copy")
        (tmp_path / "copy" / "in" / "1CRN_A.a3m").write_text(">another\n")
        assert self._status(tmp_path / "copy" / "cache").startswith("stale: its inputs or")
        assert self._status(made / "cache") == "ok"

    def test_when_the_inputs_alone_are_moved_a_build_finds_all_made(self, made) -> None:
        (made / "in").rename(made / "out")
        assert "no such file" in self._status("cache")
        report = build_cache("out", "cache", alignments="out")
        assert (report.ok, report.reused) == (1, 1)
        assert self._status("cache") == "ok"

    def test_files_are_called_as_they_were_given(self, made) -> None:
        (made / "in" / "CUT.cif").write_text("")
        report = build_cache("in", "cache").entries[1]
        assert report.path == "in/CUT.cif"
        assert report.reason.startswith("in/CUT.cif: ")


class TestExamine:
    """What ``megafold cache doctor`` shows."""

    def _status(self, folder: Path) -> dict[str, str]:
        return {e.name: e.status for e in examine_cache(folder)}

    def test_every_input_is_listed(self, inputs, tmp_path) -> None:
        build_cache(inputs, tmp_path / "cache")
        assert self._status(tmp_path / "cache") == {
            "1AS5": "ok", "1CRN": "ok", "CUT": "failed", "EMPTY": "failed",
        }  # fmt: skip

    def test_a_changed_input_is_stale(self, inputs, tmp_path) -> None:
        build_cache(inputs, tmp_path / "cache")
        shutil.copy(sample_path("1LCD"), inputs / "1CRN.cif.gz")
        (inputs / "1AS5.cif.gz").unlink()
        stale = {e.name: e.reason for e in examine_cache(tmp_path / "cache") if e.status == "stale"}
        assert "have changed" in stale["1CRN"]
        assert "no such file" in stale["1AS5"]

    @pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda c: c[:-1] + b"\xff"])
    def test_a_damaged_entry_is_stale_and_built_again(self, damage, inputs, tmp_path) -> None:
        build_cache(inputs, tmp_path / "cache")
        cache = Cache(tmp_path / "cache")
        path = cache.entry_path(cache.index["1CRN"]["key"])
        path.write_bytes(damage(path.read_bytes()))
        assert self._status(cache.folder)["1CRN"] == "stale"
        report = build_cache(inputs, cache.folder)
        assert (report.ok, report.reused) == (2, 1)
        assert self._status(cache.folder)["1CRN"] == "ok"

    def test_a_file_of_which_nothing_is_left_is_excluded(self, inputs, tmp_path, water) -> None:
        (inputs / "WET.cif").write_text(water)
        report = build_cache(inputs, tmp_path / "cache")
        assert (report.inputs, report.ok, report.failed, report.excluded) == (5, 2, 2, 1)
        assert str(report).endswith("5 inputs = 2 ok (0 already there) + 2 failed + 1 excluded")
        wet = examine_cache(tmp_path / "cache")[-1]
        assert (wet.name, wet.status) == ("WET", "excluded")
        assert "nothing left after cleaning (removed: {'atoms: water': 1})" in wet.reason
        assert Cache(tmp_path / "cache").names == ["1AS5", "1CRN"]

    def test_inputs_that_a_killed_build_had_not_come_to_are_stale(self, inputs, tmp_path) -> None:
        def killed(report) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build_cache(inputs, tmp_path / "cache", progress=killed)
        assert self._status(tmp_path / "cache") == {
            "1AS5": "ok", "1CRN": "stale", "CUT": "stale", "EMPTY": "stale",
        }  # fmt: skip
        with pytest.raises(DataError, match="1CRN was not cached: not built yet"):
            Cache(tmp_path / "cache").load("1CRN")
        build_cache(inputs, tmp_path / "cache")
        assert "stale" not in self._status(tmp_path / "cache").values()

    def test_an_input_that_cannot_be_read_any_more_is_stale(
        self, inputs, tmp_path, monkeypatch
    ) -> None:
        from megafold.data import cache as module

        def denied(*arguments) -> None:
            raise PermissionError(13, "Permission denied")

        build_cache(inputs, tmp_path / "cache")
        monkeypatch.setattr(module.hashlib, "file_digest", denied)
        stale = {e.name: e.reason for e in examine_cache(tmp_path / "cache") if e.status == "stale"}
        assert set(stale) == {"1AS5", "1CRN"}
        assert stale["1CRN"].endswith("1CRN.cif.gz: cannot be read: Permission denied")

    def test_other_software_makes_everything_stale(self, inputs, tmp_path, monkeypatch) -> None:
        from megafold.data import cache as module

        build_cache(inputs, tmp_path / "cache")
        monkeypatch.setattr(module, "FEATURE_VERSION", 10**6)
        assert set(self._status(tmp_path / "cache").values()) == {"stale", "failed"}
