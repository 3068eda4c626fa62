"""Are the intervals right: closed forms, scipy, and coverage on data whose truth is known."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from fedsec.metrics.classification import auc_binary
from fedsec.metrics.statistics import (
    bootstrap,
    bootstrap_weights,
    estimate,
    proportion,
    two_level_bootstrap,
    weighted_mean,
    weighted_median,
    wilson,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (55, 1872), (1, 1)])
def test_wilson_is_scipys(successes, n):
    found = wilson(successes, n)
    expected = binomtest(successes, n).proportion_ci(method="wilson")
    assert (found.value, found.n) == (successes / n, n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_without_trials_and_with_impossible_counts():
    nothing = wilson(0, 0)
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()
    with pytest.raises(ValueError, match="5 successes of 4"):
        wilson(5, 4)


def test_proportion_of_single_images_is_wilson():
    hits = np.arange(40) < 13
    assert proportion(hits) == wilson(13, 40)


def test_images_that_succeed_together_count_as_one():
    groups = np.repeat(np.arange(10), 8)
    together = proportion(np.repeat(np.arange(10) < 4, 8), groups)
    expected = wilson(4, 10)
    assert (together.value, together.n) == (0.4, 10)
    assert (together.low, together.high) == pytest.approx((expected.low, expected.high))
    none = proportion(np.zeros(80, bool), groups)
    assert none.high == pytest.approx(wilson(0, 10).high)


def test_few_images_or_groups_have_a_value_and_no_interval():
    few = proportion(np.ones(19, bool))
    assert few.value == 1 and np.isnan([few.low, few.high]).all()
    four_groups = proportion(np.ones(40, bool), np.repeat(np.arange(4), 10))
    assert np.isnan(four_groups.low)
    g = np.random.default_rng(0)
    assert np.isnan(bootstrap(np.mean, np.arange(19.0), generator=g).low)
    assert not np.isnan(bootstrap(np.mean, np.arange(20.0), generator=g).low)
    assert np.isnan(two_level_bootstrap([np.arange(9.0), np.arange(10.0)], generator=g).low)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 4)), min_size=1, max_size=12))
def test_weights_stand_for_repeated_values(pairs):
    values, counts = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    repeated = np.repeat(values, counts.astype(int))
    for weighted, plain in ((weighted_median, np.median), (weighted_mean, np.mean)):
        found = weighted(values, np.stack([counts, np.ones(len(counts))], axis=1))
        if len(repeated):
            assert found[0] == pytest.approx(plain(repeated))
        else:
            assert np.isnan(found[0])
        assert found[1] == pytest.approx(plain(values)) == weighted(values)


def test_median_does_not_hide_a_nan():
    assert np.isnan(weighted_median([1.0, np.nan, 2.0], np.ones((3, 2)))).all()


def test_weights_are_whole_draws_of_whole_groups():
    groups = np.array(["b", "a", "b", "c", "a", "b"])
    weights = np.concatenate(
        list(bootstrap_weights(6, generator=np.random.default_rng(0), draws=500, groups=groups)), axis=1
    )
    assert weights.shape == (6, 500)
    assert (weights[[0, 2]] == weights[[5]]).all() and (weights[1] == weights[4]).all()
    assert (weights[0] + weights[1] + weights[3] == 3).all()
    assert weights[3].mean() == pytest.approx(1, abs=0.15)


def test_vectorised_and_plain_statistics_agree_draw_by_draw():
    x = np.random.default_rng(1).normal(size=50)
    plain = bootstrap(np.median, x, generator=np.random.default_rng(2), draws=300)
    fast = bootstrap(weighted_median, x, generator=np.random.default_rng(2), draws=300)
    assert (plain.value, plain.low, plain.high) == pytest.approx((fast.value, fast.low, fast.high))


def test_same_generator_same_interval():
    x = np.random.default_rng(1).normal(size=50)
    first, second, other = (
        bootstrap(weighted_mean, x, generator=np.random.default_rng(seed), draws=200) for seed in (3, 3, 4)
    )
    assert first == second != other


def test_interval_of_a_mean_is_the_normal_one_for_many_images():
    x = np.random.default_rng(0).normal(size=2000)
    found = bootstrap(weighted_mean, x, generator=np.random.default_rng(1), draws=8000)
    half = norm.ppf(0.975) * x.std(ddof=1) / np.sqrt(len(x))
    assert found.low == pytest.approx(x.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(x.mean() + half, abs=0.06 * half)


@pytest.mark.parametrize(("groups", "each"), [(20, 1), (5, 8)])
def test_coverage_of_a_gaussian_mean(groups, each):
    g = np.random.default_rng(0)
    index, trials = np.repeat(np.arange(groups), each), 600
    covered = 0
    for _ in range(trials):
        x = np.repeat(g.normal(size=groups), each) + 0.3 * g.normal(size=groups * each)
        found = bootstrap(weighted_mean, x, generator=g, draws=2000, groups=index)
        covered += found.low <= 0 <= found.high
    # Binomial noise of 600 trials is 1 %; plain percentiles give 83 % for five groups.
    assert 0.89 <= covered / trials <= 0.98


def test_patients_widen_the_interval():
    g = np.random.default_rng(0)
    x, patients = np.repeat(g.normal(size=30), 10), np.repeat(np.arange(30), 10)
    images = bootstrap(weighted_mean, x, generator=g)
    grouped = bootstrap(weighted_mean, x, generator=g, groups=patients)
    assert (images.n, grouped.n) == (300, 30)
    assert (grouped.high - grouped.low) / (images.high - images.low) == pytest.approx(np.sqrt(10), rel=0.2)


def test_undefined_draws_are_dropped_and_too_many_drop_the_interval():
    draws = np.arange(1000.0)
    half = estimate(500, np.where(draws < 500, np.nan, draws), images=1000)
    assert half.low > 500
    assert np.isnan(estimate(500, np.where(draws <= 500, np.nan, draws), images=1000).low)


def test_arrays_must_fit_together():
    g = np.random.default_rng(0)
    with pytest.raises(ValueError, match="different lengths"):
        bootstrap(np.mean, np.ones(3), np.ones(4), generator=g)
    with pytest.raises(ValueError, match="3 groups for 4 images"):
        bootstrap(np.mean, np.ones(4), generator=g, groups=np.ones(3))


def test_two_levels_count_the_spread_between_seeds():
    g = np.random.default_rng(0)
    alike = [g.normal(size=200) for _ in range(3)]
    apart = [x + shift for x, shift in zip(alike, (-1, 0, 1), strict=True)]
    same, spread = (two_level_bootstrap(v, "mean", draws=2000, generator=g) for v in (alike, apart))
    assert same.value == pytest.approx(np.mean(alike)) and same.n == 600
    # One draw in 27 holds the lowest seed three times, and 2.5 % is the 67.5 % point of those draws.
    expected = apart[0].mean() + norm.ppf(27 * 0.025) * apart[0].std() / np.sqrt(600)
    assert spread.low == pytest.approx(expected, abs=0.02)
    assert spread.high - spread.low > 4 * (same.high - same.low)


def test_two_levels_with_one_seed_are_one_level():
    x = np.random.default_rng(0).normal(size=200)
    two = two_level_bootstrap([x], "mean", draws=4000, generator=np.random.default_rng(1))
    half = 1.96 * x.std() / np.sqrt(len(x))
    assert (two.low, two.high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.1 * half)


def test_two_levels_weigh_seeds_of_unequal_size_by_their_images():
    short, long = np.zeros(10), np.ones(90)
    assert two_level_bootstrap([short, long], "mean", draws=200, generator=np.random.default_rng(0)).value == 0.9


def test_two_levels_draw_each_seed_to_its_own_length():
    """All values equal 1: any wrong offset or length would count a zero weight or another seed's images."""
    found = two_level_bootstrap([np.ones(7), np.full(30, 2.0)], "mean", draws=3000, generator=np.random.default_rng(0))
    assert (found.low, found.high) == (1.0, 2.0)


def test_thousand_aucs_of_a_test_set_take_less_than_a_third_of_a_second():
    g = np.random.default_rng(0)
    labels = g.integers(2, size=2012)
    scores = labels + g.normal(size=2012)
    bootstrap(auc_binary, scores, labels, generator=g, draws=10)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        bootstrap(auc_binary, scores, labels, generator=g, draws=1000)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.3
