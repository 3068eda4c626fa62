"""How the label arrays of an npz file are read: which task they describe, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedsec.errors import DataError

if TYPE_CHECKING:
    from fedsec.types import Task

MAX_CLASSES = 1000
"""A file without class names whose labels reach this far holds something else than classes."""


@dataclass(frozen=True)
class LabelTable:
    """The labels of all parts, train first."""

    task: Task
    labels: npt.NDArray[Any]
    """Of the known rows: (n,) int64, or (n, L) float32 with NaN where unknown."""
    class_names: tuple[str, ...]
    known: npt.NDArray[np.bool_]
    """(N,) rows with a label; always true in a multi-label set, whose entries are masked one by one."""


def labels_of(
    path: Path, raw: Mapping[str, npt.NDArray[Any]], task: Task | None, class_names: tuple[str, ...]
) -> LabelTable:
    """The labels in their normal form.

    Args:
        path: for messages.
        raw: part -> (N,), (N, 1) or (N, L) numbers; -1 and NaN are unknown.
        task: None: more than one column is multi-label, two classes are binary, else multi-class.
        class_names: empty: the classes are numbered up to the largest label.

    Raises:
        DataError: D06 with the array and row of the first value that is no label, D09 for a wrong shape or type.
    """
    widths = {part: _width(path, part, array) for part, array in raw.items()}
    if len(set(widths.values())) > 1:
        raise DataError("D09", f"{path}: parts have different numbers of labels: {widths}")
    width = next(iter(widths.values()))
    multilabel = width > 1 if task is None else task == "multilabel"
    if multilabel:
        return _multi(path, raw, width, class_names)
    if width > 1:
        raise DataError("D09", f"{path}: labels have {width} columns, this set has one label an image")
    return _single(path, raw, task, class_names)


def _width(path: Path, part: str, array: npt.NDArray[Any]) -> int:
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] == 0):
        raise DataError("D09", f"{path}: {part}_labels: expected (N,), (N, 1) or (N, L), found {array.shape}")
    if array.dtype.kind not in "biuf":
        raise DataError("D09", f"{path}: {part}_labels: expected class numbers, found {array.dtype}")
    return 1 if array.ndim == 1 else int(array.shape[1])


def _single(
    path: Path, raw: Mapping[str, npt.NDArray[Any]], task: Task | None, class_names: tuple[str, ...]
) -> LabelTable:
    limit = len(class_names) or MAX_CLASSES
    columns = []
    for part, array in raw.items():
        # (N, 1) labels would broadcast against (N,) logits into N x N losses.
        values = array.reshape(-1).astype(np.float64)
        values = np.where(np.isnan(values), -1, values)
        wrong = (values < -1) | (values >= limit) | (values != np.floor(values))
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise DataError("D06", f"{path}: {part}_labels[{row}] = {values[row]:g}, class count is {limit}")
        columns.append(values.astype(np.int64))
    labels = np.concatenate(columns)
    known = labels >= 0
    largest = int(labels.max(initial=0))
    names = class_names or tuple(str(i) for i in range(max(2, largest + 1)))
    return LabelTable(task or ("binary" if len(names) == 2 else "multiclass"), labels[known], names, known)


def _multi(path: Path, raw: Mapping[str, npt.NDArray[Any]], width: int, class_names: tuple[str, ...]) -> LabelTable:
    names = class_names or tuple(str(i) for i in range(width))
    if len(names) != width:
        raise DataError("D09", f"{path}: labels have {width} columns but there are {len(names)} class names")
    for part, array in raw.items():
        values = np.asarray(array, dtype=np.float64).reshape(-1, width)
        wrong = (values < 0) | (values > 1)
        if wrong.any():
            row, column = (int(i) for i in np.argwhere(wrong)[0])
            value = values[row, column]
            raise DataError("D06", f"{path}: {part}_labels[{row}, {column}] = {value:g}, expected 0 to 1 or NaN")
    labels = np.concatenate([np.asarray(a, dtype=np.float32).reshape(-1, width) for a in raw.values()])
    return LabelTable("multilabel", labels, names, np.ones(len(labels), dtype=bool))
