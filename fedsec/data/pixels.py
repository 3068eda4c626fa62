"""Decoded images on the disk: made once, in parallel, and then mapped, so that no set has to fit into memory."""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsec.data.blocks import BlockFile
from fedsec.data.cache import cache_dir, write_npz
from fedsec.data.decode import UNREADABLE, ImageFault, Look, decode, jpeg_decoder
from fedsec.data.digest import Digests, fingerprint
from fedsec.data.images import Pixels, Rows
from fedsec.errors import DataError
from fedsec.machine import usable_cores
from fedsec.progress import watcher

VERSION = "pixels-3"
HELD = 128 << 20
"""Bytes of the map that may stay in memory; more are given back, and read from the disk when they are needed."""
LARGE = 16 << 10
"""Bytes of an image from which it is read, not mapped."""
READ = 1 << 20
"""Bytes read at once."""
SAMPLED = 4
"""One of so many eight bytes enters the fast key, which need not tell apart what the exact hash then does."""


Row = tuple[int, str, bool, str]
"""Fast key of the pixels, hash of the file, whether of one colour, and what is wrong, of one image."""


@dataclass(frozen=True, eq=False)
class MappedImages:
    """Images in one (N, H, W, C) uint8 file; what is read is copied, what is not read costs no memory."""

    path: Path
    digests: Digests
    """(N,) noted when the images were decoded: equal where and only where the pixels are."""
    flat: npt.NDArray[np.bool_]
    """(N,) images of one colour."""
    _map: np.memmap = field(init=False, repr=False)
    _read: list[int] = field(default_factory=lambda: [0], init=False, repr=False)
    _handle: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_map", np.load(self.path, mmap_mode="r", allow_pickle=False))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        height, width, channels = self._map.shape[1:]
        return height, width, channels

    def __len__(self) -> int:
        return len(self._map)

    def read(self, indices: Rows) -> Pixels:
        """The images at these positions: (B, H, W, C) uint8."""
        if self._map[:1].nbytes >= LARGE and hasattr(os, "preadv"):
            return self._copied(indices)
        found: Pixels = np.asarray(self._map)[indices]
        self._read[0] += found.nbytes
        if self._read[0] > HELD:
            self._read[0] = 0
            _release(self._map)
        return found

    def _copied(self, indices: Rows) -> Pixels:
        """The same by system calls, which for large images cost less than the faults of pages that are mapped."""
        if not self._handle:
            self._handle.append(os.open(self.path, os.O_RDONLY))
            weakref.finalize(self, os.close, self._handle[0])
        rows = np.arange(len(self))[indices]
        found: Pixels = np.empty((len(rows), *self.shape), dtype=np.uint8)
        size, start = self._map[:1].nbytes, int(self._map.offset)
        for image, row in zip(found, rows.tolist(), strict=True):
            if os.preadv(self._handle[0], [image], start + row * size) != size:
                raise DataError("D08", f"{self.path}: ends before image {row}; delete the file, and it is made anew")
        return found

    def __reduce__(self) -> tuple[Callable[..., MappedImages], tuple[Path, Digests, npt.NDArray[np.bool_]]]:
        """Another process maps the file anew; the pixels are not sent."""
        return MappedImages, (self.path, self.digests, self.flat)


@dataclass(frozen=True)
class Decoded:
    """All files of a set, decoded."""

    images: MappedImages
    """(N, S, S, C); zero where undecodable."""
    problems: list[tuple[str, str]]
    """N codes and reasons; empty texts where the image is good."""
    contents: Digests
    """(N,) hash of each file's bytes."""
    made: bool
    """Whether the files were decoded now, not found in the cache."""


def decode_all(paths: Sequence[Path], look: Look, root: Path, workers: int | None = None) -> Decoded:
    """Decode every file once; the next call with the same files maps what the first one wrote.

    A file that was changed, renamed or replaced since (another size or time of change) is another file.

    Args:
        paths: the files. look: what the pixels shall look like. root: the folder they lie in.
        workers: threads; None: one a core. (Decoding releases Python's lock, so that threads are as fast as processes.)

    Raises:
        DataError: no room for the decoded images (D08).
    """
    stats = [path.stat() for path in paths]
    inside = f"{root}{os.sep}"  # Path.relative_to costs as much as a fiftieth of decoding
    named = [(str(p).removeprefix(inside), s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True)]
    key = fingerprint(VERSION, look.key(), str(root.resolve()), named)
    folder = _folder()
    file, facts = folder / f"{key}.npy", folder / f"{key}.facts.npz"
    known = _facts(file, facts, (len(paths), look.size, look.size, look.channels))
    made = known is None
    if known is None:
        known = _make(file, facts, paths, look, workers or usable_cores())
    problems = [tuple(text.split("\t", 1)) for text in known["problems"].tolist()]
    images = MappedImages(file, known["digests"], known["flat"])
    return Decoded(images, [(p[0], p[1]) if len(p) == 2 else ("", "") for p in problems], known["contents"], made)


def _folder() -> Path:
    """Where the maps are kept; a temporary folder where the cache cannot be written."""
    folder = cache_dir() / "images"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    other = Path(tempfile.gettempdir()) / f"fedsec-images-{os.getuid() if hasattr(os, 'getuid') else 0}"
    other.mkdir(mode=0o700, exist_ok=True)
    return other


def _facts(file: Path, facts: Path, shape: tuple[int, ...]) -> dict[str, npt.NDArray[Any]] | None:
    """What was noted when the images were decoded; None where either file is missing or damaged."""
    with suppress(OSError, ValueError, EOFError, KeyError):
        if np.load(file, mmap_mode="r", allow_pickle=False).shape == shape:
            with np.load(facts, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in ("digests", "flat", "problems", "contents")}
    return None


def _make(file: Path, facts: Path, paths: Sequence[Path], look: Look, workers: int) -> dict[str, npt.NDArray[Any]]:
    """Decode into a temporary file and rename it, then note the facts, without which the file does not count."""
    shape = (len(paths), look.size, look.size, look.channels)
    _check_room(file.parent, int(np.prod(shape)))
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        found = _fill(BlockFile(temporary, shape), paths, look, workers)
        columns = {
            "digests": _digests(temporary, [row[0] for row in found]),
            "contents": np.array([row[1] for row in found], dtype="S32"),
            "flat": np.array([row[2] for row in found], dtype=bool),
            "problems": np.array([row[3] for row in found], dtype=np.str_),
        }
        temporary.replace(file)
        write_npz(facts, columns)
    finally:
        temporary.unlink(missing_ok=True)
    return columns


def _fill(file: BlockFile, paths: Sequence[Path], look: Look, workers: int) -> list[Row]:
    """Write every image at its place; key, content hash, flatness and problem of each."""
    words = _weights(-(-file.row // 8))[::SAMPLED]
    jpeg_decoder()  # imported here, not by every thread at once

    def some(first: int) -> list[Row]:
        rows, block = [], file.block()
        chosen = paths[first : first + file.rows]
        for own, path in zip(block, chosen, strict=False):
            content, pixels, problem = _one(path, look)
            own[:] = 0 if pixels is None else pixels.reshape(-1)
            eights = (np.resize(own, -(-file.row // 8) * 8) if file.row % 8 else own).view(np.uint64)
            rows.append((int(np.dot(eights[::SAMPLED], words)), content, pixels is None or _flat(pixels), problem))
        file.write(first, block[: len(chosen)])
        return rows

    progress = watcher()
    progress.stage("decoding images", len(paths))
    found: list[Row] = []
    try:
        with ThreadPoolExecutor(max(1, workers) + 1) as pool:  # one of them waits for the disk
            # A bounded queue: an interrupt waits for the blocks in work, not for all of them.
            waiting: list[Future[list[Row]]] = []
            for first in range(0, len(paths), file.rows):
                waiting.append(pool.submit(some, first))
                if len(waiting) > 2 * workers:
                    found += waiting.pop(0).result()
                    progress.advance(len(found))
            for future in waiting:
                found += future.result()
                progress.advance(len(found))
    finally:
        file.close()
    return found


def _weights(count: int) -> npt.NDArray[np.uint64]:
    """Random odd weights, one for eight bytes, of a hash that is ten times as fast as a cryptographic one."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 2**63, count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def _digests(file: Path, keys: Sequence[int]) -> Digests:
    """Hashes of all images: the fast key where it is unique, else a cryptographic hash of the pixels.

    Two images have one digest if and only if their pixels are equal.
    """
    found, counts = np.unique(np.array(keys, dtype=np.uint64), return_counts=True)
    repeated = set(found[counts > 1].tolist())
    pixels = np.load(file, mmap_mode="r", allow_pickle=False)
    texts = []
    for i, key in enumerate(keys):
        exact = hashlib.blake2b(np.ascontiguousarray(pixels[i]).data, digest_size=16) if key in repeated else None
        texts.append(exact.hexdigest() if exact else f"{key:032x}")
    return np.array(texts, dtype="S32")


def _flat(pixels: Pixels) -> bool:
    """One colour; of nearly every image the middle differs from the corner, which is all that is looked at."""
    first, middle = pixels[0, 0], pixels[len(pixels) // 2, pixels.shape[1] // 2]
    return first.tobytes() == middle.tobytes() and bool((pixels == first).all())


def _one(path: Path, look: Look) -> tuple[str, Pixels | None, str]:
    """Content hash, pixels and, where there are none, code and reason."""
    content = b""
    try:
        content = _content(path)
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        return digest, decode(content, look), ""
    except ImageFault as error:
        code, reason = error.code, str(error)
    except UNREADABLE as error:
        code = "D08"
        reason = str(error).partition("<_io")[0].replace(str(path), path.name) or type(error).__name__
        reason = f"cannot be decoded: {reason.strip().replace(chr(10), ' ')}"
    return hashlib.blake2b(content, digest_size=16).hexdigest(), None, f"{code}\t{reason}"


def _content(path: Path) -> bytes:
    """All of a file in few system calls: after each one a thread waits for Python's lock again."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        parts = [os.read(handle, READ)]
        while len(parts[-1]) == READ:
            parts.append(os.read(handle, READ))
    finally:
        os.close(handle)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            "D08",
            f"{folder}: the decoded images need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "set XDG_CACHE_HOME to a larger disk, or choose a smaller --size",
        )


def _release(array: np.memmap) -> None:
    """Give the pages of a map back; they stay in the system's page cache as long as it has room."""
    mapped = getattr(array, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)
