"""``fetch``, from a server on this machine and from none."""

from __future__ import annotations

import gzip
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megafold.data import DataError, fetch, read_structure, sample_path
from megafold.data.download import Unreachable

_ENTRY = sample_path("1CRN").read_bytes()


class _Handler(BaseHTTPRequestHandler):
    """Answers as the path says; counts what it was asked for."""

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1].removesuffix(".cif.gz")
        self.server.asked[name] += 1
        status, body, length = 200, _ENTRY, None
        if name == "404D":
            status, body = 404, b""
        elif name == "403D":
            status, body = 403, b""
        elif (name == "5BSY" and self.server.asked[name] < 3) or name == "5XXX":
            status, body = 503, b""
        elif name == "9CUT":
            length, body = len(_ENTRY), _ENTRY[:5000]
        elif name == "9PRT":
            body = _ENTRY[:5000]
        elif name == "9HTM":
            body = gzip.compress(b"<html>sorry</html>")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server():
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    httpd.asked = Counter()
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def get(server, tmp_path):
    def run(pdb_id: str, **options):
        url = f"http://127.0.0.1:{server.server_address[1]}"
        return fetch(pdb_id, tmp_path, base_url=url, wait=0.01, **options)

    return run


def test_an_entry_is_downloaded_whole(get) -> None:
    path = get("1crn")
    assert path.name == "1CRN.cif.gz"
    assert path.read_bytes() == _ENTRY
    assert len(read_structure(path).layout) == 327


def test_an_entry_that_is_there_is_not_asked_for_again(get, server) -> None:
    get("1crn")
    get("1CRN")
    assert server.asked == {"1CRN": 1}


def test_the_long_form_of_an_id_is_taken(get) -> None:
    assert get("pdb_00001crn").name == "pdb_00001crn.cif.gz"


def test_a_busy_server_is_asked_again(get, server) -> None:
    assert get("5bsy").exists()
    assert server.asked["5BSY"] == 3


@pytest.mark.parametrize(
    ("pdb_id", "cause", "asked"),
    [
        ("404d", "404D.cif.gz: no such entry", 1),
        ("403d", "the server answered 403", 1),
        ("5xxx", r"the server answered 503 \(tried 4 times\)", 4),
        ("9cut", r"IncompleteRead.*\(tried 4 times\)", 4),
        ("9prt", "not a whole gzip file", 1),
        ("9htm", "not an mmCIF file", 1),
    ],
)
def test_what_goes_wrong_is_said_and_leaves_no_file(
    pdb_id, cause, asked, get, server, tmp_path
) -> None:
    with pytest.raises(DataError, match=cause):
        get(pdb_id)
    assert server.asked[pdb_id.upper()] == asked
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "pdb_id", ["", "1ub", "1ubqq", "ubq1", "../x", "1u/q", "1u.q", "1ubq\n", "pdb_1", "1ub%"]
)
def test_what_is_no_pdb_id_is_never_asked_for(pdb_id, get, server, tmp_path) -> None:
    with pytest.raises(DataError, match="is not a PDB id"):
        get(pdb_id)
    assert not server.asked
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_the_error_points_to_the_samples(tmp_path) -> None:
    with pytest.raises(Unreachable, match=r"cannot be reached .*megafold samples"):
        fetch("1ubq", tmp_path, base_url="http://127.0.0.1:9", attempts=2, wait=0.01)
    assert list(tmp_path.iterdir()) == []
