"""A file of blocks is a plain .npy file with the rows that were written, whatever their length."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fedsec.data import blocks
from fedsec.data.blocks import PAGE, BlockFile


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("shape", [(70, 16, 16, 3), (9, 27, 27, 1), (300, 28, 28, 1), (3, 225, 225, 3), (0, 8, 8, 1)])
def test_rows_are_read_back(
    tmp_path: Path, shape: tuple[int, ...], direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    rows = np.random.default_rng(0).integers(0, 256, (shape[0], int(np.prod(shape[1:]))), dtype=np.uint8)
    file = BlockFile(tmp_path / "x.npy", shape)

    def fill(first: int) -> None:
        part = rows[first : first + file.rows]
        block = file.block()
        block[: len(part)] = part
        file.write(first, block[: len(part)])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(fill, range(0, shape[0], file.rows)))
    file.close()
    found = np.load(tmp_path / "x.npy", allow_pickle=False)
    assert found.shape == shape and found.dtype == np.uint8
    assert np.array_equal(found.reshape(rows.shape), rows)
    assert (tmp_path / "x.npy").stat().st_size == PAGE + rows.size


def test_a_block_fits_into_pages_where_that_is_not_too_large(tmp_path: Path) -> None:
    for side, channels, whole in ((224, 3, True), (28, 1, True), (64, 3, True), (225, 3, False)):
        file = BlockFile(tmp_path / "x.npy", (2, side, side, channels))
        file.close()
        assert (file.rows * file.row % PAGE == 0) is whole
        assert file.rows * file.row <= blocks.LARGEST


def test_what_the_system_refuses_goes_through_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = BlockFile(tmp_path / "x.npy", (file_rows := 64, 64, 64, 1))
    write, refused = os.pwrite, []

    def pwrite(handle: int, data: memoryview, place: int) -> int:
        if handle == file._direct:
            refused.append(place)
            raise OSError(22, "Invalid argument")
        return write(handle, data[:100_000], place)  # and takes less than it was given

    monkeypatch.setattr(os, "pwrite", pwrite)
    block = file.block()
    block[:] = np.arange(file_rows, dtype=np.uint8)[:, None]
    file.write(0, block)
    monkeypatch.undo()
    file.close()
    assert np.array_equal(np.load(tmp_path / "x.npy")[:, 0, 0, 0], np.arange(file_rows))
    assert bool(refused) == (file._direct is not None)
