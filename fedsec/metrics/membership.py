"""How well can members be told from non-members: AUC, TPR at a low FPR, advantage, and what could not have been seen.

Scores are larger for members. Sources: Carlini et al. 2022 (TPR at low FPR); Hanley & McNeil 1982 (AUC).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtrc, bdtri, ndtr, ndtri

from fedsec.metrics.classification import auc_binary
from fedsec.metrics.statistics import bootstrap, clopper_pearson
from fedsec.privacy.gdp import mu_of

Array = NDArray[np.float64]
RATES = (1e-2, 1e-3)
"""False-positive rates at which the true-positive rate is asked for."""
FEW, ENOUGH = 3, 10
"""Expected false positives below which a TPR is not printed, and from which it needs no remark."""


@dataclass(frozen=True)
class Interval:
    """A number with its interval and how that was made: every number of an audit is one of these."""

    value: float
    low: float
    high: float
    n: int
    method: str
    level: float = 0.95
    extra: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON form; NaN becomes null."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        plain = {k: None if v != v else float(v) for k, v in numbers.items()}
        return {**plain, "level": self.level, "method": self.method, "n": int(self.n), **(self.extra or {})}


def auc(
    members: ArrayLike,
    others: ArrayLike,
    *,
    generator: np.random.Generator,
    groups: ArrayLike | None = None,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """AUC of member scores (n1,) over non-member scores (n0,), ties one half; patients are resampled whole.

    Args:
        groups: (n1 + n0,) patients, members first.
    """
    scores = np.concatenate([np.asarray(members, float), np.asarray(others, float)])
    truth = np.concatenate([np.ones(len(np.asarray(members))), np.zeros(len(np.asarray(others)))])
    ranks = np.unique(scores, return_inverse=True)[1].astype(np.float64)  # infinite scores rank, too
    value = bootstrap(auc_binary, ranks, truth, generator=generator, groups=groups, draws=draws, level=level)
    return Interval(value.value, value.low, value.high, value.n, "bootstrap", level)


def threshold_at(others: ArrayLike, rate: float) -> float:
    """The score that at most ⌊rate·n0⌋ non-members exceed: their (⌊rate·n0⌋+1)-th largest; "above" is strict."""
    descending = np.sort(np.asarray(others, dtype=np.float64))[::-1]
    return float(descending[min(math.floor(rate * len(descending) + 1e-9), len(descending) - 1)])


def tpr_at(members: ArrayLike, others: ArrayLike, rate: float, error: float = 0.05) -> Interval | dict[str, str]:
    """Share of members above the threshold for this false-positive rate, with its interval.

    Clopper-Pearson on the effective number of members: the threshold is fitted on n0 non-members, which adds
    (dTPR/dFPR)² α(1 − α)/n0 to the variance (Pepe 2003, section 5.2). Plain Clopper-Pearson, as if the threshold were
    known, finds a leak in 7 to 9 % of audits without one, where it should in 2.5 %.

    Returns:
        the share, with `false_positives` as they were counted; or why it cannot be resolved: three expected false
        positives are the least, so that a TPR at 0.1 % FPR needs 3,000 non-members to be shown at all.
    """
    members, others = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    expected = math.floor(rate * len(others) + 1e-9)
    if expected < FEW or not len(members):
        return {"not_resolvable": f"needs {round(ENOUGH / rate):,} non-members, there are {len(others):,}"}
    level = threshold_at(others, rate)
    found, false = int((members > level).sum()), int((others > level).sum())
    share = found / len(members)
    wider = [float((members > threshold_at(others, r)).mean()) for r in (rate / 2, 2 * rate)]
    slope = min(max((wider[1] - wider[0]) / (1.5 * rate), 1.0), max(share / rate, 1.0))
    own = max(share * (1 - share), rate * (1 - rate)) / len(members)
    effective = len(members) * own / (own + slope**2 * rate * (1 - rate) / len(others))
    low, high = clopper_pearson(share * effective, effective, error)
    extra: dict[str, Any] = {"false_positives": f"{false} of {len(others):,}", "fpr": rate}
    if expected < ENOUGH:
        extra["remark"] = "few false positives: the threshold itself is uncertain"
    method = "clopper-pearson, threshold estimated"
    return Interval(share, float(low), float(high), len(members), method, 1 - error, extra)


def advantage(members: ArrayLike, others: ArrayLike, *, generator: np.random.Generator) -> Interval:
    """Balanced advantage max(TPR − FPR), cross-fitted: the threshold comes from one half, the value from the other.

    The maximum on the very scores it is chosen on is above 0 without any leakage (spec §3.1, A25). The interval is
    the normal one of two independent halves.
    """
    members, others = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    halves = [[x[half] for half in np.array_split(generator.permutation(len(x)), 2)] for x in (members, others)]
    values, variances = [], []
    for fit, test in ((0, 1), (1, 0)):
        level = best_threshold(halves[0][fit], halves[1][fit])
        tpr, fpr = float((halves[0][test] > level).mean()), float((halves[1][test] > level).mean())
        values.append(tpr - fpr)
        variances.append(tpr * (1 - tpr) / len(halves[0][test]) + fpr * (1 - fpr) / len(halves[1][test]))
    value, error = float(np.mean(values)), 1.96 * math.sqrt(sum(variances)) / 2
    return Interval(value, value - error, value + error, len(members) + len(others), "cross-fitted, normal")


def best_threshold(members: ArrayLike, others: ArrayLike) -> float:
    """The score above which TPR − FPR is largest, on these scores."""
    fpr, tpr, levels = roc(members, others)
    return float(levels[np.argmax(tpr - fpr)])


def roc(members: ArrayLike, others: ArrayLike) -> tuple[Array, Array, Array]:
    """False- and true-positive rate (K,) of "score strictly above", at every distinct threshold (K,), rising."""
    members = np.sort(np.asarray(members, dtype=np.float64))
    others = np.sort(np.asarray(others, dtype=np.float64))
    levels = np.concatenate([np.unique(np.concatenate([members, others]))[::-1], [-np.inf]])
    above = [1 - np.searchsorted(x, levels, side="right") / max(1, len(x)) for x in (others, members)]
    return above[0], above[1], levels


def smallest_visible(members: int, others: int, rate: float = 0.01) -> dict[str, float]:
    """What an audit of this size would have noticed with 80 % probability at the 5 % level: a TPR and an AUC.

    TPR: smallest p with P[Bin(n1, p) ≥ k] ≥ 0.8, k the smallest with P[Bin(n1, rate) ≥ k] ≤ 0.05 (the threshold's own
    uncertainty is left out). AUC: ½ + 2.486 √((n1 + n0 + 1)/(12 n1 n0)), the null standard error of Mann-Whitney.
    """
    k = int(np.argmax(bdtrc(np.arange(members), members, rate) <= 0.05)) + 1
    tpr = float(1 - bdtri(members - k, members, 0.8)) if k <= members else 1.0
    return {"tpr": tpr, "auc": 0.5 + 2.486 * math.sqrt((members + others + 1) / (12 * members * others))}


def claimed_tpr(rate: ArrayLike, epsilon: float, delta: float) -> Array:
    """Largest TPR that (ε, δ)-DP allows at a false-positive rate (Kairouz, Oh & Viswanath 2015, theorem 2.1)."""
    rate = np.asarray(rate, dtype=np.float64)
    grown = math.exp(min(epsilon, 700.0))
    return np.clip(np.minimum(grown * rate + delta, 1 - (1 - delta - rate) / grown), 0, 1)


def gaussian_tpr(rate: ArrayLike, epsilon: float, delta: float) -> Array:
    """The same for the μ-GDP mechanism that is just (ε, δ)-DP (Dong, Roth & Su 2019): full participation only."""
    return np.asarray(ndtr(ndtri(np.asarray(rate, dtype=np.float64)) + mu_of(epsilon, delta)))


def claimed_advantage(epsilon: float, delta: float) -> float:
    """Largest TPR − FPR under (ε, δ)-DP: (e^ε − 1 + 2δ)/(e^ε + 1)."""
    return float(math.tanh(epsilon / 2) + 2 * delta / (math.exp(min(epsilon, 700.0)) + 1))
