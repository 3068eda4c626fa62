"""The guard against comparing two kinds of images: a classifier that tells members from others *without the model*.

Where it succeeds, so would any "membership attack", and its success would say nothing about the model (Das et al.
2024, "Blind baselines beat membership inference attacks for foundation models").
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedsec.metrics.membership import Interval, auc

Array = NDArray[np.float64]
FOLDS, POOLED, BINS = 5, 12, 16
LIMIT = 0.55
"""Blind AUC above which a comparison of members and non-members is not valid."""
Status = Literal["ok", "warning", "invalid"]


def features(images: Tensor, extra: NDArray[np.float64] | None = None) -> Array:
    """(N, F): 12x12 average-pooled pixels, a 16-bin histogram, and further columns such as the original size.

    Args:
        images: (N, C, H, W) in [0, 1]. extra: (N, K).
    """
    small = F.adaptive_avg_pool2d(images.float(), POOLED).flatten(1).numpy().astype(np.float64)
    flat = (images.flatten(1).clamp(0, 1) * (BINS - 1e-6)).long()
    counts = torch.zeros(len(images), BINS).scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))
    parts = [small, (counts / flat.shape[1]).numpy().astype(np.float64)]
    return np.concatenate(parts if extra is None else [*parts, extra], axis=1)


def held_out(x: Array, y: NDArray[np.int64], groups: NDArray[np.str_], seed: int) -> dict[str, Array]:
    """Learner -> out-of-fold probabilities: (N,) of class 1 of two, else (N, classes).

    Five folds, patients never split. Logistic regression, and gradient-boosted trees.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed % 2**32)
    split = list(folds.split(x, y, groups))
    learners = {
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)),
        "gradient boosting": HistGradientBoostingClassifier(
            max_iter=30, learning_rate=0.2, max_leaf_nodes=8, random_state=seed % 2**32
        ),
    }
    found = {}
    for name, learner in learners.items():
        p = cross_val_predict(learner, x, y, cv=split, method="predict_proba")
        found[name] = np.asarray(p[:, 1] if p.shape[1] == 2 else p, dtype=np.float64)
    return found


def blind_auc(
    images: Tensor,
    member: NDArray[np.bool_],
    groups: NDArray[np.str_],
    seed: int,
    extra: NDArray[np.float64] | None = None,
) -> tuple[Interval, Array]:
    """The better learner's AUC, and its out-of-fold scores (N,).

    Args:
        images: (N, C, H, W). member: (N,). groups: (N,) patients.
    """
    scores = held_out(features(images, extra), member.astype(np.int64), groups, seed)
    rng = np.random.default_rng(seed % 2**32)
    found = []
    for name, score in scores.items():
        order = np.concatenate([groups[member], groups[~member]])
        value = auc(score[member], score[~member], generator=rng, groups=order, draws=500)
        found.append((value, name, score))
    best = max(found, key=lambda item: item[0].value)
    value = best[0]
    named = Interval(value.value, value.low, value.high, value.n, f"bootstrap, {best[1]}", value.level)
    return named, best[2]


def verdict(blind: Interval) -> tuple[Status, str]:
    """Is a comparison of these two sets evidence of memorisation? (spec §1.5)."""
    text = f"a program without the model tells the two sets apart with AUC {blind.value:.3f}"
    if blind.value > LIMIT:
        return (
            "invalid",
            f"members and non-members differ too much: {text} (limit {LIMIT}); use held-out images of the same origin",
        )
    if blind.low > 0.5:
        return "warning", f"{text}, which is more than chance: read every membership number beside it"
    return "ok", f"{text}: no better than chance"
