"""Gaussian differential privacy against the tables of the privacy specification (3.6, 3.9) and by hypothesis."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from fedsec.errors import ConfigError
from fedsec.privacy import gdp

SIGMAS = {0.1: 30.7496, 0.5: 7.0318, 1: 3.7306, 2: 1.9938, 3: 1.3906, 4: 1.0812, 8: 0.60023, 10: 0.49989}


@pytest.mark.parametrize(("epsilon", "sigma"), SIGMAS.items())
def test_analytic_gaussian_table(epsilon: float, sigma: float) -> None:
    assert gdp.gaussian_sigma(epsilon, 1e-5, 1.0) == pytest.approx(sigma, abs=5e-5)


def test_analytic_gaussian_scales_with_sensitivity_and_releases() -> None:
    assert gdp.gaussian_sigma(1, 1e-6, 1.0) == pytest.approx(4.2247, abs=5e-5)
    assert gdp.gaussian_sigma(3, 1e-5, 2.0, releases=25) == pytest.approx(2 * 5 / 0.7191, rel=1e-4)


def test_the_textbook_formula_protects_too_little_at_epsilon_ten() -> None:
    textbook = math.sqrt(2 * math.log(1.25 / 1e-5)) / 10
    assert textbook == pytest.approx(0.4845, abs=5e-5)
    assert gdp.gaussian_sigma(10, 1e-5, 1.0) > textbook
    assert gdp.profile(1 / textbook, 10) == pytest.approx(2.3e-5, rel=0.02)


@pytest.mark.parametrize(("epsilon", "mu"), [(1, 0.2681), (3, 0.7191), (8, 1.6660)])
def test_mu_table(epsilon: float, mu: float) -> None:
    assert gdp.mu_of(epsilon, 1e-5) == pytest.approx(mu, abs=5e-5)


@pytest.mark.parametrize(("mu", "epsilon"), [(0.5, 1.0), (1.5, 3.0), (3.0, 0.5)])
def test_profile_is_the_hockey_stick_divergence(mu: float, epsilon: float) -> None:
    """δ = ∫ max(0, p − e^ε q) of N(μ, 1) and N(0, 1), by quadrature."""

    def excess(x: float) -> float:
        return max(0.0, stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x))

    start = epsilon / mu + mu / 2
    reference, _ = integrate.quad(excess, start, start + 40)
    assert gdp.profile(mu, epsilon) == pytest.approx(reference, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(epsilon=st.floats(0.05, 60), delta=st.floats(1e-9, 1e-2))
def test_mu_and_epsilon_are_inverse(epsilon: float, delta: float) -> None:
    assert gdp.epsilon_of(gdp.mu_of(epsilon, delta), delta) == pytest.approx(epsilon, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(mu=st.floats(0.01, 20), epsilon=st.floats(0, 50), more=st.floats(0.01, 5))
def test_profile_falls_in_epsilon_and_rises_in_mu(mu: float, epsilon: float, more: float) -> None:
    assert gdp.profile(mu, epsilon + more) <= gdp.profile(mu, epsilon) + 1e-15
    assert gdp.profile(mu + more, epsilon) >= gdp.profile(mu, epsilon) - 1e-15


@pytest.mark.parametrize(("epsilon", "delta"), [(0, 1e-5), (-1, 1e-5), (1, 0), (1, 1), (float("nan"), 1e-5)])
def test_meaningless_budgets_are_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(ConfigError):
        gdp.mu_of(epsilon, delta)
