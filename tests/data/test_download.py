"""A real server on the loopback interface, which breaks, lies and changes its mind."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from fedsec.data import download
from fedsec.data.medmnist_table import MEDMNIST
from fedsec.errors import ConfigError, DataError, FedsecError

CONTENT = np.random.default_rng(0).bytes(300_000)


@dataclass
class Behaviour:
    content: bytes = CONTENT
    etag: str = '"v1"'
    ranges: bool = True
    wrong_range: bool = False
    cuts: list[int] = field(default_factory=list)
    """Bytes after which the next answers break off."""
    status: int = 200
    seen: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    """Path, Range and If-Range of each request."""


class Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour

    def do_GET(self) -> None:
        b = self.behaviour
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        b.seen.append((self.path, asked, condition))
        if b.status != 200:
            self.send_error(b.status)
            return
        start = 0
        if asked and b.ranges and condition in (None, b.etag):
            start = 0 if b.wrong_range else int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(b.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(b.content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(b.content) - 1}/{len(b.content)}")
        else:
            self.send_response(200)
        body = b.content[start:]
        self.send_header("Content-Length", str(len(body)))
        if b.etag:
            self.send_header("ETag", b.etag)
        self.end_headers()
        self.wfile.write(body[: b.cuts.pop(0)] if b.cuts else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Behaviour]]:
    behaviour = Behaviour()
    handler = type("Bound", (Handler,), {"behaviour": behaviour})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    md5 = {28: hashlib.md5(CONTENT).hexdigest(), 64: hashlib.md5(CONTENT).hexdigest()}
    monkeypatch.setitem(MEDMNIST, "bloodmnist", type(MEDMNIST["bloodmnist"])(task="multiclass", md5=md5))
    yield f"http://127.0.0.1:{http.server_address[1]}/files", behaviour
    http.shutdown()
    http.server_close()
    thread.join()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_fetches_once_and_reports_progress(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    told: list[tuple[int, int | None]] = []
    path = download.get(
        "bloodmnist", folder=tmp_path / "new", base_url=url, progress=lambda done, total: told.append((done, total))
    )
    assert path == tmp_path / "new" / "bloodmnist.npz" and path.read_bytes() == CONTENT
    assert behaviour.seen == [("/files/bloodmnist.npz?download=1", None, None)]
    assert told[-1] == (len(CONTENT), len(CONTENT)) and [d for d, _ in told] == sorted(d for d, _ in told)
    assert names(tmp_path / "new") == ["bloodmnist.npz"]
    download.get("bloodmnist", folder=tmp_path / "new", base_url=url)
    assert len(behaviour.seen) == 1
    download.get("bloodmnist", 64, folder=tmp_path / "new", base_url=url)
    assert behaviour.seen[1][0] == "/files/bloodmnist_64.npz?download=1"


def test_a_connection_that_breaks_is_resumed(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    behaviour.cuts = [100_000, 50_000]
    path = download.get("bloodmnist", folder=tmp_path, base_url=url)
    assert path.read_bytes() == CONTENT
    assert [r for _, r, _ in behaviour.seen] == [None, "bytes=100000-", "bytes=150000-"]
    assert [c for _, _, c in behaviour.seen] == [None, '"v1"', '"v1"']


def test_a_killed_download_is_resumed_by_the_next_call(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    (tmp_path / "bloodmnist.npz.part").write_bytes(CONTENT[:70_000])
    (tmp_path / "bloodmnist.npz.part.etag").write_text('"v1"')
    assert download.get("bloodmnist", folder=tmp_path, base_url=url).read_bytes() == CONTENT
    assert behaviour.seen[0][1:] == ("bytes=70000-", '"v1"')
    assert names(tmp_path) == ["bloodmnist.npz"]


def test_killed_between_the_last_byte_and_the_rename(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    (tmp_path / "bloodmnist.npz.part").write_bytes(CONTENT)
    assert download.get("bloodmnist", folder=tmp_path, base_url=url).read_bytes() == CONTENT
    assert len(behaviour.seen) == 1


@pytest.mark.parametrize("reason", ["changed", "no ranges", "wrong range"])
def test_starts_again_where_the_rest_would_not_fit(server: tuple[str, Behaviour], tmp_path: Path, reason: str) -> None:
    url, behaviour = server
    behaviour.ranges, behaviour.wrong_range = reason != "no ranges", reason == "wrong range"
    if reason == "wrong range":
        behaviour.etag = '"v0"'
    (tmp_path / "bloodmnist.npz.part").write_bytes(b"old" * 1000)
    (tmp_path / "bloodmnist.npz.part.etag").write_text('"v0"')
    assert download.get("bloodmnist", folder=tmp_path, base_url=url).read_bytes() == CONTENT
    assert behaviour.seen[0][1] == "bytes=3000-"


def test_a_longer_rest_than_the_file_starts_again(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, _ = server
    (tmp_path / "bloodmnist.npz.part").write_bytes(CONTENT + b"more")
    assert download.get("bloodmnist", folder=tmp_path, base_url=url).read_bytes() == CONTENT


def test_wrong_content_is_removed(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    behaviour.content = b"<html>not here</html>"
    with pytest.raises(DataError, match=r"bloodmnist.npz: MD5 is .*, published is .*removed, try again") as caught:
        download.get("bloodmnist", folder=tmp_path, base_url=url)
    assert caught.value.code == "D15" and "\n" not in str(caught.value)
    assert "bloodmnist.npz" not in names(tmp_path) and "bloodmnist.npz.part" not in names(tmp_path)
    behaviour.content = CONTENT
    assert download.get("bloodmnist", folder=tmp_path, base_url=url).read_bytes() == CONTENT


def test_gives_up_with_what_it_has(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    behaviour.cuts = [1000] + [0] * 10
    with pytest.raises(FedsecError, match="1,000 bytes are kept, and the same command goes on from there") as caught:
        download.get("bloodmnist", folder=tmp_path, base_url=url)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    assert "bloodmnist.npz" not in names(tmp_path)
    behaviour.cuts = []
    assert download.get("bloodmnist", folder=tmp_path, base_url=url).read_bytes() == CONTENT
    assert behaviour.seen[-1][1] == "bytes=1000-"


@pytest.mark.parametrize(("status", "words"), [(404, "answers 404 Not Found; check"), (503, "answers 503")])
def test_server_errors(server: tuple[str, Behaviour], tmp_path: Path, status: int, words: str) -> None:
    url, behaviour = server
    behaviour.status = status
    with pytest.raises(FedsecError, match=words):
        download.get("bloodmnist", folder=tmp_path, base_url=url)
    assert len(behaviour.seen) == (1 if status == 404 else download.ATTEMPTS)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(FedsecError, match=r"cannot be downloaded: .*refused") as caught:
        download.get("bloodmnist", folder=tmp_path, base_url="http://127.0.0.1:9")
    assert "\n" not in str(caught.value)


def test_a_file_of_the_users_own_is_not_overwritten(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    (tmp_path / "bloodmnist.npz").write_bytes(b"mine")
    with pytest.raises(DataError, match="is there but is not the published file"):
        download.get("bloodmnist", folder=tmp_path, base_url=url)
    assert (tmp_path / "bloodmnist.npz").read_bytes() == b"mine" and not behaviour.seen


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FedsecError, match="cannot be written"):
        download.get("bloodmnist", folder=tmp_path / "file" / "below", base_url="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("name", "size", "url", "words"),
    [
        ("pneumonamnist", 28, "https://x", "did you mean 'pneumoniamnist'"),
        ("ham10000", 28, "https://x", "'ham10000' cannot be downloaded"),
        ("bloodmnist", 32, "https://x", "no file of size 32; choose 28, 64, 128, 224"),
        ("bloodmnist", 28, "file:///etc", "give an http or https address"),
    ],
)
def test_requests_that_cannot_be_met(tmp_path: Path, name: str, size: int, url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        download.get(name, size, folder=tmp_path, base_url=url)
