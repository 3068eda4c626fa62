"""How a label file (CSV) is read: columns by name, every row's length checked, every fault named by file and row."""

from __future__ import annotations

import csv
import gzip
import io
from dataclasses import dataclass
from pathlib import Path

from fedsec.errors import DataError


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    path: Path
    columns: dict[str, list[str]]
    """Lower-case name -> stripped values, in row order."""
    content: bytes
    """The file's bytes, for the fingerprint."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


def read_table(path: Path, required: tuple[str, ...]) -> Table:
    """Read a CSV file; a byte order mark, CRLF, capitals in the header and `.gz` make no difference.

    Args:
        path: the file.
        required: lower-case names of the columns that must be there.

    Raises:
        DataError: D01 missing, D02 column missing, D03 not UTF-8, D04 a row of another length.
    """
    try:
        content = path.read_bytes()
        plain = gzip.decompress(content) if path.suffix == ".gz" else content
        text = plain.decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError("D01", f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        problem = f"byte 0x{error.object[error.start]:02x} at {error.start} is not UTF-8; save the file as UTF-8"
        raise DataError("D03", f"{path}: {problem}") from None
    except (OSError, EOFError) as error:
        raise DataError("D08", f"{path}: cannot be read: {error}") from None
    try:
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise DataError("D04", f"{path}: not a table: {error}") from None
    header = [name.strip().lower() for name in rows[0]] if rows else []
    for name in required:
        if name not in header:
            found = ", ".join(header) or "none"
            raise DataError("D02", f"{path}: column '{name}' is missing; columns are: {found}; is this the label file?")
    body = [row for row in rows[1:] if row]
    for number, row in enumerate(body, start=1):
        if len(row) != len(header):
            raise DataError("D04", f"{path}:{number}: {len(row)} fields, header has {len(header)}; repair the row")
    values = zip(*body, strict=True) if body else [()] * len(header)
    columns = {name: [v.strip() for v in column] for name, column in zip(header, values, strict=True)}
    return Table(path, columns, content)
