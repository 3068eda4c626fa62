"""Do the single measures agree with scikit-learn and torchmetrics, ties and bootstrap weights included?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, roc_auc_score
from torchmetrics.functional.classification import binary_sensitivity_at_specificity

from fedsec.metrics.classification import (
    accuracy,
    auc_binary,
    auc_by_class,
    balanced_accuracy,
    macro_auc,
    quadratic_weighted_kappa,
    sensitivity_at_specificity,
)

scored = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1), st.integers(0, 3)), min_size=2, max_size=30)


@settings(deadline=None, max_examples=100)
@given(scored)
def test_auc_with_ties_and_weights_is_scikit_learns(rows):
    scores, labels, counts = (np.array(column) for column in zip(*rows, strict=True))
    found = auc_binary(scores, labels, np.stack([np.ones(len(rows)), counts], axis=1))
    for value, weights in zip(found, (np.ones(len(rows)), counts), strict=True):
        kept = np.repeat(np.arange(len(rows)), weights.astype(int))
        if len(set(labels[kept])) == 2:
            assert value == pytest.approx(roc_auc_score(labels[kept], scores[kept]))
        else:
            assert np.isnan(value)


def test_auc_closed_forms():
    assert auc_binary([1, 2, 3, 4], [0, 0, 1, 1]) == 1
    assert auc_binary([4, 3, 2, 1], [0, 0, 1, 1]) == 0
    assert auc_binary([7, 7, 7], [0, 1, 1]) == 0.5
    assert auc_binary([1, 2, 2, 3], [0, 1, 0, 1]) == 3.5 / 4
    assert np.isnan(auc_binary([], []))


@settings(deadline=None, max_examples=100)
@given(scored, st.sampled_from([0.5, 0.8, 0.9, 1.0]))
def test_sensitivity_at_specificity_is_the_best_threshold(rows, specificity):
    scores, labels, counts = (np.array(column) for column in zip(*rows, strict=True))
    (found,) = sensitivity_at_specificity(scores, labels, specificity, counts[:, None])
    positive, negative = counts * labels, counts * (1 - labels)
    if not positive.sum() or not negative.sum():
        assert np.isnan(found)
        return
    best = 0.0
    for threshold in [*scores, np.inf]:
        if negative[scores < threshold].sum() / negative.sum() >= specificity - 1e-12:
            best = max(best, positive[scores >= threshold].sum() / positive.sum())
    assert found == pytest.approx(best)


def test_sensitivity_at_specificity_is_torchmetrics():
    g = np.random.default_rng(0)
    labels = g.integers(2, size=300)
    scores = 1 / (1 + np.exp(-(labels + g.normal(size=300))))
    expected, _ = binary_sensitivity_at_specificity(torch.tensor(scores), torch.tensor(labels), min_specificity=0.9)
    assert sensitivity_at_specificity(scores, labels) == pytest.approx(float(expected), abs=1e-6)


def test_one_false_alarm_in_ten_is_ninety_per_cent_specificity():
    scores, labels = np.arange(12), np.array([0] * 9 + [1, 0, 1])
    assert sensitivity_at_specificity(scores, labels) == 1.0
    assert sensitivity_at_specificity(scores, labels, specificity=0.95) == 0.5


def test_macro_auc_is_scikit_learns_and_skips_what_it_must():
    g = np.random.default_rng(0)
    labels, scores = g.integers(4, size=200), g.dirichlet(np.ones(5), size=200)
    targets = np.eye(5)[labels]
    by_class = auc_by_class(scores, targets)
    assert np.isnan(by_class[4])
    expected = [roc_auc_score(labels == c, scores[:, c]) for c in range(4)]
    assert by_class[:4] == pytest.approx(expected)
    assert macro_auc(scores, targets) == pytest.approx(np.mean(expected))
    assert np.isnan(macro_auc(scores[:, 4:], targets[:, 4:]))
    assert np.isnan(macro_auc(scores[:, 4:], targets[:, 4:], np.ones((200, 3)))).all()


def test_a_class_that_a_draw_misses_makes_the_draw_undefined():
    weights = np.ones((4, 2))
    weights[0, 1] = 0
    found = macro_auc(np.eye(4)[:, :3], np.eye(4)[:, :3], weights)
    assert found[0] == 1 and np.isnan(found[1])


def test_unknown_targets_do_not_count():
    targets = np.array([[0.0], [1.0], [np.nan], [np.nan]])
    assert auc_by_class([[0.1], [0.9], [0.0], [1.0]], targets)[0] == 1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=25))
def test_decisions_are_scikit_learns(rows):
    predictions, labels = (np.array(column) for column in zip(*rows, strict=True))
    assert accuracy(predictions, labels) == pytest.approx((predictions == labels).mean())
    recalls = [(predictions[labels == c] == c).mean() for c in np.unique(labels)]
    assert balanced_accuracy(predictions, labels) == pytest.approx(np.mean(recalls))
    kappa = quadratic_weighted_kappa(predictions, labels, 4)
    if len({*predictions, *labels}) > 1:
        expected = cohen_kappa_score(labels, predictions, labels=range(4), weights="quadratic")
        assert kappa == pytest.approx(expected)
    else:
        assert np.isnan(kappa)


def test_weighted_decisions_are_those_of_repeated_images():
    g = np.random.default_rng(0)
    labels, predictions, counts = g.integers(3, size=60), g.integers(3, size=60), g.integers(4, size=60)
    kept = np.repeat(np.arange(60), counts)
    both = np.stack([counts, np.ones(60)], axis=1)
    assert accuracy(predictions, labels, both)[0] == accuracy(predictions[kept], labels[kept])
    expected = balanced_accuracy_score(labels[kept], predictions[kept])
    assert balanced_accuracy(predictions, labels, both)[0] == pytest.approx(expected)
    expected = cohen_kappa_score(labels[kept], predictions[kept], weights="quadratic")
    assert quadratic_weighted_kappa(predictions, labels, 3, both)[0] == pytest.approx(expected)


def test_collapsed_classifier():
    """One class for everybody on the pneumonia test set: accuracy 0.625 hides it, balanced accuracy does not."""
    labels, predictions = np.repeat([0, 1], [234, 390]), np.ones(624)
    assert accuracy(predictions, labels) == 0.625
    assert balanced_accuracy(predictions, labels) == 0.5
    assert auc_binary(predictions, labels) == 0.5
