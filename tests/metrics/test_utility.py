"""Does the utility table hold the right numbers for each task, and say what it left out?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from fedsec.metrics.utility import auc, per_client_utility, utility
from fedsec.types import Estimate


def rng():
    return np.random.default_rng(0)


def logits(n, classes, seed=1):
    g = np.random.default_rng(seed)
    labels = g.integers(classes, size=n)
    return g.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels], labels


def test_binary():
    scores, labels = logits(200, 2)
    found = utility(scores, labels, "binary", generator=rng(), class_names=["normal", "pneumonia"])
    expected = roc_auc_score(labels, scores[:, 1] - scores[:, 0])
    assert set(found) == {"auc", "balanced_accuracy", "sensitivity_at_90_specificity", "accuracy", "auc_skipped"}
    assert found["auc"].value == pytest.approx(expected) == auc(scores, labels, "binary")
    assert found["auc"].low < expected < found["auc"].high
    assert found["accuracy"].value == (scores.argmax(1) == labels).mean()
    assert found["auc_skipped"] == []


def test_auc_interval_agrees_with_hanley_and_mcneil():
    scores, labels = logits(2000, 2)
    found = utility(scores, labels, "binary", generator=rng(), draws=2000)["auc"]
    a, n1, n0 = found.value, labels.sum(), (1 - labels).sum()
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = np.sqrt((a * (1 - a) + (n1 - 1) * (q1 - a * a) + (n0 - 1) * (q2 - a * a)) / (n0 * n1))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.15)


def test_positive_class_zero_looks_for_the_other_finding():
    scores, labels = logits(200, 2)
    one, zero = (utility(scores, labels, "binary", generator=rng(), positive_class=c) for c in (1, 0))
    assert one["auc"].value == pytest.approx(zero["auc"].value)
    flipped = utility(scores[:, ::-1], 1 - labels, "binary", generator=rng())
    key = "sensitivity_at_90_specificity"
    assert zero[key].value == flipped[key].value != one[key].value


@pytest.mark.parametrize("task", ["binary", "multiclass", "ordinal"])
def test_probabilities_and_logits_agree(task):
    scores, labels = logits(120, 2 if task == "binary" else 4)
    probabilities = torch.softmax(torch.tensor(scores), 1)
    one, two = (utility(s, labels, task, generator=rng(), draws=50) for s in (scores, probabilities))
    assert one["auc"].value == pytest.approx(two["auc"].value)
    assert one["accuracy"] == two["accuracy"]


def test_multi_label_probabilities_are_decided_at_one_half():
    scores, labels = np.random.default_rng(0).normal(size=(2, 100, 3))
    one, two = (
        utility(s, labels > 0, "multilabel", generator=rng(), draws=50) for s in (scores, 1 / (1 + np.exp(-scores)))
    )
    assert one["balanced_accuracy"].value == pytest.approx(two["balanced_accuracy"].value)
    assert one["accuracy"].value == pytest.approx(((scores > 0) == (labels > 0)).mean())


def test_multiclass_is_one_vs_rest_and_names_the_absent_class():
    scores, labels = logits(300, 4)
    scores = np.concatenate([scores, np.zeros((300, 1))], axis=1)
    found = utility(scores, labels, "multiclass", generator=rng(), class_names=[*"abcd", "never"], draws=100)
    p = torch.softmax(torch.tensor(scores), 1).numpy()
    expected = {name: roc_auc_score(labels == c, p[:, c]) for c, name in enumerate("abcd")}
    assert found["auc_skipped"] == ["never"]
    assert {name: e.value for name, e in found["auc_by_class"].items()} == pytest.approx(expected)
    assert found["auc"].value == pytest.approx(np.mean(list(expected.values())))


def test_ordinal_adds_kappa():
    scores, labels = logits(300, 5)
    found = utility(scores, labels, "ordinal", generator=rng(), draws=100)
    expected = cohen_kappa_score(labels, scores.argmax(1), weights="quadratic")
    assert found["quadratic_weighted_kappa"].value == pytest.approx(expected)
    assert "quadratic_weighted_kappa" not in utility(scores, labels, "multiclass", generator=rng(), draws=20)


def test_multi_label_masks_unknown_entries_and_names_skipped_findings():
    g = np.random.default_rng(0)
    labels = g.integers(2, size=(100, 4)).astype(float)
    scores = labels + g.normal(size=(100, 4))
    labels[:40, 0] = np.nan
    labels[40:60, 1] = -1
    labels[:, 3] = 0
    found = utility(
        scores, labels, "multilabel", generator=rng(), class_names=["edema", "mass", "nodule", "hernia"], draws=100
    )
    assert found["auc_skipped"] == ["hernia"]
    assert list(found["auc_by_class"]) == ["edema", "mass", "nodule"]
    assert found["auc_by_class"]["edema"].value == pytest.approx(roc_auc_score(labels[40:, 0], scores[40:, 0]))
    assert found["auc_by_class"]["edema"].n == 60
    known = labels >= 0
    assert found["accuracy"].value == pytest.approx(((scores > 0) == labels)[known].mean())


def test_unknown_labels_are_left_out():
    scores, labels = logits(100, 3)
    marked = labels.astype(float)
    marked[:10], marked[10:20] = np.nan, -1
    found = utility(scores, marked[:, None], "multiclass", generator=rng(), draws=50)
    assert found["accuracy"].n == 80
    assert found["accuracy"].value == (scores.argmax(1) == labels)[20:].mean()


def test_patients_are_the_units():
    scores, labels = logits(200, 2)
    found = utility(scores, labels, "binary", generator=rng(), groups=np.arange(200) // 4)
    assert found["auc"].n == found["accuracy"].n == 50


def test_a_diverged_model_scores_chance_and_is_flagged():
    labels = np.arange(100) % 2
    found = utility(np.full((100, 2), np.nan), labels, "binary", generator=rng(), draws=50)
    assert found["auc"].value == 0.5
    assert found["accuracy"].value == 0
    assert found["nonfinite_scores"] == 100
    scores, labels = logits(100, 3)
    scores[7, 1] = np.inf
    found = utility(scores, labels, "multiclass", generator=rng(), draws=50)
    assert found["nonfinite_scores"] == 1 and found["auc"].value > 0.7


@pytest.mark.parametrize(("task", "columns"), [("binary", 2), ("multiclass", 3), ("ordinal", 3)])
def test_an_empty_or_single_class_part_has_no_auc(task, columns):
    empty = utility(np.zeros((0, columns)), np.zeros(0), task, generator=rng())
    assert np.isnan(empty["auc"].value) and empty["auc"].n == 0
    single = utility(np.zeros((30, columns)), np.zeros(30), task, generator=rng())
    assert np.isnan(single["auc"].value)
    assert single["accuracy"].value == 1
    assert len(single["auc_skipped"]) == (1 if task == "binary" else columns)


def test_an_empty_multi_label_part():
    found = utility(np.zeros((0, 3)), np.zeros((0, 3)), "multilabel", generator=rng())
    assert np.isnan(found["accuracy"].value) and found["auc_skipped"] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("scores", "labels", "task", "message"),
    [
        (np.zeros((5, 3)), np.zeros(5), "binary", "2 columns"),
        (np.zeros((5, 3)), np.full(5, 3), "multiclass", "label 3 has no column"),
        (np.zeros((5, 3)), np.zeros((5, 2)), "multilabel", "do not fit"),
        (np.zeros(5), np.zeros(5), "binary", r"\(N, C\)"),
        (np.zeros((4, 2)), np.zeros(5), "binary", "5 labels"),
    ],
)
def test_wrong_input_is_named(scores, labels, task, message):
    with pytest.raises(ValueError, match=message):
        utility(scores, labels, task, generator=rng())


def test_worst_client_is_named_and_single_class_clients_are_skipped():
    good, poor = logits(100, 2), logits(100, 2, seed=5)
    poor = (np.random.default_rng(2).normal(size=(100, 2)), poor[1])
    healthy = (np.zeros((30, 2)), np.zeros(30))
    found = per_client_utility(
        [good, healthy, poor], ["north", "screening", "south"], "binary", generator=rng(), draws=200
    )
    north, south = (auc(*part, "binary") for part in (good, poor))
    assert found["worst_client"] == "south"
    assert found["worst_client_auc"] == found["client_auc"]["south"]
    assert found["worst_client_auc"].value == pytest.approx(south)
    assert found["clients_skipped"] == ["screening"]
    assert found["mean_client_auc"].value == pytest.approx((north + south) / 2)
    assert found["client_auc_spread"] == pytest.approx(abs(north - south) / 2)
    # The mean of two independent estimates varies less than each.
    width = {name: e.high - e.low for name, e in found["client_auc"].items()}
    mean = found["mean_client_auc"]
    assert mean.high - mean.low == pytest.approx(np.hypot(*width.values()) / 2, rel=0.2)


def test_no_client_can_be_evaluated():
    found = per_client_utility([(np.zeros((30, 2)), np.zeros(30))], ["a"], "binary", generator=rng())
    assert found["worst_client"] is None
    assert isinstance(found["worst_client_auc"], Estimate) and np.isnan(found["worst_client_auc"].value)


def test_client_names_must_differ():
    part = logits(30, 2)
    with pytest.raises(ValueError, match="different client names"):
        per_client_utility([part, part], ["a", "a"], "binary", generator=rng())
