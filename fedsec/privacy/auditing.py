"""How large must ε have been, given which canaries were recognised? Lower bounds from one training, with their error.

m canaries were each included by a fair coin before training. From the scores the auditor guesses for r of them,
"in" for the highest and "out" for the lowest, and v guesses are right. Bounds hold with probability 1 − β at least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import bdtrc, ndtr, ndtri
from scipy.stats import binom, nct

from fedsec.metrics.statistics import clopper_pearson
from fedsec.privacy.gdp import epsilon_of

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
ERROR = 0.05
SHARE = 0.1
"""Of the canaries that are guessed, half at each end; fixed before anybody looks (spec §4.5)."""
LARGEST = 60.0
LARGE_T = 30.0
ANDERSON = 1.035
"""Critical value at 1 % of the Anderson-Darling statistic with both moments fitted (Stephens 1974, table 4)."""


@dataclass(frozen=True)
class Guesses:
    """How a fixed number of guesses came out."""

    canaries: int
    made: int
    right: int


def guess(scores: ArrayLike, included: Mask, share: float = SHARE) -> Guesses:
    """Guess for a share of the canaries, fixed beforehand: half at each end. Ties are broken by position.

    Args:
        scores: (m,), larger: rather included. included: (m,) bool.
    """
    scores = np.asarray(scores, dtype=np.float64)
    m = len(scores)
    each = max(1, round(share * m / 2))
    order = np.argsort(scores, kind="stable")
    right = int((~included[order[:each]]).sum() + included[order[m - each :]].sum())
    return Guesses(m, 2 * each, right)


def one_run_p(epsilon: float, g: Guesses, delta: float) -> float:
    """Largest probability of so many right guesses under (ε, δ)-DP (Steinke, Nasr & Jagielski 2023, theorem 5.2).

    P[Bin(r, q) ≥ v] + 2mδ · max over 1 ≤ i ≤ v of P[v − i ≤ Bin(r, q) < v]/i, with q = e^ε/(1 + e^ε).
    """
    q, r, v = 1 / (1 + math.exp(-epsilon)), g.made, g.right
    if v == 0:
        return 1.0
    tail = float(bdtrc(v - 1, r, q))
    if delta == 0:
        return tail
    below = np.cumsum(binom.pmf(np.arange(v - 1, -1, -1), r, q)) / np.arange(1, v + 1)
    return min(1.0, tail + 2 * g.canaries * delta * float(below.max()))


def one_run_epsilon(g: Guesses, delta: float, error: float = ERROR) -> float:
    """Largest ε that so many right guesses refute; 0 where they refute none. No assumption beside the fair coins."""
    if one_run_p(0.0, g, delta) >= error:
        return 0.0
    low, high = 0.0, LARGEST
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if one_run_p(middle, g, delta) < error else (low, middle)
    return low


def one_run_ceiling(canaries: int, delta: float, error: float = ERROR) -> float:
    """What m canaries can show at most, when every guess is right; for δ = 0 that is −ln(β^(−1/m) − 1)."""
    return one_run_epsilon(Guesses(canaries, canaries, canaries), delta, error)


def gaussian_refuted(mu: float, g: Guesses, error: float = ERROR) -> bool:
    """Are so many right guesses too many for any μ-GDP mechanism? (Mahloujifar et al. 2025, algorithm 3).

    The recursion bounds the joint mass of right and wrong guesses from v downwards with the curve
    B(x) = Φ(Φ⁻¹(x) − μ); it starts from the assumption that v right guesses have probability β.
    """
    m, r, v = g.canaries, g.made, g.right
    a, h = error * v / m, error * (r - v) / m
    for i in range(v - 1, -1, -1):
        grown = max(h, float(ndtr(ndtri(min(a, 1.0)) - mu)))
        if grown == h and i < v - 1:
            break
        a = min(1.0, a + i / (r - i) * (grown - h))
        h = grown
    return a + h > r / m


def fdp_epsilon(g: Guesses, delta: float, error: float = ERROR) -> float:
    """Largest ε at δ of a μ-GDP mechanism that the guesses refute: assumes a Gaussian trade-off curve."""
    if g.right == 0 or not gaussian_refuted(1e-6, g, error):
        return 0.0
    low, high = 1e-6, 20.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_refuted(middle, g, error) else (low, middle)
    return epsilon_of(low, delta)


def rates_epsilon(found: ArrayLike, included: ArrayLike, false: ArrayLike, left_out: ArrayLike, delta: float,
                  error: float = ERROR) -> Array:  # fmt: skip
    """ln((TPR − δ)/FPR) from Clopper-Pearson limits, each one-sided at β/2, for a threshold fixed beforehand.

    Args:
        found: included canaries above the threshold, of `included`. false: others above it, of `left_out`.
    """
    tpr, _ = clopper_pearson(found, included, error)
    _, fpr = clopper_pearson(false, left_out, error)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.maximum(0.0, np.log(np.maximum(tpr - delta, 0) / fpr))


def rates_ceiling(each: int, delta: float, error: float = ERROR) -> float:
    """What `each` canaries a side can show at most by their rates."""
    return float(rates_epsilon(each, each, 0, each, delta, error))


def split_rates_epsilon(scores: ArrayLike, included: Mask, delta: float, generator: np.random.Generator,
                        error: float = ERROR) -> float:  # fmt: skip
    """`rates_epsilon` with the threshold chosen on one half of the canaries, and the bound from the other."""
    scores, order = np.asarray(scores, dtype=np.float64), generator.permutation(len(np.asarray(scores)))
    fit, test = np.array_split(order, 2)
    levels = np.unique(scores[fit])
    inside, outside = np.sort(scores[fit][included[fit]]), np.sort(scores[fit][~included[fit]])
    if not len(inside) or not len(outside):
        return 0.0
    above_in = len(inside) - np.searchsorted(inside, levels, side="right")
    above_out = len(outside) - np.searchsorted(outside, levels, side="right")
    level = levels[np.argmax(rates_epsilon(above_in, len(inside), above_out, len(outside), delta, error))]
    top, own = scores[test] > level, included[test]
    if own.all() or not own.any():
        return 0.0
    return float(rates_epsilon((top & own).sum(), own.sum(), (top & ~own).sum(), (~own).sum(), delta, error))


@dataclass(frozen=True)
class GaussianEstimate:
    """Mean shift of Gaussian scores: an estimate under an assumption, never a proof."""

    mu: float
    mu_low: float
    epsilon: float
    hidden: str = ""
    """Why it must not be shown."""


def gaussian_epsilon(scores: ArrayLike, included: Mask, delta: float) -> GaussianEstimate:
    """ε of the Gaussian mechanism whose shift is the lower limit of the scores' (one-sided, β = 5 %).

    μ̂ = (mean_in − mean_out)/s_pooled; its lower limit is `shift_limit`. Hidden where Anderson-Darling rejects a normal
    shape at 1 % or the variance ratio leaves [0.8, 1.25] by more than chance.
    """
    scores = np.asarray(scores, dtype=np.float64)
    inside, outside = scores[included], scores[~included]
    n1, n0 = len(inside), len(outside)
    if min(n1, n0) < 10:
        return GaussianEstimate(0.0, 0.0, 0.0, "fewer than 10 canaries on one side")
    variances = inside.var(ddof=1), outside.var(ddof=1)
    pooled = math.sqrt(((n1 - 1) * variances[0] + (n0 - 1) * variances[1]) / (n1 + n0 - 2))
    if pooled == 0:
        return GaussianEstimate(0.0, 0.0, 0.0, "all scores are equal")
    mu = (inside.mean() - outside.mean()) / pooled
    low = shift_limit(mu, n1, n0)
    reason = ""
    if max(anderson(inside), anderson(outside)) > ANDERSON:
        reason = "the scores are not normally distributed (Anderson-Darling, 1 %)"
    elif not 0.8 <= variances[0] / variances[1] <= 1.25:
        reason = f"the two groups' variances differ (ratio {variances[0] / variances[1]:.2f})"
    return GaussianEstimate(mu, low, epsilon_of(low, delta) if low > 0 else 0.0, reason)


def shift_limit(mu: float, n1: int, n0: int, error: float = ERROR) -> float:
    """One-sided lower limit of a standardised mean shift between groups of n1 and n0 normal values.

    Below 100 values exact, by the non-central t distribution; from there μ̂ − z √(1/n1 + 1/n0 + μ̂²/(2 (n1 + n0))). The
    last term is the error of the pooled standard deviation: without it the limit is too high in 8 % of all audits at
    μ = 1.67, not 5 %.
    """
    scale = math.sqrt(1 / n1 + 1 / n0)
    t, freedom = mu / scale, n1 + n0 - 2
    if n1 + n0 >= 100 or abs(t) > LARGE_T:  # beyond, the non-central t distribution underflows
        return mu + float(ndtri(error)) * math.sqrt(scale**2 + mu * mu / (2 * (n1 + n0)))
    width = 6 * math.sqrt(scale**2 + mu * mu / (2 * freedom)) + 1
    return float(brentq(lambda m: nct.sf(t, freedom, m / scale) - error, mu - width, mu + width)) if t else 0.0


def anderson(x: ArrayLike) -> float:
    """Anderson-Darling statistic against a normal distribution with fitted moments, with Stephens' correction."""
    x = np.sort(np.asarray(x, dtype=np.float64))
    n = len(x)
    z = np.clip(ndtr((x - x.mean()) / x.std(ddof=1)), 1e-300, 1 - 1e-16)
    i = np.arange(1, n + 1)
    a2 = -n - float(((2 * i - 1) * (np.log(z) + np.log1p(-z[::-1]))).mean())
    return a2 * (1 + 0.75 / n + 2.25 / n**2)


def step_score(sums: ArrayLike, noise_multiplier: float, q: float) -> Array:
    """Log-likelihood ratio of a canary from every noised sum: Λ = Σ_t ln(1 − q + q e^((2 s_t − 1)/(2 z²))).

    Args:
        sums: (m, T) canary coordinate of the noised sums, divided by the clip norm. q: Poisson probability.
    """
    s, z = np.asarray(sums, dtype=np.float64), noise_multiplier
    absent = math.log1p(-q) if q < 1 else -np.inf
    return np.asarray(np.logaddexp(absent, math.log(q) + (2 * s - 1) / (2 * z * z)).sum(1))
