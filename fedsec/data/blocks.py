"""A .npy file of bytes, written in blocks by several threads, and past the system's page cache where that can be done.

Pages of a few GB that nobody reads soon cost as much time as decoding the images in them.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from math import gcd, prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedsec.data.images import Pixels

PAGE = 4096
"""Bytes of which addresses, lengths and places in the file must be multiples, to go past the page cache."""
BLOCK = 64
"""Rows in a block, about."""
LARGEST = 64 << 20
"""Bytes in a block at most; where pages and rows fit together in larger blocks alone, the page cache is used."""


class BlockFile:
    """Rows of bytes in a file that others can map.

    Args:
        path: to be made or replaced. shape: (N, ...) of uint8.
    """

    def __init__(self, path: Path, shape: Sequence[int]) -> None:
        self.row = prod(shape[1:])
        fitting = PAGE // gcd(PAGE, self.row)
        aligned = fitting * self.row <= LARGEST
        self.rows = fitting * max(1, round(BLOCK / fitting)) if aligned else BLOCK
        """Rows in a block."""
        with path.open("wb") as file:
            file.write(header(shape))
            size = PAGE + prod(shape)
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                with suppress(OSError):  # some file systems cannot
                    os.posix_fallocate(file.fileno(), 0, size)
        self._cached = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        self._direct: int | None = None
        if aligned and hasattr(os, "O_DIRECT"):
            with suppress(OSError):  # a file system in memory cannot
                self._direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        self._own = threading.local()

    def block(self) -> npt.NDArray[np.uint8]:
        """(rows, bytes of a row) of this thread, to be filled; what it held before was written or is lost."""
        if not hasattr(self._own, "block"):
            memory = mmap.mmap(-1, max(1, self.rows * self.row))  # begins at a page
            self._own.block = np.frombuffer(memory, dtype=np.uint8, count=self.rows * self.row)
        block: Pixels = self._own.block.reshape(self.rows, self.row)
        return block

    def write(self, first: int, rows: npt.NDArray[np.uint8]) -> None:
        """Write the leading rows of this thread's block at row `first`, a multiple of the block's rows."""
        place, data = PAGE + first * self.row, rows.reshape(-1).data
        if self._direct is not None and len(data) % PAGE == 0:
            with suppress(OSError):  # what it did not take is written below
                written = os.pwrite(self._direct, data, place)
                place, data = place + written, data[written:]
        while data:
            written = os.pwrite(self._cached, data, place)
            place, data = place + written, data[written:]

    def close(self) -> None:
        """Give the file back."""
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)


def header(shape: Sequence[int]) -> bytes:
    """A .npy header of version 1.0, as long as a page: the format fills it up with spaces."""
    text = repr({"descr": "|u1", "fortran_order": False, "shape": tuple(int(n) for n in shape)}).encode("latin1")
    start = np.lib.format.magic(1, 0) + (PAGE - 10).to_bytes(2, "little")
    return start + text.ljust(PAGE - len(start) - 1) + b"\n"
