"""Attribute probes: what sharing features reveals, and, separately, what only training on an image adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsec.findings import TraitGuess
from fedsec.metrics.classification import auc_binary
from fedsec.metrics.membership import Interval, auc
from fedsec.metrics.statistics import bootstrap_weights

if TYPE_CHECKING:
    from fedsec.audit.exam import Exam

SMALLEST = 200


def compare_traits(guesses: Sequence[TraitGuess], exam: Exam, generator: np.random.Generator) -> dict[str, Any]:
    """AUC from features, from pixels, and on members minus on non-members: only the last is leakage of training."""
    cohort = exam.cohort
    groups = exam.dataset.groups()[cohort.rows]
    rows: list[dict[str, Any]] = []
    unknown: dict[str, int] = {}
    level = 1 - 0.05 / max(1, len(guesses))
    for guess in guesses:
        values = exam.traits()[guess.trait][cohort.rows]
        known = values != ""
        unknown[guess.trait] = int((~known).sum())
        truth = values == guess.value
        sides = [known & (cohort.member == side) for side in (True, False)]
        if min(int(side.sum()) for side in sides) < SMALLEST:
            continue
        rows.append(
            {
                "trait": guess.trait,
                "value": guess.value,
                "features": _auc(guess.scores, truth, known, groups, generator),
                "pixels": _auc(guess.from_pixels, truth, known, groups, generator),
                "gap": _gap(guess.scores, truth, sides, groups, generator, level),
            }
        )
    leaks = [f"{row['trait']}" for row in rows if row["gap"].low > 0]
    text = (
        f"Attributes of training images are read off better than those of others: {', '.join(leaks)}"
        if leaks
        else "Attributes of training images are read off no better than those of images the model never saw"
        if rows
        else f"No attribute could be compared: fewer than {SMALLEST} images a side with a known value"
    )
    return {"rows": rows, "unknown": unknown, "verdict": text}


def _auc(scores: Any, truth: Any, known: Any, groups: Any, generator: np.random.Generator) -> Interval:
    yes, no = known & truth, known & ~truth
    order = np.concatenate([groups[yes], groups[no]])
    return auc(scores[yes], scores[no], generator=generator, groups=order, draws=1000)


def _gap(scores: Any, truth: Any, sides: Any, groups: Any, generator: np.random.Generator, level: float) -> Interval:
    """AUC on members minus AUC on non-members; patients are resampled within each side."""
    values, drawn = [], []
    for side in sides:
        blocks = bootstrap_weights(int(side.sum()), generator=generator, draws=1000, groups=groups[side])
        values.append(float(auc_binary(scores[side], truth[side])))
        drawn.append(np.concatenate([auc_binary(scores[side], truth[side], block) for block in blocks]))
    low, high = np.nanquantile(drawn[0] - drawn[1], [(1 - level) / 2, (1 + level) / 2])
    count = int(sides[0].sum() + sides[1].sum())
    return Interval(values[0] - values[1], float(low), float(high), count, "bootstrap", level)
