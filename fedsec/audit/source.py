"""Source inference: is the hospital of a training image named correctly more often than the image itself betrays it?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsec.audit.blind import features, held_out
from fedsec.findings import SourceGuesses
from fedsec.metrics.membership import Interval
from fedsec.metrics.statistics import clopper_pearson

if TYPE_CHECKING:
    from fedsec.audit.exam import Exam


def compare_sources(guesses: Sequence[SourceGuesses], exam: Exam) -> dict[str, Any]:
    """Accuracy of each method on the members, against three baselines; only the lift over the best is leakage.

    Baselines: one in K, the largest client's share, and a classifier that sees the pixels alone.
    """
    cohort, dataset = exam.cohort, exam.dataset
    member = cohort.member
    owner = cohort.owner[member]
    clients, counts = np.unique(owner, return_counts=True)
    x, _ = dataset.batch(cohort.rows[member])
    _, index = np.unique(owner, return_inverse=True)
    blind = 0.0
    if counts.min() >= 10 and len(clients) > 1:
        scores = held_out(features(x), index, dataset.groups()[cohort.rows[member]], exam.seed)
        blind = max(float((_decided(p) == index).mean()) for p in scores.values())
    baselines = {
        "one in K": 1 / len(clients),
        "largest client": float(counts.max() / len(owner)),
        "pixels alone": blind,
    }
    best = max(baselines.values())
    level = 1 - 0.05 / len(guesses)
    methods = {g.method: _accuracy(g.clients[member] == owner, best, level) for g in guesses}
    name = max(methods, key=lambda key: methods[key]["accuracy"].low)
    chosen = methods[name]
    confusion = np.zeros((len(clients), len(clients)), dtype=int)
    guessed = next(g.clients for g in guesses if g.method == name)[member]
    np.add.at(confusion, (index, np.searchsorted(clients, guessed).clip(max=len(clients) - 1)), 1)
    smallest = int(clients[counts.argmin()])
    return {
        "methods": methods,
        "method": name,
        "accuracy": chosen["accuracy"],
        "lift": chosen["lift"],
        "baselines": baselines,
        "smallest_client": {"client": smallest, "accuracy": float((guessed == owner)[owner == smallest].mean())},
        "confusion": confusion.tolist(),
        "verdict": (
            "Given an image that was used for training, the hospital it came from is named correctly "
            f"{100 * chosen['accuracy'].value:.0f} % of the time; without the updates the best guess is right "
            f"{100 * best:.0f} % of the time"
        ),
    }


def _decided(p: NDArray[np.float64]) -> NDArray[np.int64]:
    return p.argmax(1) if p.ndim > 1 else (p > 0.5).astype(np.int64)


def _accuracy(right: NDArray[np.bool_], baseline: float, level: float) -> dict[str, Interval]:
    """Accuracy, and its lift over the best baseline."""
    share = float(right.mean())
    low, high = (float(v) for v in clopper_pearson(right.sum(), len(right), 1 - level))
    return {
        "accuracy": Interval(share, low, high, len(right), "clopper-pearson", level),
        "lift": Interval(
            share - baseline, low - baseline, high - baseline, len(right), "clopper-pearson, baseline fixed", level
        ),
    }
