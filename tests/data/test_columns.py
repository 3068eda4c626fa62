from __future__ import annotations

import numpy as np
import pytest

from fedsec.data.columns import ages, sexes, texts, views
from fedsec.data.table import read_table
from fedsec.errors import DataError


def test_ages_from_every_spelling() -> None:
    found = ages(["57", "57.0", "057Y", "011M", "023D", "50+", "unknown", "", "412", "old"])
    expected = [57, 57, 57, 11 / 12, 23 / 365.25, 50, np.nan, np.nan, np.nan, np.nan]
    np.testing.assert_allclose(found.years, expected, rtol=1e-6)
    assert (found.censored, found.impossible) == (1, 2)


def test_numeric_ages() -> None:
    found = ages(np.array([0.0, 120.0, 121.0, -1.0, np.nan]))
    np.testing.assert_array_equal(found.years, np.array([0, 120, np.nan, np.nan, np.nan], dtype=np.float32))
    assert found.impossible == 2


def test_sex_view_and_ids() -> None:
    assert sexes(["F", "female", "MALE", "m", "O", "unknown", ""]).tolist() == ["F", "F", "M", "M", "", "", ""]
    assert views(["PA", "AP supine", "ll", "n/a"]).tolist() == ["PA", "AP", "LL", ""]
    assert texts(np.array([7.0, 7.5, np.nan])).tolist() == ["7", "7.5", ""]
    assert texts(np.array([b" a ", b"NaN"])).tolist() == ["a", ""]
    assert texts(np.array([[12], [3]])).tolist() == ["12", "3"]


def test_table_tolerates_bom_crlf_capitals_blanks_and_gzip(tmp_path) -> None:
    import gzip

    content = "\ufeffImage_ID , DX\r\na, nv\r\n\r\nb,mel\r\n".encode()
    (tmp_path / "t.csv").write_bytes(content)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(content))
    for name in ("t.csv", "t.csv.gz"):
        table = read_table(tmp_path / name, ("image_id", "dx"))
        assert table.columns == {"image_id": ["a", "b"], "dx": ["nv", "mel"]}


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, "D01", "no such file"),
        (b"a,b\n1,2\n", "D02", "column 'image_id' is missing; columns are: a, b"),
        (b"image_id,dx\n\xb0,nv\n", "D03", "byte 0xb0 at 12"),
        (b"image_id,dx\na,nv\nb,mel,x\n", "D04", ":2: 3 fields, header has 2"),
        (b"", "D02", "columns are: none"),
    ],
)
def test_broken_tables(tmp_path, content: bytes | None, code: str, words: str) -> None:
    path = tmp_path / "labels.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_table(path, ("image_id", "dx"))
    assert caught.value.code == code and "\n" not in str(caught.value)
