"""No test touches the user's cache; small data sets and files are made here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsec.data.base import Dataset
from fedsec.data.images import ArrayImages
from fedsec.data.report import LoadReport


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSEC_DATA", raising=False)


def make_dataset(labels: Any, *, task: str | None = None, split: Any = None, **meta: Any) -> Dataset:
    """A data set of 4x4 grey images, each of one flat colour by row."""
    labels = np.asarray(labels)
    n = len(labels)
    multilabel = labels.ndim == 2
    num_classes = labels.shape[1] if multilabel else int(labels.max(initial=0)) + 1
    pixels = np.tile((np.arange(n) % 256).astype(np.uint8).reshape(n, 1, 1, 1), (1, 4, 4, 1))
    columns = {"image": np.array([f"i{i:05d}" for i in range(n)])} | {k: np.asarray(v) for k, v in meta.items()}
    return Dataset(
        name="toy",
        task=task or ("multilabel" if multilabel else "multiclass"),
        images=ArrayImages(pixels),
        labels=labels.astype(np.float32 if multilabel else np.int64),
        class_names=tuple(f"c{i}" for i in range(max(2, num_classes))),
        meta=columns,
        split=np.full(n, "train") if split is None else np.asarray(split),
        fingerprint="toy",
        report=LoadReport(rows_read=n, rows_used=n),
    )


def npz_arrays(n: int = 12, size: int = 28, classes: int = 2, colour: bool = False) -> dict[str, np.ndarray]:
    """The six arrays of a MedMNIST file with distinct images."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for part, count in (("train", n), ("val", n // 2), ("test", n // 2)):
        shape = (count, size, size, 3) if colour else (count, size, size)
        arrays[f"{part}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
    return arrays


@pytest.fixture
def write_npz(tmp_path: Path) -> Callable[..., Path]:
    """Write an npz file; `name` of the file, then arrays (None leaves an array of the default six out)."""

    def write(name: str = "mine.npz", defaults: dict[str, np.ndarray] | None = None, **arrays: Any) -> Path:
        content = (npz_arrays() if defaults is None else defaults) | arrays
        path = tmp_path / name
        np.savez(path, **{key: value for key, value in content.items() if value is not None})
        return path

    return write
