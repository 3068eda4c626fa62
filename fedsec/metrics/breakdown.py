"""How many malicious clients does a rule bear? The paired loss of AUC, and the search for the breakdown point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fedsec.metrics import classification
from fedsec.metrics.one_vs_rest import questions
from fedsec.metrics.statistics import bootstrap_weights, estimate
from fedsec.metrics.utility import Values
from fedsec.types import Estimate, Task

DROP = 0.05
"""Loss of AUC from which a rule counts as broken."""


def auc_drop(
    reference: Values,
    attacked: Values,
    labels: Values,
    task: Task,
    *,
    generator: np.random.Generator,
    positive_class: int | None = 1,
    groups: ArrayLike | None = None,
    draws: int = 1000,
) -> Estimate:
    """AUC of one model minus that of another on the same images, both drawn together.

    Args:
        reference, attacked: (N, C) scores of the two models, as in `utility`.
        labels, task, positive_class, groups, draws: as in `utility`.
        generator: draws the bootstrap.
    """
    first = questions(reference, labels, task, positive_class=positive_class, groups=groups)
    second = questions(attacked, labels, task, positive_class=positive_class, groups=groups)
    sampled = [
        classification.macro_auc(first.margins, first.targets, weights)
        - classification.macro_auc(second.margins, second.targets, weights)
        for weights in bootstrap_weights(first.n, generator=generator, draws=draws, groups=first.groups)
    ]
    value = float(
        classification.macro_auc(first.margins, first.targets)
        - classification.macro_auc(second.margins, second.targets)
    )
    return estimate(value, np.concatenate(sampled), first.n, first.units())


def broken(drop: Estimate, threshold: float = DROP) -> bool:
    """At least `threshold` is lost, and the lower end of the interval is above zero."""
    return drop.value >= threshold and drop.low > 0


@dataclass(frozen=True)
class Breakdown:
    """What a search has found so far."""

    point: int | None
    """Fewest malicious clients under which the rule breaks; None: it held everywhere it was tried."""
    limit: int
    """Most malicious clients that are considered, ⌊(n − 1)/2⌋."""
    monotone: bool
    """More attackers never did less harm; else all numbers were tried and the smallest that breaks it counts."""


def next_to_try(outcome: Mapping[int, bool], limit: int) -> int | None:
    """The next number of malicious clients to try; None once the breakdown point is known.

    Bisection, then the neighbour above; where an outcome contradicts a threshold, every number is tried.

    Args:
        outcome: number of malicious clients -> did the rule break. limit: the largest number.
    """
    held, fell = 0, limit + 1
    while fell - held > 1:
        middle = (held + fell) // 2
        if middle not in outcome:
            return middle
        held, fell = (held, middle) if outcome[middle] else (middle, fell)
    if fell + 1 <= limit and fell + 1 not in outcome:
        return fell + 1
    if not _threshold(outcome, fell):
        return next((f for f in range(1, limit + 1) if f not in outcome), None)
    return None


def breakdown(outcome: Mapping[int, bool], limit: int) -> Breakdown:
    """The result of a finished search."""
    fallen = [f for f, bad in outcome.items() if bad]
    point = min(fallen, default=None)
    return Breakdown(point, limit, _threshold(outcome, limit + 1 if point is None else point))


def _threshold(outcome: Mapping[int, bool], point: int) -> bool:
    return all(bad == (f >= point) for f, bad in outcome.items())
