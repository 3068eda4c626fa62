"""Does the public encoder learn, stay the same, and say no where there is nothing to learn from?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedsec.metrics import encoder as module
from fedsec.metrics.encoder import train_encoder
from fedsec.metrics.features import compare_features, diagnosis, feature_mse


def stripes(n, seed=0, size=16, channels=1):
    """Two classes: horizontal and vertical stripes, in noise."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    wave = (torch.arange(size) % 4 < 2).float()
    pattern = torch.stack([wave.expand(size, size), wave.expand(size, size).T])[labels][:, None]
    return (0.5 * pattern + 0.5 * torch.rand(n, channels, size, size, generator=g)), labels


@pytest.fixture(scope="module", autouse=True)
def short():
    """A quarter of the training steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", 50)
        yield
        module._trained.clear()


@pytest.fixture(scope="module")
def trained():
    found = train_encoder(*stripes(240), seed=0)
    assert found is not None
    return found


def test_it_learns_and_is_the_same_every_time(trained):
    images, labels = stripes(100, seed=1)
    assert (trained.classify(images) == labels).float().mean() > 0.95
    module._trained.clear()
    again = train_encoder(*stripes(240), seed=0)
    assert again is not trained and torch.equal(again.features(images), trained.features(images))
    assert train_encoder(*stripes(240), seed=0) is again
    before = torch.get_rng_state()
    other = train_encoder(*stripes(240), seed=1)
    assert not torch.equal(other.features(images), trained.features(images))
    assert torch.equal(torch.get_rng_state(), before)


def test_features_are_about_the_public_mean(trained):
    assert trained.features(stripes(240)[0]).mean(0).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["few", "one class", "several labels"])
def test_nothing_to_learn_from(kind):
    images, labels = stripes(100 if kind == "few" else 240)
    labels = {"few": labels, "one class": labels * 0, "several labels": F.one_hot(labels).float()}[kind]
    assert train_encoder(images, labels, seed=0) is None


def test_large_and_coloured_images_are_shrunk():
    assert module.shrink(torch.rand(2, 3, 64, 48)).shape == (2, 3, 32, 32)
    assert module.shrink(torch.rand(2, 1, 28, 28)).shape == (2, 1, 28, 28)


def test_feature_mse_closed_form():
    images, truths = torch.zeros(3, 1, 2, 2), torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert feature_mse(lambda x: 2 * x.flatten(1), images, truths).tolist() == [0, 4, 16]
    found = compare_features(
        "victim",
        lambda x: x.flatten(1),
        truths,
        images,
        truths,
        generator=np.random.default_rng(0),
        draws=10,
        groups=np.arange(3),
    )
    assert found["feature_mse_victim"].value == 0 and found["prior_feature_mse_victim"].value == 1


def test_diagnosis_beside_its_chance_and_its_ceiling():
    truths = torch.tensor([0.1, 0.2, 0.9, 0.8]).view(4, 1, 1, 1)
    blank = torch.zeros_like(truths)

    def classify(x):
        return (x.flatten(1).mean(1) > 0.5).long()

    found = diagnosis(classify, blank, truths, torch.tensor([0, 0, 1, 0]), np.arange(4))
    assert found["diagnosis_retained"].value == 0.75
    assert found["diagnosis_original"].value == 0.75
    assert found["diagnosis_chance"] == 0.75
