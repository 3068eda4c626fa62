"""Which yes/no questions does a test set ask: the scores and labels of any task, as one column a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from torch import Tensor

from fedsec.metrics.classification import has_both
from fedsec.types import Task

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Questions:
    """N images with at least one known label, and the K classes that have both positive and negative ones."""

    task: Task
    num_classes: int
    margins: Array
    """(N, K), higher for "yes"."""
    targets: Array
    """(N, K) of 1, 0 and NaN, unknown."""
    predictions: Array
    """(N,) classes, or (N, L) of 0/1 for several labels; −1 where the scores are not finite."""
    labels: Array
    """(N,), or (N, L) with NaN for unknown."""
    use: Bools
    """Which of the named classes the K columns are."""
    counted: tuple[str, ...]
    skipped: tuple[str, ...]
    """The other classes: no positive, or no negative image."""
    groups: NDArray[Any] | None

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def undecided(self) -> int:
        """Images whose scores are NaN or Inf."""
        first = self.predictions[:, 0] if self.predictions.ndim == 2 else self.predictions
        return int((first < 0).sum())

    def units(self, rows: Bools | None = None) -> int:
        """Independent units among these (N,) rows, or among all."""
        rows = np.ones(self.n, dtype=bool) if rows is None else rows
        return int(rows.sum()) if self.groups is None else len(np.unique(self.groups[rows]))


def as_array(values: ArrayLike | Tensor) -> Array:
    """A float64 array of numbers that may live in a tensor on any device."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def questions(
    scores: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    task: Task,
    *,
    class_names: Sequence[str] | None = None,
    positive_class: int | None = 1,
    groups: ArrayLike | None = None,
) -> Questions:
    """Split a test set into its yes/no questions; the arguments are those of `utility.utility`."""
    scores, labels = as_array(scores), as_array(labels)
    if scores.ndim != 2 or len(scores) != len(labels):
        raise ValueError(f"scores of shape {scores.shape} do not fit {len(labels)} labels; give (N, C) scores")
    columns = scores.shape[1]
    labels = labels if task == "multilabel" else labels.reshape(len(labels))
    if task == "multilabel" and labels.shape != scores.shape:
        raise ValueError(f"multi-label targets of shape {labels.shape} do not fit scores of shape {scores.shape}")
    if task == "binary" and columns != 2:
        raise ValueError(f"binary scores need 2 columns, not {columns}")
    names = tuple(str(c) for c in range(columns)) if class_names is None else tuple(class_names)
    if len(names) != columns:
        raise ValueError(f"{len(names)} class names for {columns} columns of scores")

    labels = np.where(labels >= 0, labels, np.nan)
    unknown = np.isnan(labels)
    known = ~(unknown.all(1) if task == "multilabel" else unknown)
    scores, labels = scores[known], labels[known]
    largest = labels[~np.isnan(labels)].max(initial=0)
    if largest > (1 if task == "multilabel" else columns - 1):
        raise ValueError(f"label {largest:g} has no column: there are {columns}, for task {task}")
    finite = np.asarray(np.isfinite(scores).all(1))[:, None]
    scores = np.where(finite, scores, 0.0)

    if task == "multilabel":
        threshold = 0.5 if scores.min(initial=0) >= 0 and scores.max(initial=0) <= 1 else 0.0
        margins = np.where(finite, scores - threshold, 0.0)
        targets, predictions = labels, np.where(finite, margins > 0, -1.0)
    elif task == "binary":
        positive = 1 if positive_class is None else positive_class
        margins = scores[:, [positive]] - scores[:, [1 - positive]]
        targets, names = (labels[:, None] == positive).astype(np.float64), (names[positive],)
        predictions = np.where(finite[:, 0], scores.argmax(1), -1.0)
    else:
        probabilities = scores if _sum_to_one(scores[finite[:, 0]]) else softmax(scores, axis=1)
        margins = np.where(finite, probabilities, 1 / columns)
        targets = (labels[:, None] == np.arange(columns)).astype(np.float64)
        predictions = np.where(finite[:, 0], scores.argmax(1), -1.0)
    use = has_both(targets)
    return Questions(
        task,
        columns,
        margins[:, use],
        targets[:, use],
        predictions,
        labels,
        use,
        counted=tuple(name for name, used in zip(names, use, strict=True) if used),
        skipped=tuple(name for name, used in zip(names, use, strict=True) if not used),
        groups=None if groups is None else np.asarray(groups)[known],
    )


def _sum_to_one(scores: Array) -> bool:
    return bool((scores >= 0).all()) and bool(np.allclose(scores.sum(1), 1, atol=1e-4))
