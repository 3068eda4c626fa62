"""Label files are read row by row: whatever their size, what is not needed is not kept."""

from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsec.data import table
from fedsec.data.table import TableRows, read_table
from fedsec.errors import DataError


def large(path: Path, megabytes: int) -> Path:
    """Rows of 1,040 bytes; two short columns are wanted."""
    notes = "x" * 1000
    with path.open("w") as file:
        file.write("file,label,notes\n")
        for i in range(megabytes * 1000):
            file.write(f"images/{i % 1000:07d}.png,{i % 2},{notes}\n")
    return path


def peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    work()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    small, big = large(tmp_path / "a.csv", 1), large(tmp_path / "b.csv", 20)

    def rows(path: Path) -> int:
        return sum(1 for _ in TableRows(path, ("file",)))

    assert rows(big) == 20_000
    one, twenty = peak(lambda: rows(small)), peak(lambda: rows(big))
    assert twenty < 1.2 * one + 200_000
    # The columns that are kept cost what their distinct texts cost, not what the file has.
    assert peak(lambda: read_table(big, ("file", "label"), ())) < 2_000_000


@pytest.mark.slow
def test_two_gigabytes(tmp_path: Path) -> None:
    path = large(tmp_path / "huge.csv", 2_000)
    assert path.stat().st_size > 2e9
    assert peak(lambda: read_table(path, ("file", "label"), ())) < 100_000_000


def test_a_line_without_end_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "pixels.csv"
    with path.open("wb") as file:
        file.write(b"file,label\n")
        file.seek(80_000_000)  # a hole of zeros
        file.write(b"\n")
    used = 0

    def read() -> None:
        with pytest.raises(DataError, match="a line is longer than 1,048,576 bytes") as caught:
            read_table(path, ("file",))
        assert caught.value.code == "D04"

    used = peak(read)
    assert used < 5_000_000


def test_a_quote_without_end_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('file,label\na.png,"open\n' + "b.png,1\n" * 100_000)
    with pytest.raises(DataError, match=r"a.csv:1: not a table") as caught:
        read_table(path, ("file",))
    assert caught.value.code == "D04"


def test_too_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MAX_ROWS", 5)
    path = tmp_path / "a.csv"
    path.write_text("file\n" + "a\n" * 6)
    with pytest.raises(DataError, match=r"more than 5 rows; split the table"):
        read_table(path, ("file",))


def test_marks_endings_case_and_compression_change_nothing(tmp_path: Path) -> None:
    plain = tmp_path / "a.csv"
    plain.write_bytes(b"File,Label\na, 1 \nb,2\n")
    other = tmp_path / "b.csv"
    other.write_bytes(b"\xef\xbb\xbfFILE , label\r\na,1\r\n\r\nb,2\r\n")
    packed = tmp_path / "c.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    tabs = tmp_path / "d.tsv"
    tabs.write_bytes(b"file\tlabel\na\t1\nb\t2\n")
    for path in (plain, other, packed, tabs):
        found = read_table(path, ("file",), delimiter=None)
        assert found.columns == {"file": ["a", "b"], "label": ["1", "2"]} and len(found) == 2
    assert read_table(plain, ("file",)).digest == read_table(packed, ("file",)).digest


def test_empty_fields_at_the_end_are_no_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("file,label,\na,1,\nb,2\n")  # a twelfth column, as older copies of NIH's table have
    assert read_table(path, ("file",)).columns == {"file": ["a", "b"], "label": ["1", "2"]}
    path.write_text("file,label\na,1,x\n")
    with pytest.raises(DataError, match=r"a.csv:1: 3 fields, header has 2"):
        read_table(path, ("file",))


def test_faults_name_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"file,label\n" + b"a,1\n" * 3 + b"b\xb0,1\n")
    with pytest.raises(DataError, match=r"byte 0xb0 at 24 is not UTF-8") as caught:
        read_table(path, ("file",))
    assert caught.value.code == "D03"
    assert read_table(path, ("file",), encoding="latin-1").columns["file"][3] == "b°"
    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(gzip.compress(b"file\n" + b"a\n" * 9999)[:-20])
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_table(packed, ("file",))
    assert caught.value.code == "D08"
    with pytest.raises(DataError, match="column 'a' or 'b' is missing"):
        read_table(path, ("a|b",), encoding="latin-1")
