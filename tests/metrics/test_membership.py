"""AUC, TPR at a low FPR, advantage and power: closed forms, the spec's tables, and pitfalls A22, A23 and A25."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm
from sklearn.metrics import roc_auc_score, roc_curve

from fedsec.metrics import membership as m
from fedsec.metrics.statistics import clopper_pearson
from fedsec.privacy.gdp import mu_of

RNG = np.random.default_rng


@pytest.mark.parametrize(
    ("n", "tpr", "auc"),
    [
        (200, 0.039, 0.572),
        (500, 0.025, 0.545),
        (1000, 0.019, 0.532),
        (1872, 0.017, 0.5235),
        (5000, 0.0139, 0.514),
        (10000, 0.0127, 0.510),
    ],
)
def test_power_is_the_table_of_the_spec(n: int, tpr: float, auc: float) -> None:
    found = m.smallest_visible(n, n)
    assert found["tpr"] == pytest.approx(tpr, abs=6e-4)
    assert found["auc"] == pytest.approx(auc, abs=6e-4)


@pytest.mark.parametrize(("hits", "low", "high"), [(55, 0.0222, 0.0381), (21, 0.0070, 0.0171), (0, 0.0, 0.0020)])
def test_clopper_pearson_of_the_spec(hits: int, low: float, high: float) -> None:
    found = clopper_pearson(hits, 1872)
    assert found[0] == pytest.approx(low, abs=6e-5) and found[1] == pytest.approx(high, abs=6e-5)


@pytest.mark.parametrize("n", [10, 100, 2000])
@pytest.mark.parametrize("p", [0.01, 0.2, 0.5])
def test_clopper_pearson_covers_exactly(n: int, p: float) -> None:
    k = np.arange(n + 1)
    low, high = clopper_pearson(k, n)
    assert binom.pmf(k, n, p)[(low <= p) & (p <= high)].sum() >= 0.95


def test_a_threshold_is_strict_and_its_false_positives_are_counted() -> None:
    others = np.arange(1000.0)
    found = m.tpr_at(np.array([989.0, 990.0, 1e9]), others, 0.01)
    assert isinstance(found, m.Interval)
    assert found.value == pytest.approx(2 / 3)  # only what exceeds the 11th largest non-member, 989
    assert found.extra == {"false_positives": "10 of 1,000", "fpr": 0.01}


def test_a_tpr_from_one_false_positive_is_not_printed() -> None:
    """A23: n0 = 1,941 resolves no TPR at 0.1 % FPR."""
    scores = RNG(0).normal(size=1941)
    assert m.tpr_at(scores, scores, 1e-3) == {"not_resolvable": "needs 10,000 non-members, there are 1,941"}
    few = m.tpr_at(scores, RNG(1).normal(size=5000), 1e-3)
    assert isinstance(few, m.Interval) and few.extra is not None and "few" in few.extra["remark"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([np.exp, np.arctan, lambda x: 3 * x - 1]))
def test_auc_and_tpr_depend_on_the_order_alone(seed: int, law: object) -> None:
    draw = RNG(seed)
    members, others = draw.normal(0.4, 1, 300).round(1), draw.normal(size=400).round(1)
    plain = m.auc(members, others, generator=RNG(0), draws=20)
    moved = m.auc(law(members), law(others), generator=RNG(0), draws=20)  # type: ignore[operator]
    assert plain == moved
    truth = np.r_[np.ones(300), np.zeros(400)]
    assert plain.value == pytest.approx(roc_auc_score(truth, np.r_[members, others]))
    fpr, tpr, _ = m.roc(members, others)
    assert (np.diff(tpr) >= 0).all() and (np.diff(fpr) >= 0).all() and fpr[-1] == tpr[-1] == 1
    reference = roc_curve(truth, np.r_[members, others], drop_intermediate=False)
    assert np.allclose(fpr, reference[0]) and np.allclose(tpr, reference[1])


def test_advantage_is_unbiased_without_a_leak_and_right_with_one() -> None:
    """A25: the in-sample maximum is not."""
    draw, found, naive = RNG(3), [], []
    for _ in range(200):
        members, others = draw.normal(size=(2, 300))
        found.append(m.advantage(members, others, generator=draw).value)
        fpr, tpr, _ = m.roc(members, others)
        naive.append((tpr - fpr).max())
    assert abs(np.mean(found)) < 0.007 < 0.04 < np.mean(naive)
    shifted = m.advantage(draw.normal(1, 1, 20_000), draw.normal(size=20_000), generator=draw)
    assert shifted.low < 2 * norm.cdf(0.5) - 1 < shifted.high


def test_lower_bounds_alarm_in_at_most_one_null_in_forty() -> None:
    """The null test of AUC and TPR at 1 % FPR: 1,000 nulls (AUC 100), one-sided at 2.5 %, plus binomial slack (99.9 %).

    With the threshold taken for known, as plain Clopper-Pearson does, the TPR's rate is 7 to 9 %.
    """
    draw = RNG(7)
    alarms = {"auc": 0, "tpr": 0, "plain": 0}
    for _ in range(1000):
        members, others = draw.normal(size=(2, 1000))
        found = m.tpr_at(members, others, 0.01)
        assert isinstance(found, m.Interval)
        alarms["tpr"] += found.low > 0.01
        alarms["plain"] += bool(clopper_pearson(round(found.value * 1000), 1000)[0] > 0.01)
    for _ in range(100):
        alarms["auc"] += m.auc(*draw.normal(size=(2, 80)), generator=draw, draws=100).low > 0.5
    limit = binom.ppf(0.999, 1000, 0.05)
    assert alarms["auc"] <= binom.ppf(0.999, 100, 0.05) and alarms["tpr"] <= limit, alarms
    assert alarms["plain"] > alarms["tpr"]


@pytest.mark.parametrize(
    ("epsilon", "rate", "pure", "gauss"),
    [(1, 0.01, 0.0272, 0.0198), (2, 0.01, 0.0739, 0.0340), (3, 0.001, 0.0201, 0.0089), (8, 0.01, 1.0, 0.255)],
)
def test_curves_of_the_claim(epsilon: float, rate: float, pure: float, gauss: float) -> None:
    assert m.claimed_tpr(rate, epsilon, 1e-5) == pytest.approx(pure, abs=6e-4)
    assert m.gaussian_tpr(rate, epsilon, 1e-5) == pytest.approx(gauss, abs=6e-4)


def test_curves_of_the_claim_at_their_ends() -> None:
    assert m.claimed_tpr(0, 2, 1e-5) == pytest.approx(1e-5)
    assert m.claimed_tpr(1, 2, 1e-5) == 1
    rates = np.geomspace(1e-4, 1, 50)
    assert (m.gaussian_tpr(rates, 2, 1e-5) <= m.claimed_tpr(rates, 2, 1e-5) + 1e-12).all()
    assert m.claimed_advantage(1, 0) == pytest.approx((np.e - 1) / (np.e + 1))
    assert norm.cdf(mu_of(1, 1e-5) / np.sqrt(2)) == pytest.approx(0.575, abs=1e-3)
