"""`fedsec data get` against a real server on loopback: the file appears whole and right, or not at all."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.cli.test_bad_input import fedsec


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "published"
    folder.mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()


def test_a_wrong_file_is_removed_and_named(mirror: tuple[str, Path], tmp_path: Path) -> None:
    address, published = mirror
    (published / "breastmnist.npz").write_bytes(b"not what was published")
    words = ["data", "get", "breastmnist", "--mirror", address, "--folder", "here"]
    done = fedsec(*words, folder=tmp_path)
    assert done.returncode == 2
    assert "MD5" in done.stderr
    assert not list((tmp_path / "here").iterdir())


def test_unknown_and_unreachable(tmp_path: Path) -> None:
    done = fedsec("data", "get", "pneumoniamnis", folder=tmp_path)
    assert done.returncode == 2 and "did you mean 'pneumoniamnist'" in done.stderr
    done = fedsec("data", "get", "breastmnist", "--mirror", "http://127.0.0.1:9", folder=tmp_path)
    assert done.returncode == 3 and "Traceback" not in done.stderr
