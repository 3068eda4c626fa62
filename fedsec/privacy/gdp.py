"""What a Gaussian mechanism spends exactly: the privacy profile of Gaussian differential privacy.

A release of f + N(0, σ²) with L2 sensitivity D is μ-GDP with μ = D/σ; T releases compose to √(Σ μ²). Source: Dong, Roth
& Su 2019, "Gaussian differential privacy", corollaries 2.13 and 3.3; the profile is also Balle & Wang 2018, theorem 8.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from fedsec.errors import ConfigError


def profile(mu: float, epsilon: float) -> float:
    """Smallest δ for which a μ-GDP mechanism is (ε, δ)-DP: Φ(-ε/μ + μ/2) - e^ε Φ(-ε/μ - μ/2)."""
    if mu == 0:
        return 0.0
    return float(ndtr(-epsilon / mu + mu / 2) - math.exp(epsilon + log_ndtr(-epsilon / mu - mu / 2)))


def epsilon_of(mu: float, delta: float) -> float:
    """Smallest ε ≥ 0 for which a μ-GDP mechanism is (ε, δ)-DP.

    Raises:
        ConfigError: δ outside (0, 1).
    """
    check_budget(1.0, delta)
    if profile(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while profile(mu, high) > delta:
        high *= 2
    return float(brentq(lambda epsilon: profile(mu, epsilon) - delta, 0.0, high, xtol=1e-10))


def mu_of(epsilon: float, delta: float) -> float:
    """Largest μ for which μ-GDP implies (ε, δ)-DP.

    Raises:
        ConfigError: ε ≤ 0, or δ outside (0, 1).
    """
    check_budget(epsilon, delta)
    low, high = 1.0, 1.0
    while profile(low, epsilon) > delta:
        low /= 2
    while profile(high, epsilon) <= delta:
        high *= 2
    return float(brentq(lambda mu: profile(mu, epsilon) - delta, low, high, xtol=1e-14, rtol=1e-13))


def gaussian_sigma(epsilon: float, delta: float, sensitivity: float, releases: int = 1) -> float:
    """Smallest standard deviation with which `releases` Gaussian releases are (ε, δ)-DP together.

    The textbook √(2 ln(1.25/δ))/ε is proven for ε < 1 only and protects too little from ε ≈ 9 on.
    Source: Balle & Wang 2018, "Improving the Gaussian mechanism for differential privacy", algorithm 1.

    Args:
        epsilon: total budget. delta: total δ.
        sensitivity: L2 sensitivity of one release.
        releases: how often the mechanism runs.

    Raises:
        ConfigError: ε ≤ 0, or δ outside (0, 1).
    """
    return sensitivity * math.sqrt(releases) / mu_of(epsilon, delta)


def check_budget(epsilon: float, delta: float) -> None:
    """Refuse a budget that means nothing.

    Raises:
        ConfigError: ε ≤ 0, or δ outside (0, 1).
    """
    if not epsilon > 0:
        raise ConfigError(f"epsilon={epsilon:g}: give a privacy budget above 0")
    if not 0 < delta < 1:
        raise ConfigError(f"delta={delta:g}: give a probability between 0 and 1, such as 1e-5")
