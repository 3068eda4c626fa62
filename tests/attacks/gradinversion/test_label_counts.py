"""Counts behind a local training, their check against the images, and the search for more than two classes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from fedsec.attacks.gradinversion import GradInversion, label_rehearsal
from fedsec.attacks.gradinversion.attempt import Attempt
from fedsec.attacks.gradinversion.auto import reconstruct
from fedsec.attacks.gradinversion.candidate import Candidate
from fedsec.attacks.gradinversion.clock import Clock
from fedsec.attacks.gradinversion.label_check import check_labels, deviation, implied_counts, same_multiset
from fedsec.attacks.gradinversion.label_counts import Moments, credible_counts, log_posterior
from fedsec.attacks.gradinversion.label_evidence import bias_evidence, exposure
from fedsec.attacks.gradinversion.label_rehearsal import log_likelihoods
from fedsec.attacks.gradinversion.labels import Labels, credible_set, find_head, mean_counts, recover_labels
from fedsec.attacks.gradinversion.observation import Observation
from fedsec.attacks.gradinversion.prior import Prior
from fedsec.attacks.gradinversion.settings import Settings
from torch import Tensor, nn

from . import cases

SHAPE = (1, 16, 16)


def test_exposure_of_one_step_and_of_whole_batches() -> None:
    assert (exposure(8, 8, 1).weight, exposure(8, 8, 1).spread, exposure(8, 8, 1).lateness) == (1, 0, 0)
    even = exposure(8, 4, 4)  # two epochs of two batches: every image counts alike, and t/T is 0, 1/4, 1/2, 3/4
    assert even.weight == pytest.approx(1)
    assert even.spread == pytest.approx(0, abs=1e-12)
    assert even.lateness == pytest.approx(3 / 8)


def test_a_short_last_batch_is_divided_by_its_own_size() -> None:
    """5 images in steps of 4: shares 5/8 four times and 5/2 once, mean 1, variance (4·(3/8)² + (3/2)²)/5."""
    assert exposure(5, 4, 2).spread == pytest.approx((4 * (3 / 8) ** 2 + (3 / 2) ** 2) / 5)


def test_momentum_weighs_early_steps_more() -> None:
    """m = 1/2, two steps: c = 1.5 and 1 (v₁ = g₁, v₂ = g₁/2 + g₂), so the weight is 2.5/2."""
    seen = exposure(4, 2, 2, momentum=0.5)
    assert seen.weight == pytest.approx(1.25)
    assert seen.lateness == pytest.approx((1 * 0.5) / 2.5)
    assert seen.spread == pytest.approx(((1.2 - 1) ** 2 + (0.8 - 1) ** 2) / 2)


def test_spread_is_the_variance_over_all_orders() -> None:
    """The likelihood's covariance against every permutation of the shares, for fixed parts of two classes."""
    shares, parts = [5 / 8] * 4 + [5 / 2], {0: -0.6, 1: 0.3}
    labels = [0, 0, 1, 1, 1]
    totals = [sum(s * parts[c] for s, c in zip(order, labels, strict=True)) for order in itertools.permutations(shares)]
    mean = sum(totals) / len(totals)
    variance = sum((t - mean) ** 2 for t in totals) / len(totals)
    exact = torch.float64
    moments = Moments(
        torch.tensor([[-0.6], [0.3]], dtype=exact), torch.zeros(2, 1, 1, dtype=exact), exposure(5, 4, 2).spread
    )
    flat = torch.ones(2, dtype=exact)
    at, off = (log_posterior([2, 3], torch.tensor([mean + d], dtype=exact), moments, 0.0, flat) for d in (0.0, 0.7))
    assert at - off == pytest.approx(0.7**2 / (2 * variance), rel=1e-4)


def test_search_over_many_classes_covers_what_enumeration_covers() -> None:
    """Three classes, six images: all 28 count vectors can be scored."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(3, 2, generator=generator).double() - torch.eye(3)[:, :-1]
    moments = Moments(mean, 0.05 * torch.eye(2).double().expand(3, -1, -1))
    rates, total = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 2.0, 3.0]).double() @ mean
    vectors = [v for v in itertools.product(range(7), repeat=3) if sum(v) == 6]
    scores = {v: log_posterior(list(v), total, moments, 0.1, rates) for v in vectors}
    norm = sum(math.exp(s) for s in scores.values())
    chosen = credible_counts(total, 6, moments, 0.1, rates)
    truth = sorted(scores, key=lambda v: -scores[v])[: len(chosen)]
    assert [tuple(v) for _, v in chosen] == truth
    assert chosen[0][0] == pytest.approx(math.exp(scores[truth[0]]) / norm, rel=1e-2)


def batch(prior: Prior, count: int, seed: int = 2, **changes: object) -> tuple[Observation, Tensor, Tensor]:
    data = cases.blobs(count, seed=seed)
    plan = cases.recipe(**changes)
    return (
        cases.observation_of(cases.lenet(shape=SHAPE), data.images, data.labels, prior, plan),
        data.images,
        data.labels,
    )


def test_rehearsals_know_of_overshooting(blob_prior: Prior, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a large rate the moments between both ends are sure of wrong counts; a rehearsal of the training is not."""
    monkeypatch.setattr(label_rehearsal, "IMAGE_GRADIENTS", 1200)
    straight = rehearsed = 0
    for seed in range(2, 6):
        observation, _, y = batch(blob_prior, 6, seed, lr=0.1, steps=4, batch_size=3, momentum=0.9)
        bias = find_head(observation).bias
        evidence = bias_evidence(observation, bias)
        truth = torch.bincount(y, minlength=2).tolist()
        straight += mean_counts(observation, evidence) == truth
        found = credible_set(observation, evidence, bias, torch.Generator().manual_seed(0))
        rehearsed += truth in [counts for _, counts in found]
    assert rehearsed >= 3
    assert rehearsed > straight


def test_rehearsals_are_drawn_from_the_given_generator(blob_prior: Prior) -> None:
    observation, _, _ = batch(blob_prior, 4, lr=0.05, steps=2, batch_size=2)
    bias = find_head(observation).bias
    draws = [
        log_likelihoods(observation, bias, [[2, 2], [1, 3]], 12, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


@pytest.mark.parametrize("changes", [{}, {"lr": 0.05, "steps": 2}])
def test_a_wrong_count_betrays_itself_at_the_right_images(blob_prior: Prior, changes: dict[str, object]) -> None:
    """B·da_c − Σp_ic + n_c is 0 for the truth; with one label flipped the images name the right counts."""
    observation, x, y = batch(blob_prior, 4, **changes)
    bias = find_head(observation).bias
    off, allowed = deviation(observation, Candidate(x, y, "truth"), bias)
    assert float(off.abs().max()) < 1e-3 < allowed
    if changes:
        return  # over several steps a wrong label bends the training itself
    wrong = y.clone()
    wrong[0] = 1 - wrong[0]
    candidate = Candidate(x, wrong, "wrong")
    off, allowed = deviation(observation, candidate, bias)
    assert off.abs().tolist() == pytest.approx([1, 1], abs=1e-3)
    assert implied_counts(candidate, off, 4) == torch.bincount(y, minlength=2).tolist()
    run = Attempt(observation, Settings(), torch.Generator(), Labels((wrong,), "set", ""), Clock(1))
    other, notes = check_labels(run, candidate)
    assert other is not None and same_multiset(other, y)
    assert "disagree by 1" in notes[0]
    told = replace(run, labels=Labels((wrong,), "oracle", ""))
    assert check_labels(told, candidate) == (None, ())


def test_more_images_than_classes_and_every_tried_multiset_is_reported(blob_prior: Prior) -> None:
    observation, _, y = batch(blob_prior, 5)
    found = reconstruct(
        observation, Settings("inverting_gradients", 1, 5, budget_s=3), torch.Generator().manual_seed(0)
    )
    assert found.labels.shape == (5,)
    assert found.label_source in ("recovered", "set")
    assert any(same_multiset(y, tried) for tried in found.label_set)


def test_joint_reports_the_final_arg_max(blob_prior: Prior) -> None:
    model, x = cases.lenet(shape=SHAPE), cases.blobs(1, seed=1).images
    for label in (0, 1):
        observation = cases.observation_of(model, x, torch.tensor([label]), blob_prior)
        found = reconstruct(observation, Settings("dlg", budget_s=0.7, joint=True), torch.Generator().manual_seed(0))
        assert found.label_source == "joint"
        assert found.labels.tolist() == [label]


def test_oracle_is_stamped_and_never_the_default() -> None:
    model, plan, data = cases.lenet(shape=SHAPE), cases.recipe(), cases.blobs(1, seed=1)
    delta = cases.upload(model, data.images, data.labels, plan)
    view = cases.view_of(model, delta, 1, plan, oracle=data.labels)
    findings = GradInversion(labels="oracle").conclude(cases.target_of(model, (view,), cases.blobs(64)))
    assert findings.reconstructions[0].label_source == "oracle"
    assert findings.assumptions["labels"] == "oracle"
    assert any("told in advance" in note for note in findings.notes)
    assert GradInversion().labels == "recovered"


def test_counts_without_a_bias_from_row_sums(blob_prior: Prior) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 2, bias=False))
    right = 0
    for seed in range(1, 6):
        data = cases.blobs(6, seed=seed)
        observation = cases.observation_of(cases.Normalised(net), data.images, data.labels, blob_prior)
        assert find_head(observation).bias is None
        found = recover_labels(observation)
        right += any(same_multiset(data.labels, guess) for guess in found.guesses)
    assert right >= 4


def test_counts_of_several_labels_an_image(blob_prior: Prior) -> None:
    """Each label's count has its own posterior; the truth is among what is tried."""
    model, x = cases.lenet(shape=SHAPE, classes=2), cases.blobs(4, seed=1).images
    shape = torch.stack([blob_prior.labels, 1 - blob_prior.labels], 1).float()
    prior = replace(blob_prior, labels=shape)
    y = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 0]])
    observation = cases.observation_of(model, x, y, prior, cases.recipe(task="multilabel", num_classes=2))
    found = recover_labels(observation)
    assert found.source == "set"
    assert [3, 2] in [guess.sum(0).long().tolist() for guess in found.guesses]
