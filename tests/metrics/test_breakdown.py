"""The breakdown point: bisection against a full scan, and the paired loss against its closed form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsec.metrics.breakdown import Breakdown, auc_drop, breakdown, broken, next_to_try
from fedsec.metrics.utility import auc
from fedsec.types import Estimate


def search(truth: list[bool]) -> tuple[Breakdown, dict[int, bool]]:
    tried: dict[int, bool] = {}
    while (f := next_to_try(tried, len(truth))) is not None:
        assert f not in tried and 1 <= f <= len(truth)
        tried[f] = truth[f - 1]
    return breakdown(tried, len(truth)), tried


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_threshold_is_found_with_few_trials(held: int, more: int) -> None:
    limit = held + more
    found, tried = search([f > held for f in range(1, limit + 1)])
    assert found == Breakdown(held + 1 if more else None, limit, True)
    assert len(tried) <= np.ceil(np.log2(limit + 1)) + 1


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_a_contradiction_is_never_passed_over_in_silence(truth: list[bool]) -> None:
    found, tried = search(truth)
    if not found.monotone:
        assert len(tried) == len(truth), "a curve that is not monotone is tried everywhere"
        assert found.point == truth.index(True) + 1
    assert found.point is None or truth[found.point - 1]


def test_three_of_four_fall_but_not_the_fourth() -> None:
    found, tried = search([False, True, False, True])
    assert found == Breakdown(2, 4, False)
    assert set(tried) == {1, 2, 3, 4}


def scores(quality: float, labels: np.ndarray, seed: int) -> np.ndarray:
    logit = quality * (2 * labels - 1) + np.random.default_rng(seed).normal(size=len(labels))
    p = 1 / (1 + np.exp(-logit))
    return np.stack([1 - p, p], 1)


def test_the_loss_is_paired() -> None:
    labels = np.random.default_rng(0).integers(0, 2, 400)
    good = scores(1.0, labels, 1)
    worse = scores(0.8, labels, 1)  # the same images are hard for both
    drop = auc_drop(good, worse, labels, "binary", generator=np.random.default_rng(2))
    assert drop.value == pytest.approx(auc(good, labels, "binary") - auc(worse, labels, "binary"))
    assert 0 < drop.low < drop.value < drop.high
    unrelated = auc_drop(good, scores(0.8, labels, 7), labels, "binary", generator=np.random.default_rng(2))
    assert drop.high - drop.low < 0.6 * (unrelated.high - unrelated.low), "images that are hard for both cancel"
    same = auc_drop(good, good, labels, "binary", generator=np.random.default_rng(2))
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_broken_needs_size_and_certainty() -> None:
    assert broken(Estimate(0.06, 0.01, 0.1, 100))
    assert not broken(Estimate(0.04, 0.01, 0.1, 100))
    assert not broken(Estimate(0.06, -0.01, 0.1, 100))
    assert not broken(Estimate(0.06, float("nan"), float("nan"), 10))
