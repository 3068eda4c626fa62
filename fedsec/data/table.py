"""How a label file (CSV) is read: columns by name, row by row in bounded memory, every fault named by file and row."""

from __future__ import annotations

import csv
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import IO, cast

from fedsec.errors import DataError

MAX_LINE = 1 << 20
"""Bytes of one line; a longer one is no table, and must not be read into memory whole."""
MAX_ROWS = 10_000_000
"""Twice the rows of the longest public list (RSNA's, with six rows an image)."""


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    path: Path
    columns: dict[str, list[str]]
    """Lower-case name -> stripped values, in row order."""
    digest: str
    """Hash of the file's bytes, for the fingerprint."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def first(self, *names: str) -> list[str] | None:
        """The first of these columns that the table has."""
        return next((self.columns[name] for name in names if name in self.columns), None)


class TableRows:
    """The rows of a CSV file, one at a time. A byte order mark, CRLF, capitals in the header and `.gz` change nothing.

    Fields that are empty beyond the last named column are ignored, in the header and in the rows.

    Args:
        path: the file.
        required: lower-case names of the columns that must be there; `a|b` where either will do.
        encoding: of the text.
        delimiter: between fields; `None`: a tab where the first line has more tabs than commas, else a semicolon
            where it has more of those, else a comma.

    Raises:
        DataError: D01 missing, D02 column missing, D03 not in the encoding, D04 a row of another length, or no table.
    """

    def __init__(
        self, path: Path, required: tuple[str, ...] = (), encoding: str = "utf-8", delimiter: str | None = ","
    ) -> None:
        self.path, self.encoding = path, encoding
        self._hash = hashlib.blake2b(digest_size=16)
        lines = self._lines()
        try:
            start = next(lines, "")
            self.delimiter = delimiter or _delimiter(start)
            self._reader = csv.reader(_chained(start, lines), delimiter=self.delimiter)
            header = [name.strip().lower() for name in next(self._reader, [])]
        except csv.Error as error:
            raise DataError("D04", f"{path}: not a table: {error}") from None
        while header and not header[-1]:
            header.pop()
        self.header = header
        for name in required:
            if not set(name.split("|")) & set(header):
                wanted = name.replace("|", "' or '")
                found = ", ".join(header) or "none"
                found = f"{found[:500]}, …" if len(found) > 500 else found
                raise DataError(
                    "D02", f"{path}: column '{wanted}' is missing; columns are: {found}; is this the label file?"
                )

    @property
    def digest(self) -> str:
        """Hash of what was read so far: of the whole file when all rows were."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """Row number from 1, and one stripped text a column."""
        number, width = 0, len(self.header)
        try:
            for row in self._reader:
                if not row:
                    continue
                number += 1
                if len(row) > width and not any(row[width:]):
                    row = row[:width]
                if len(row) != width:
                    problem = f"{len(row)} fields, header has {width}; repair the row"
                    raise DataError("D04", f"{self.path}:{number}: {problem}")
                if number > MAX_ROWS:
                    raise DataError("D04", f"{self.path}: more than {MAX_ROWS:,} rows; split the table")
                yield number, [value.strip() for value in row]
        except csv.Error as error:
            raise DataError("D04", f"{self.path}:{number + 1}: not a table: {error}") from None

    def _lines(self) -> Iterator[str]:
        position = 0
        try:
            with _opened(self.path) as file:
                while line := file.readline(MAX_LINE):
                    if len(line) == MAX_LINE and not line.endswith(b"\n"):
                        raise DataError(
                            "D04", f"{self.path}: a line is longer than {MAX_LINE:,} bytes; is this a table?"
                        )
                    self._hash.update(line)
                    if position == 0:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    yield line.decode(self.encoding)
                    position += len(line)
        except FileNotFoundError:
            raise DataError("D01", f"{self.path}: no such file") from None
        except UnicodeDecodeError as error:
            where = f"byte 0x{error.object[error.start]:02x} at {position + error.start}"
            raise DataError("D03", f"{self.path}: {where} is not UTF-8; save the file as UTF-8") from None
        except (OSError, EOFError, zlib.error) as error:
            raise DataError("D08", f"{self.path}: cannot be read: {error}") from None


def read_table(
    path: Path,
    required: tuple[str, ...],
    optional: tuple[str, ...] | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = ",",
) -> Table:
    """Read a CSV file into columns.

    Args:
        path: the file. required: as `TableRows` takes them.
        optional: further columns to keep; None: all.
        encoding: of the text. delimiter: as `TableRows` takes it.

    Raises:
        DataError: as `TableRows` raises it.
    """
    rows = TableRows(path, required, encoding, delimiter)
    names = rows.header
    if optional is not None:
        wanted = {*optional, *(part for name in required for part in name.split("|"))}
        kept = [i for i, name in enumerate(names) if name in wanted]
    else:
        kept = list(range(len(names)))
    columns: list[list[str]] = [[] for _ in kept]
    for _, row in rows:
        for column, i in zip(columns, kept, strict=True):
            column.append(intern(row[i]))  # sites, sexes and labels repeat: one object each
    return Table(path, {names[i]: column for i, column in zip(kept, columns, strict=True)}, rows.digest)


def _opened(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _chained(start: str, lines: Iterator[str]) -> Iterator[str]:
    if start:
        yield start
    yield from lines


def _delimiter(line: str) -> str:
    return max((",", "\t", ";"), key=line.count)
