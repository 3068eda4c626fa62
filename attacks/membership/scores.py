"""Membership scores from signals, as pure functions. Larger: rather a member. NaN: the method has no answer.

N candidates, M shadows, Z images of the population. `contains` (M, N) says which shadow was trained on which candidate.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
POOLED_BELOW = 64
"""Shadows below which one standard deviation is fitted for all candidates: two or three values give no variance."""


def loss(log_p: Array) -> Array:
    """−loss of the target model (Yeom et al. 2018); (N,)."""
    return np.asarray(log_p, dtype=np.float64)


def lira(phi: Array, shadow_phi: Array, contains: Mask) -> Array:
    """Likelihood ratio, online (Carlini et al. 2022, algorithm 1): log N(φ; μ_in, σ_in²) − log N(φ; μ_out, σ_out²).

    Args:
        phi: (N,) of the target. shadow_phi: (M, N). contains: (M, N).

    Returns:
        (N,); NaN for a candidate without a shadow on either side. With fewer than `POOLED_BELOW` shadows one σ_in and
        one σ_out serve all candidates.
    """
    mean_in, spread_in = _normal(shadow_phi, contains)
    mean_out, spread_out = _normal(shadow_phi, ~contains)
    return _log_density(phi, mean_in, spread_in) - _log_density(phi, mean_out, spread_out)


def lira_offline(phi: Array, shadow_phi: Array, contains: Mask) -> Array:
    """Offline LiRA: Φ((φ − μ_out)/σ_out), from the shadows that were not trained on the candidate. (N,)."""
    mean, spread = _normal(shadow_phi, ~contains)
    # The standard score itself: Φ saturates at 1 above 8 and would tie the surest images.
    return np.asarray((phi - mean) / spread)


def rmia(
    log_p: Array,
    shadow_log_p: Array,
    population_log_p: Array,
    population_shadow_log_p: Array,
    contains: Mask,
    gamma: float = 1.0,
) -> Array:
    """Robust membership inference (Zarifzadeh et al. 2024): share of the population that x's ratio beats.

    ratio_x = p(x|θ)/p̄(x), where p̄ is the mean over in- and out-shadows alike; score = share of z with
    ratio_x/ratio_z ≥ γ. The share takes Z + 1 values only; ties are broken by ratio_x itself (Z log Z by search, no
    (N, Z) matrix).

    Args:
        log_p: (N,) of the target. shadow_log_p: (M, N). population_log_p: (Z,). population_shadow_log_p: (M, Z).
        contains: (M, N). gamma: fixed beforehand.

    Returns:
        (N,); NaN for a candidate that every shadow was trained on: it has no reference.
    """
    p, inside, outside = np.exp(shadow_log_p), contains.sum(0), (~contains).sum(0)
    # Each side counts one half, so that an unbalanced plan does not turn the score around; no padding with zeros.
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_in, mean_out = (p * contains).sum(0) / inside, (p * ~contains).sum(0) / outside
    reference = np.where(inside > 0, (mean_in + mean_out) / 2, mean_out)
    return _beats(log_p - np.log(reference), population_log_p - _log_mean(population_shadow_log_p), gamma)


def rmia_offline(
    log_p: Array,
    shadow_log_p: Array,
    population_log_p: Array,
    population_shadow_log_p: Array,
    contains: Mask,
    a: float = 0.3,
    gamma: float = 1.0,
) -> Array:
    """RMIA from out-shadows alone: p̄ = ½((1 + a) p̄_out + 1 − a); `a` is fixed beforehand, 0.3 by the paper. (N,)."""
    p = np.exp(shadow_log_p)
    with np.errstate(invalid="ignore", divide="ignore"):
        out = (p * ~contains).sum(0) / (~contains).sum(0)
    reference = ((1 + a) * out + 1 - a) / 2
    population = ((1 + a) * np.exp(_log_mean(population_shadow_log_p)) + 1 - a) / 2
    return _beats(log_p - np.log(reference), population_log_p - np.log(population), gamma)


def label_only(kept: Array) -> Array:
    """Share of perturbed copies whose decision stays right (Choquette-Choo et al. 2021).

    Args:
        kept: (R, N) bool.
    """
    return np.asarray(np.asarray(kept, dtype=np.float64).mean(0))


def _beats(log_ratio: Array, population_log_ratio: Array, gamma: float) -> Array:
    """Share of z with ratio_x/ratio_z ≥ γ, plus a rank below one step of it that breaks ties by ratio_x."""
    z = np.sort(population_log_ratio)
    share = np.searchsorted(z, log_ratio - np.log(gamma), side="right") / len(z)
    finite = np.isfinite(log_ratio)
    ranks = np.unique(log_ratio[finite], return_inverse=True)[1]
    score = np.full(len(log_ratio), np.nan)
    score[finite] = share[finite] + (ranks + 1) / (len(ranks) + 2) / len(z)
    score[np.isneginf(log_ratio)] = 0.0
    return score


def _log_mean(log_p: Array) -> Array:
    top = log_p.max(0)
    return np.asarray(top + np.log(np.exp(log_p - top).mean(0)))


def _normal(phi: Array, where: Mask) -> tuple[Array, Array]:
    """Mean (N,) and standard deviation over the shadows of one side; pooled where there are few."""
    count = where.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(where, phi, 0).sum(0) / count
        squares = np.where(where, (phi - mean) ** 2, 0).sum(0)
        if len(phi) < POOLED_BELOW:
            freedom = max(1, int((count - 1)[count > 1].sum()))
            return mean, np.full_like(mean, np.sqrt(squares[count > 1].sum() / freedom) + 1e-12)
        return mean, np.sqrt(squares / np.maximum(count - 1, 1)) + 1e-12


def _log_density(x: Array, mean: Array, spread: Array) -> Array:
    return np.asarray(-0.5 * ((x - mean) / spread) ** 2 - np.log(spread))
