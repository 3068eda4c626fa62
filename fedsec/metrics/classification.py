"""How well does a classifier rank and decide: single measures, for one test set or for all its bootstrap draws at once.

Every function takes optional `weights`, (N,) or (N, d) counts, and returns one value for each of d columns; without
weights, or with (N,), it returns a 0-d array. Draws are columns because sums over images then run along whole rows
of memory. A value that is undefined, because a class has no image, is NaN.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def auc_binary(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """Area under the ROC curve: P(positive scores higher than negative) + P(tie)/2 (Hanley and McNeil 1982).

    `scores` (N,), `labels` (N,) of 0/1. One sort serves all draws.
    """
    positive, negative = _by_threshold(scores, labels, weights)
    below = np.cumsum(negative, axis=0) - negative / 2
    return _ratio((positive * below).sum(0), positive.sum(0) * negative.sum(0))


def sensitivity_at_specificity(
    scores: ArrayLike, labels: ArrayLike, specificity: float = 0.9, weights: ArrayLike | None = None
) -> Array:
    """Largest sensitivity among the thresholds of these images whose specificity is at least the one asked for.

    `scores` (N,), `labels` (N,) of 0/1; images at the threshold count as positive. It is read off the ROC curve of
    the very images it describes, and so is slightly optimistic on few negatives.
    """
    positive, negative = _by_threshold(scores, labels, weights)
    found, false_alarms = np.cumsum(positive[::-1], axis=0), np.cumsum(negative[::-1], axis=0)
    positives, negatives = found[-1], false_alarms[-1]
    allowed = false_alarms <= (1 - specificity) * negatives + 1e-9
    best = np.where(allowed, found, 0.0).max(0)
    return np.where(negatives > 0, _ratio(best, positives), np.nan)


def has_both(targets: ArrayLike) -> NDArray[np.bool_]:
    """Which columns of (N, C) targets (1, 0, NaN unknown) hold a positive and a negative image; (C,)."""
    targets = np.asarray(targets, dtype=np.float64)
    return np.asarray((targets == 1).any(0) & (targets == 0).any(0))


def auc_by_class(scores: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """AUC of every column of (N, C) scores against (N, C) targets (1, 0, NaN unknown), shape (C,) or (C, d)."""
    scores, targets = np.asarray(scores, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    columns = []
    for column in range(targets.shape[1]):
        known = ~np.isnan(targets[:, column])
        part = None if weights is None else np.asarray(weights)[known]
        columns.append(auc_binary(scores[known, column], targets[known, column], part))
    return np.stack(columns)


def macro_auc(scores: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """Mean AUC over the columns of (N, C) targets (1, 0, NaN unknown) that have both positives and negatives.

    For several exclusive classes give one-hot targets and class probabilities: unweighted one-vs-rest. Which
    columns count is decided on all images, not anew in each draw.
    """
    counted = has_both(targets)
    if not counted.any():
        return np.full(() if weights is None else np.shape(weights)[1:], np.nan)
    return np.asarray(
        auc_by_class(np.asarray(scores)[:, counted], np.asarray(targets)[:, counted], weights).mean(0),
    )


def accuracy(predictions: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """Share of (N,) predictions that equal the label."""
    correct = (np.asarray(predictions) == np.asarray(labels)).astype(np.float64)
    w = _weights(weights, len(correct))
    return _ratio(correct @ w, w.sum(0))


def balanced_accuracy(predictions: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """Mean over the classes that occur in (N,) `labels` of the share of their images that is predicted right."""
    labels = np.asarray(labels)
    members = (labels[:, None] == np.unique(labels)).astype(np.float64)
    correct = (np.asarray(predictions) == labels).astype(np.float64)
    w = _weights(weights, len(labels))
    if not len(labels):
        return np.full(w.shape[1:], np.nan)
    return np.asarray(_ratio((members * correct[:, None]).T @ w, members.T @ w).mean(0))


def quadratic_weighted_kappa(
    predictions: ArrayLike, labels: ArrayLike, num_classes: int, weights: ArrayLike | None = None
) -> Array:
    """Cohen's kappa with weights (i − j)² for grades 0 … num_classes − 1 (Cohen 1968). Undefined for one grade only."""
    predictions, labels = np.asarray(predictions, dtype=np.int64), np.asarray(labels, dtype=np.int64)
    w, grades = _weights(weights, len(labels)), np.arange(num_classes)
    predicted = (predictions[:, None] == grades).astype(np.float64)
    true = (labels[:, None] == grades).astype(np.float64)
    disagreement = (grades[:, None] - grades) ** 2.0
    observed = (predictions - labels) ** 2.0 @ w
    expected = ((true.T @ w) * (disagreement @ (predicted.T @ w))).sum(0)
    return 1 - _ratio(observed * w.sum(0), expected)


def _by_threshold(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None) -> tuple[Array, Array]:
    """Weight of positives and of negatives at each distinct score, lowest first; both (T,) or (T, d)."""
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    w = _weights(weights, len(scores))
    if not len(scores):
        return np.zeros((1, *w.shape[1:])), np.zeros((1, *w.shape[1:]))
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) > 0]))
    w, is_positive = w[order], labels[order] == 1
    positive = (w.T * is_positive).T
    negative = w - positive
    if len(starts) == len(scores):
        return positive, negative
    return np.add.reduceat(positive, starts, axis=0), np.add.reduceat(negative, starts, axis=0)


def _weights(weights: ArrayLike | None, n: int) -> Array:
    return np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)


def _ratio(part: Array, whole: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(whole > 0, part / whole, np.nan))
