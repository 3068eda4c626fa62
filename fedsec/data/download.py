"""How a MedMNIST file is fetched: resumed where it broke off, checked, and never half under its final name."""

from __future__ import annotations

import hashlib
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from fedsec.data.medmnist_table import MEDMNIST, VOLUMES, file_name
from fedsec.errors import ConfigError, DataError, FedsecError
from fedsec.plugins import nearest

BASE_URL = "https://zenodo.org/records/10519652/files"
TIMEOUT = 30.0
ATTEMPTS = 4
"""Connections to one file before giving up; each goes on where the last one broke off."""
CHUNK = 1 << 18
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")

Progress = Callable[[int, int | None], None]
"""Bytes so far, and bytes in all where the server says."""


def get(
    name: str,
    size: int = 28,
    *,
    folder: Path,
    base_url: str = BASE_URL,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Fetch one of the 2-D MedMNIST sets; nothing is fetched where the file is already there.

    A broken download stays beside the file as `.part` and is resumed by the next call.

    Args:
        name: of the set. size: side in pixels: 28, 64, 128 or 224. folder: where the file goes.
        base_url: where the published files lie. progress: told after each chunk.

    Returns:
        The path of the complete file, whose MD5 is the published one.

    Raises:
        ConfigError: no such set or size.
        DataError: the content is not what was published (D15).
        FedsecError: no connection, or a file that cannot be written.
    """
    if name in VOLUMES:
        raise DataError("D09", f"{name}: three-dimensional sets are not supported; choose a 2-D MedMNIST set")
    if name not in MEDMNIST:
        raise ConfigError(f"'{name}' cannot be downloaded: {nearest(name, MEDMNIST)}")
    if size not in MEDMNIST[name].md5:
        raise ConfigError(f"{name}: no file of size {size}; choose {', '.join(map(str, MEDMNIST[name].md5))}")
    if not base_url.startswith(("https://", "http://")):
        raise ConfigError(f"{base_url}: give an http or https address")
    file = file_name(name, size)
    final, published = folder / file, MEDMNIST[name].md5[size]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if final.exists():
            if _md5(final) == published:
                return final
            raise DataError("D15", f"{final} is there but is not the published file; move it away and try again")
        part = final.with_name(file + ".part")
        _fetch_all(f"{base_url}/{file}?download=1", part, progress)
        found = _md5(part)
        if found != published:
            part.unlink()
            raise DataError(
                "D15", f"{file}: MD5 is {found}, published is {published}; the download was removed, try again"
            )
        part.replace(final)
    except OSError as error:
        raise FedsecError(
            f"{final}: cannot be written: {error.strerror or error}; check the folder and its space"
        ) from None
    _etag_file(part).unlink(missing_ok=True)
    return final


def _fetch_all(url: str, part: Path, progress: Progress) -> None:
    """Connect until the file is complete, at most `ATTEMPTS` times without any progress in between."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch(url, part, progress):
                return
            problem = "the connection broke"
        except urllib.error.HTTPError as error:
            if error.code == 416:
                # What is there does not fit the file on the server: start again.
                part.unlink(missing_ok=True)
            elif error.code < 500:
                raise FedsecError(f"{url}: the server answers {error.code} {error.reason}; check the address") from None
            problem = f"the server answers {error.code} {error.reason}"
        except _Broken as error:
            problem = str(error)
        after = part.stat().st_size if part.exists() else 0
        failures = 0 if after > before else failures + 1
        if failures >= ATTEMPTS:
            kept = f"; {after:,} bytes are kept, and the same command goes on from there" if after else ""
            raise FedsecError(f"{url}: cannot be downloaded: {problem}{kept}")


class _Broken(Exception):
    """The network failed; the text says how."""


def _fetch(url: str, part: Path, progress: Progress) -> bool:
    """One connection; whether the file is complete after it."""
    have = part.stat().st_size if part.exists() else 0
    etag = _etag_file(part)
    request = urllib.request.Request(url, headers={"User-Agent": "fedsec", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if etag.exists():
            # The server sends the whole file instead, should it have changed in the meantime.
            request.add_header("If-Range", etag.read_text(encoding="ascii"))
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return True
        raise
    except urllib.error.URLError as error:
        raise _Broken(str(error.reason)) from None
    except (http.client.HTTPException, OSError) as error:
        raise _Broken(str(error) or type(error).__name__) from None
    with response:
        start, total = _extent(response, part, have)
        tag = response.headers.get("ETag", "")
        if tag and tag.isascii() and not tag.startswith("W/"):
            etag.write_text(tag, encoding="ascii")
        else:
            etag.unlink(missing_ok=True)
        with part.open("r+b" if start else "wb") as out:
            out.seek(start)
            done = _copy(response, out, start, total, progress)
    return total is None or done >= total


def _extent(response: Any, part: Path, have: int) -> tuple[int, int | None]:
    """Where the answer starts in the file, and how long the whole file is."""
    if response.status == 206:
        match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match and int(match[1]) == have:
            return have, int(match[2])
        part.unlink(missing_ok=True)
        raise _Broken("the server answers with another part of the file than was asked for")
    length = response.headers.get("Content-Length")
    return 0, int(length) if length and length.isdecimal() else None


def _copy(source: Any, out: IO[bytes], start: int, total: int | None, progress: Progress) -> int:
    done = start
    while True:
        try:
            chunk = source.read(CHUNK)
        except http.client.IncompleteRead as error:
            chunk = error.partial
        except (http.client.HTTPException, OSError) as error:
            raise _Broken(str(error) or type(error).__name__) from None
        if not chunk:
            return done
        out.write(chunk)
        done += len(chunk)
        progress(done, total)


def _etag_file(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
