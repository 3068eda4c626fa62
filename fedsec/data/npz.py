"""How an npz file of unknown origin is read: headers first, nothing executed, every damage named in one line."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from fedsec.errors import DataError, UnsafeFileError

PICKLE = b"\x80"
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Header:
    """What an array says of itself before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"({','.join(map(str, self.shape))}) {self.dtype}"


def read_headers(path: Path) -> dict[str, Header]:
    """Key -> header of every array in the file.

    Raises:
        DataError: missing (D01), damaged or not an npz file (D08).
        UnsafeFileError: an array of Python objects or a pickle, whose reading would run its code (D14).
    """
    if not path.is_file():
        raise DataError("D01", f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            for info in archive.infolist():
                with archive.open(info) as file:
                    header = _header(path, info, file)
                if header is not None:
                    found[info.filename.removesuffix(".npy")] = header
            return found
    except DAMAGE as error:
        raise _not_npz(path, error) from None


def read_array(path: Path, key: str) -> npt.NDArray[Any]:
    """One array of a file whose headers were read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return np.asarray(file[key])
    except MemoryError:
        raise DataError("D09", f"{path}: {key} does not fit into memory") from None
    except DAMAGE as error:
        raise DataError("D08", f"{path}: {key} is damaged ({error}); get the file again") from None


def _header(path: Path, info: zipfile.ZipInfo, file: IO[bytes]) -> Header | None:
    """The header of one member; None: not an array, and not read."""
    start = file.read(len(npy.MAGIC_PREFIX))
    if start[:1] == PICKLE:
        raise _unsafe(path, info.filename)
    if start != npy.MAGIC_PREFIX:
        return None
    version = (file.read(1)[0], file.read(1)[0])
    readers: Mapping[tuple[int, int], Any] = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise DataError("D09", f"{path}: {info.filename} is not a plain array (format {version[0]}.{version[1]})")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise _unsafe(path, info.filename)
    return Header(shape, dtype)


def _unsafe(path: Path, member: str) -> UnsafeFileError:
    key = member.removesuffix(".npy")
    return UnsafeFileError(
        f"{path}: '{key}' holds Python objects, which run code when read; refused. "
        "Save it as a plain number or text array [D14]"
    )


def _not_npz(path: Path, error: Exception) -> DataError | UnsafeFileError:
    try:
        with path.open("rb") as file:
            start = file.read(len(npy.MAGIC_PREFIX))
        size = path.stat().st_size
    except OSError as problem:
        return DataError("D08", f"{path}: cannot be read: {problem.strerror}")
    if start[:1] == PICKLE:
        return UnsafeFileError(
            f"{path}: is a pickle, which runs code when read; refused. Save it with numpy.savez [D14]"
        )
    if start == npy.MAGIC_PREFIX:
        return DataError("D09", f"{path}: holds a single array; save images and labels together with numpy.savez")
    return DataError("D08", f"{path}: not an npz file, or damaged ({error}; {size:,} bytes); get the file again")
