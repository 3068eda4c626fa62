"""The order in which candidates are preferred; nothing of it can see the truth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fedsec.attacks.gradinversion.candidate import Candidate
from fedsec.attacks.gradinversion.certificate import assess
from fedsec.attacks.gradinversion.observation import Observation
from fedsec.attacks.gradinversion.prior import Prior
from fedsec.attacks.gradinversion.selection import disagreement, select

from . import cases


@pytest.fixture(scope="module")
def observation(blob_prior: Prior) -> Observation:
    data = cases.blobs(1, seed=1)
    return cases.observation_of(cases.lenet(shape=(1, 16, 16)), data.images, data.labels, blob_prior)


def candidate(name: str, residual: float, energy: float = 0.0, certified: int = 0, misfit: float = 0.0) -> Candidate:
    images = torch.zeros(1, 1, 16, 16)
    return Candidate(images, torch.tensor([0]), name, residual, energy, misfit, certified=certified)


def test_a_proof_beats_a_smaller_residual(observation: Observation) -> None:
    assert select([candidate("a", 1e-6), candidate("b", 1e-3, certified=1)], observation).method == "b"


def test_residual_decides_and_ties_go_to_the_prior(observation: Observation) -> None:
    pool = [candidate("a", 0.100, 50), candidate("b", 0.1005, 10), candidate("c", 0.2, 1)]
    assert select(pool, observation).method == "b"


def test_known_noise_ranks_by_posterior(observation: Observation) -> None:
    """A residual that fits the noise as well must not beat a more probable image."""
    noisy = replace(observation, noise_std=1.0)
    pool = [candidate("overfit", 0.9, 500, misfit=1000), candidate("mean", 1.0, 0, misfit=1300)]
    assert select(pool, noisy).method == "mean"


def test_certificate_needs_all_three_parts(observation: Observation) -> None:
    data = cases.blobs(1, seed=1)
    whole = Candidate(data.images, data.labels, "x", est_psnr=100.0, layers_ok=True)
    assert assess(whole, observation).certified == 1
    assert assess(replace(whole, layers_ok=False), observation).certified == 0
    assert assess(replace(whole, est_psnr=49.0), observation).certified == 0
    assert assess(replace(whole, est_psnr=None), observation).certified == 0
    assert assess(replace(whole, images=data.images.roll(1, 2)), observation).certified == 0
    assert assess(replace(whole, labels=1 - data.labels), observation).certified == 0


def test_disagreement_ignores_the_order_of_a_batch() -> None:
    images = cases.blobs(3, seed=1).images
    first = Candidate(images, torch.zeros(3), "a")
    assert disagreement(first, replace(first, images=images.flip(0))) == 0
    assert disagreement(first, replace(first, images=images + 0.1)) == pytest.approx(0.1, rel=1e-4)
