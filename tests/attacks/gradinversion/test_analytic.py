"""The fully connected first layer, and exact features in front of a later one."""

from __future__ import annotations

import pytest
import torch
from fedsec.attacks.gradinversion.analytic import analytic, dense_input
from fedsec.attacks.gradinversion.candidate import Candidate, NotApplicable
from fedsec.attacks.gradinversion.certificate import assess
from fedsec.attacks.gradinversion.chain import find_chain
from fedsec.attacks.gradinversion.features import feature_distance, recover_features, usable
from fedsec.attacks.gradinversion.observation import Observation, observe
from fedsec.attacks.gradinversion.prior import Prior, fit_prior
from fedsec.attacks.gradinversion.trace import trace
from torch import nn

from . import cases


def attack(observation: Observation, y: torch.Tensor) -> Candidate:
    chain = find_chain(
        trace(observation.simulation.model, torch.zeros(1, *observation.image_shape)), observation.complete
    )
    return assess(analytic(observation, chain, y)[0], observation)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 16), (1, 12, 20)])
def test_exact_for_a_dense_first_layer(shape: tuple[int, int, int]) -> None:
    public, data = cases.blobs(20, shape), cases.blobs(1, shape, seed=1)
    model = cases.mlp(pixels=data.images[0].numel())
    observation = cases.observation_of(model, data.images, data.labels, fit_prior(public))
    found = attack(observation, data.labels)
    assert cases.psnr(found.images, data.images) > 110
    assert found.certified == 1


def test_refuses_batches_and_convolutions(blob_prior: Prior) -> None:
    data = cases.blobs(2, seed=1)
    with pytest.raises(NotApplicable, match="mixture of 2"):
        attack(cases.observation_of(cases.mlp(256), data.images, data.labels, blob_prior), data.labels)
    x, y = data.images[:1], data.labels[:1]
    with pytest.raises(NotApplicable, match="first layer is a convolution"):
        attack(cases.observation_of(cases.lenet(shape=(1, 16, 16)), x, y, blob_prior), y)


def test_weighted_estimate_is_the_least_squares_one() -> None:
    """Against torch's solver on the whitened rows of one column, with unequal errors."""
    generator = torch.Generator().manual_seed(0)
    da, h = torch.randn(6, generator=generator).double(), torch.randn(5, generator=generator).double()
    std = 0.1 + torch.rand(6, 5, generator=generator).double()
    dw = torch.outer(da, h) + std * torch.randn(6, 5, generator=generator).double()
    found = dense_input(dw, da, std)
    for j in range(5):
        expected = torch.linalg.lstsq((da / std[:, j])[:, None], (dw[:, j] / std[:, j])[:, None]).solution[0, 0]
        assert float(found[j]) == pytest.approx(float(expected), rel=1e-9)
    with pytest.raises(NotApplicable, match="zero"):
        dense_input(dw, torch.zeros(6).double(), std)


def test_features_behind_max_pooling_are_exact(blob_prior: Prior) -> None:
    model, data = cases.small_cnn(), cases.blobs(1, seed=1)
    observation = cases.observation_of(model, data.images, data.labels, blob_prior)
    features = recover_features(observation, "net.9.weight", "net.9.bias")
    truth = model.net[:9]((data.images - cases.MEAN) / cases.STD)[0].detach()
    assert float((features.value - truth).norm() / truth.norm()) < 1e-5
    assert usable(features)
    assert float(feature_distance(features, data.images)) < 1e-9
    assert float(feature_distance(features, torch.zeros_like(data.images))) > 1e-2


def test_noise_makes_features_unusable_and_their_error_is_predicted(blob_prior: Prior) -> None:
    model, data, plan = cases.small_cnn(), cases.blobs(1, seed=1), cases.recipe()
    delta = cases.upload(model, data.images, data.labels, plan)
    ratios = []
    for rel, seed in ((0.01, 0), (0.01, 1), (3.0, 2)):
        std = rel * float(delta.norm()) / len(delta) ** 0.5
        noisy = delta + std * torch.randn(len(delta), generator=torch.Generator().manual_seed(seed))
        known = {"gaussian": {"noise": "gaussian", "noise_std": std}}
        observation = observe(cases.view_of(model, noisy, 1, plan, knowledge=known), model, blob_prior, (1, 16, 16))
        features = recover_features(observation, "net.9.weight", "net.9.bias")
        truth = model.net[:9]((data.images - cases.MEAN) / cases.STD)[0].detach()
        ratios.append(float(((features.value - truth) / features.std).pow(2).mean()))
        assert usable(features) == (rel < 1)
    assert 0.7 < sum(ratios[:2]) / 2 < 1.4


def test_head_without_bias_gives_no_features(blob_prior: Prior) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 2, bias=False))
    data = cases.blobs(1, seed=1)
    observation = cases.observation_of(cases.Normalised(net), data.images, data.labels, blob_prior)
    with pytest.raises(NotApplicable, match="no fully connected layer with bias"):
        attack(observation, data.labels)
