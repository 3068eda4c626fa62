"""Label recovery: signs for one image, posterior counts for batches, honest words where the head is hidden."""

from __future__ import annotations

import math

import pytest
import torch
from fedsec.attacks.gradinversion.label_counts import (
    Moments,
    credible_counts,
    expand,
    largest_remainder,
    log_posterior,
)
from fedsec.attacks.gradinversion.labels import find_head, recover_labels
from fedsec.attacks.gradinversion.observation import observe
from fedsec.attacks.gradinversion.prior import Prior
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from . import cases

SHAPE = (1, 16, 16)


@pytest.mark.parametrize("label", range(5))
def test_one_image_by_the_sign_of_the_bias_gradient(label: int, blob_prior: Prior) -> None:
    model, x = cases.lenet(shape=SHAPE, classes=5), cases.blobs(1, seed=1).images
    plan = cases.recipe(num_classes=5)
    found = recover_labels(cases.observation_of(model, x, torch.tensor([label]), blob_prior, plan))
    assert found.source == "recovered"
    assert [g.tolist() for g in found.guesses] == [[label]]


@pytest.mark.parametrize(("activation", "classes"), [(nn.ReLU, 2), (nn.ReLU, 4), (nn.Tanh, 4)])
def test_a_head_without_bias(activation: type[nn.Module], classes: int, blob_prior: Prior) -> None:
    for label in range(classes):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), activation(), nn.Linear(64, classes, bias=False))
        model, x = cases.Normalised(net), cases.blobs(1, seed=1).images
        plan = cases.recipe(num_classes=classes)
        found = recover_labels(cases.observation_of(model, x, torch.tensor([label]), blob_prior, plan))
        assert found.guesses[0].tolist() == [label]


def test_two_classes_without_bias_and_with_signed_features_are_ambiguous(blob_prior: Prior) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 2, bias=False))
    observation = cases.observation_of(
        cases.Normalised(net), cases.blobs(1, seed=1).images, torch.tensor([1]), blob_prior
    )
    found = recover_labels(observation)
    assert found.source == "set"
    assert sorted(g.tolist() for g in found.guesses) == [[0], [1]]


def test_multilabel_signs(blob_prior: Prior) -> None:
    model, x = cases.lenet(shape=SHAPE, classes=5), cases.blobs(1, seed=1).images
    y = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0]])
    plan = cases.recipe(task="multilabel", num_classes=5)
    assert torch.equal(recover_labels(cases.observation_of(model, x, y, blob_prior, plan)).guesses[0], y)


def test_oracle_labels_say_so(blob_prior: Prior) -> None:
    model, data = cases.lenet(shape=SHAPE), cases.blobs(1, seed=1)
    observation = cases.observation_of(model, data.images, data.labels, blob_prior, oracle=1 - data.labels)
    found = recover_labels(observation)
    assert found.source == "oracle"
    assert torch.equal(found.guesses[0], 1 - data.labels)


def test_hidden_head_is_a_guess_by_public_rates(blob_prior: Prior) -> None:
    model, data, plan = cases.lenet(shape=SHAPE), cases.blobs(1, seed=1), cases.recipe()
    shared = tuple(n for n, _ in model.named_parameters() if not n.startswith("net.7"))
    delta = cases.upload(model, data.images, data.labels, plan, names=shared)
    observation = observe(cases.view_of(model, delta, 1, plan, names=shared), model, blob_prior, SHAPE)
    assert find_head(observation).bias is None
    found = recover_labels(observation)
    assert found.source == "guessed"
    common = int(torch.bincount(blob_prior.labels).argmax())
    assert found.guesses[0].tolist() == [common]


def test_strong_noise_leaves_both_labels(blob_prior: Prior) -> None:
    model, data, plan = cases.lenet(shape=SHAPE), cases.blobs(1, seed=1), cases.recipe()
    delta = cases.upload(model, data.images, data.labels, plan)
    std = 100 * float(delta.abs().max())
    noisy = delta + std * torch.randn(len(delta), generator=torch.Generator().manual_seed(0))
    view = cases.view_of(model, noisy, 1, plan, knowledge={"g": {"noise": "gaussian", "noise_std": std}})
    found = recover_labels(observe(view, model, blob_prior, SHAPE))
    assert found.source == "set"
    assert len(found.guesses) == 2


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_counts_of_an_untrained_model_with_repeated_labels(batch: int, blob_prior: Prior) -> None:
    """Predictions of an untrained model hardly depend on the image, so counts are exact (specification, §2.1)."""
    model, right = cases.lenet(shape=SHAPE), 0
    for seed in range(1, 6):
        data = cases.blobs(batch, seed=seed)
        found = recover_labels(cases.observation_of(model, data.images, data.labels, blob_prior))
        right += sorted(found.guesses[0].tolist()) == sorted(data.labels.tolist())
    assert right >= 4


def test_counts_through_sample_clipping(blob_prior: Prior) -> None:
    model, data, lr, divisor = cases.lenet(shape=SHAPE), cases.blobs(4, seed=2), 0.1, 8.0
    pairs = zip(data.images.split(1), data.labels.split(1), strict=True)
    rows = [cases.upload(model, x, y, cases.recipe()) for x, y in pairs]
    clip = 0.5 * min(float(r.norm()) for r in rows)
    total = torch.stack([r * clip / r.norm() for r in rows]).sum(0)
    known = {"dp": {"clip_norm": clip, "clip_scope": "sample", "noise_multiplier": 0.0, "batch_divisor": divisor}}
    view = cases.view_of(model, lr * total / divisor, 4, cases.recipe(lr=lr), knowledge=known)
    found = recover_labels(observe(view, model, blob_prior, SHAPE))
    assert sorted(found.guesses[0].tolist()) == sorted(data.labels.tolist())


@given(st.lists(st.floats(0, 50), min_size=2, max_size=6), st.integers(1, 40))
def test_largest_remainder_sums_to_the_total(shares: list[float], total: int) -> None:
    counts = largest_remainder(torch.tensor(shares, dtype=torch.float64), total)
    assert sum(counts) == total
    assert all(n >= 0 for n in counts)
    assert sorted(expand(counts, torch.device("cpu")).tolist()) == sorted(
        c for c, n in enumerate(counts) for _ in range(n)
    )


def test_log_posterior_is_gaussian_times_multinomial() -> None:
    """Against scipy's densities for two classes."""
    from scipy.stats import binom, norm

    exact = torch.float64
    moments = Moments(torch.tensor([[-0.6], [0.3]], dtype=exact), torch.tensor([[[0.02]], [[0.05]]], dtype=exact))
    rates, total, noise = torch.tensor([3.0, 7.0], dtype=exact), torch.tensor([0.1], dtype=exact), 0.2
    scores = [log_posterior([k, 5 - k], total, moments, noise, rates) for k in range(6)]
    expected = []
    for k in range(6):
        variance = 0.02 * k + 0.05 * (5 - k)
        variance += noise**2 + 1e-8 + 1e-6 * variance
        mean = -0.6 * k + 0.3 * (5 - k)
        expected.append(norm.logpdf(0.1, mean, math.sqrt(variance)) + binom.logpmf(k, 5, 0.3))
    shifts = [a - b for a, b in zip(scores, expected, strict=True)]
    assert max(shifts) - min(shifts) < 1e-9


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 4), st.integers(2, 9), st.integers(0, 1000))
def test_credible_sets_hold_counts_of_the_batch(classes: int, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.rand(classes, classes - 1, generator=generator).double() - torch.eye(classes)[:, :-1]
    covariance = 0.01 * torch.eye(classes - 1).double().expand(classes, -1, -1)
    truth = largest_remainder(torch.rand(classes, generator=generator), batch)
    total = torch.tensor(truth).double() @ mean
    chosen = credible_counts(total, batch, Moments(mean, covariance), 0.01, torch.ones(classes).double())
    assert all(sum(counts) == batch and min(counts) >= 0 for _, counts in chosen)
    assert sum(p for p, _ in chosen) <= 1 + 1e-9
    probabilities = [p for p, _ in chosen]
    assert probabilities == sorted(probabilities, reverse=True)


@pytest.mark.slow
def test_set_covers_the_truth_on_a_trained_model(
    xrays: tuple[Tensor, Tensor], xray_prior: Prior, trained_lenet: cases.Normalised
) -> None:
    """On trained models the point estimate may not be trusted; the 95 % set holds the truth in at least 90 of 100."""
    from fedsec.attacks.gradinversion.label_evidence import bias_evidence, class_moments
    from fedsec.attacks.gradinversion.labels import class_rates

    images, labels = xrays
    order = torch.randperm(len(images) - 2100, generator=torch.Generator().manual_seed(0)) + 2100
    covered = exact = 0
    for i in range(100):
        rows = order[8 * i : 8 * i + 8]
        observation = cases.observation_of(trained_lenet, images[rows], labels[rows], xray_prior)
        bias = find_head(observation).bias
        assert bias is not None
        evidence = bias_evidence(observation, bias)
        total = evidence.total
        rates = class_rates(observation, 2)
        chosen = credible_counts(total[:-1], 8, class_moments(observation, evidence), 0.0, rates)
        truth = torch.bincount(labels[rows], minlength=2).tolist()
        covered += truth in [counts for _, counts in chosen]
        exact += truth == chosen[0][1]
    assert covered >= 90
    assert exact < 90
