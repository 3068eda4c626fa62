"""Training sets with a small and a large share of a group, what models answer to queries, and who tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsec.findings import Candidates
from fedsec.metrics.signals import logits_of

Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]
FEWEST = 40
"""Images of a shadow's training set below which nothing is trained."""
STRENGTH = 0.1


@dataclass(frozen=True)
class Plan:
    """Which public images the shadows are trained on, and which they are asked about."""

    sets: tuple[Rows, ...]
    """Positions among the public images."""
    large: Mask
    """(M,) which of them have the large share."""
    queries: Rows


def subsets(has: Mask, known: Mask, shares: tuple[float, float], each: int, draw: np.random.Generator) -> Plan | None:
    """Equally large random sets, `each` for either share, from one half of the public images; the rest are queries.

    Args:
        has: (Z,) bool. known: (Z,) bool; others are queries only.

    Returns:
        None where the public images do not suffice.
    """
    order = draw.permutation(np.flatnonzero(known))
    pool, queries = np.array_split(order, 2)
    queries = np.sort(np.concatenate([queries, np.flatnonzero(~known)]))
    inside, outside = pool[has[pool]], pool[~has[pool]]
    size = int(min(len(inside) / max(shares), len(outside) / (1 - min(shares))))
    if size < FEWEST:
        return None
    sets, large = [], []
    for number in range(2 * each):
        share = shares[number % 2]
        count = round(share * size)
        chosen = [draw.choice(inside, count, replace=False), draw.choice(outside, size - count, replace=False)]
        sets.append(np.sort(np.concatenate(chosen)))
        large.append(number % 2 == 1)
    return Plan(tuple(sets), np.array(large), queries)


def answers(
    model: nn.Module, candidates: Candidates, queries: Rows, has: Mask, device: torch.device
) -> NDArray[np.float64]:
    """(4·C,) mean and standard deviation of each logit, over the queries with the property and those without."""
    logits = logits_of(model, candidates.population.images[torch.from_numpy(queries)], device)
    parts = []
    for side in (True, False):
        group = logits[has[queries] == side]
        parts += [group.mean(0), group.std(0)]
    return np.concatenate(parts).astype(np.float64)


def judged(
    seen: Sequence[NDArray[np.float64]], large: Mask, own: NDArray[np.float64], draw: np.random.Generator
) -> tuple[int, bool]:
    """How many models are told apart by a classifier that was not fitted on them, and what it says of the target.

    Args:
        seen: (F,) of each of the M models. large: (M,). own: (F,) of the target.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = np.stack(seen), large.astype(int)
    learner = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=300))
    folds = StratifiedKFold(5, shuffle=True, random_state=int(draw.integers(2**31)))
    right = int((cross_val_predict(learner, x, y, cv=folds) == y).sum())
    return right, bool(learner.fit(x, y).predict(own[None])[0])
