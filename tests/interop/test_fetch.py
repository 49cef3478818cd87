"""Weights come whole or not at all, from a server on this machine."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ldmlab.conditioners.text import VOCABULARY_FILE, WordPiece
from ldmlab.errors import InputError
from ldmlab.interop.published_weights import WEIGHTS, Weights, fetch, weights_path

CONTENT = bytes(range(256)) * 9000


class Handler(BaseHTTPRequestHandler):
    """/missing is not there, /short breaks off, everything else is the file."""

    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:1000] if self.path == "/short" else CONTENT)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("LDMLAB_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    entry = Weights("some.pth", f"{address}/some", hashlib.sha256(CONTENT).hexdigest()[:8], 2, "MIT", "this test")
    monkeypatch.setitem(WEIGHTS, "some", entry)
    yield address
    server.shutdown()
    server.server_close()


def test_fetched_once_and_found_again(server: str) -> None:
    with pytest.raises(InputError, match="run `ldmlab fetch some`"):
        weights_path("some")
    message: list[tuple[int, int]] = []
    path = fetch("some", advance=lambda done, total: message.append((done, total)))
    assert path == weights_path("some")
    assert path.read_bytes() == CONTENT
    assert message[-1] == (len(CONTENT), len(CONTENT))
    assert fetch("some", url=f"{server}/missing") == path  # it is here: nothing is fetched
    path.write_bytes(b"damaged")
    assert fetch("some").read_bytes() == CONTENT


@pytest.mark.parametrize(("place", "message"), [("/missing", r"cannot be fetched .*404"), ("/short", r"broke off")])
def test_a_failed_download_leaves_nothing(server: str, tmp_path: Path, place: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fetch("some", url=server + place)
    assert not any(path.is_file() for path in (tmp_path / "weights").rglob("*"))


def test_another_file_is_thrown_away(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WEIGHTS, "some", Weights("some.pth", f"{server}/some", "0" * 8, 2, "MIT", "this test"))
    with pytest.raises(InputError, match="instead of 00000000"):
        fetch("some")
    assert not any(path.is_file() for path in (tmp_path / "weights").rglob("*"))


def test_a_vocabulary_is_fetched_to_where_captions_look_for_it(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(WEIGHTS["wordpiece"].sha256) == 64  # the whole hash: its name carries none
    assert WEIGHTS["wordpiece"].file == VOCABULARY_FILE  # where the conditioner looks for it
    with pytest.raises(InputError, match="instead of 07eced37"):
        fetch("wordpiece", url=f"{server}/vocab.txt")
    entry = replace(WEIGHTS["wordpiece"], url=f"{server}/vocab.txt", sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(WEIGHTS, "wordpiece", entry)
    assert fetch("wordpiece") == WordPiece(None, length=77, size=30522).path


def test_names_carry_their_checksum() -> None:
    for weights in (WEIGHTS["inception"], WEIGHTS["lpips"]):
        assert weights.sha256 in weights.file
        assert weights.url.startswith("https://")
    with pytest.raises(InputError, match="there are no such weights"):
        fetch("vgg19")
