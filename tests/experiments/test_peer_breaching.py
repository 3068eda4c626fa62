"""Do the mends of the peer mend it, and nothing else? Needs the extra `bench`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("breaching", reason="the peer is installed by the extra `bench`")

from experiments.benchmarks import peer_breaching, tracing
from tests.attacks.gradinversion import cases

TV, JOINT = "breaching invertinggradients, TV 0.2", "breaching deepleakage"
MOMENTS = torch.tensor([cases.MEAN]), torch.tensor([cases.STD])


def attack(configuration: str, *, told: bool = False, **options: Any) -> tuple[peer_breaching.Outcome, Tensor, Any]:
    """On one 16x16 image behind a sigmoid LeNet."""
    public, victim = cases.blobs(64), cases.blobs(1, seed=5)
    model = cases.lenet(shape=(1, 16, 16))
    oracle = victim.labels if told else None
    observation = cases.observation_of(model, victim.images, victim.labels, cases.prior_of(public), oracle=oracle)
    recorder = tracing.Recorder(tuple(victim.images.shape))
    chosen = {"seed": 1, "budget_s": 60.0, **options}
    done = peer_breaching.reconstruct(configuration, observation, model.net, *MOMENTS, recorder, **chosen)
    return done, victim.images, (victim.labels, recorder)


def test_the_version_is_that_of_the_stored_numbers() -> None:
    assert peer_breaching.version() == "0.1.2"


@pytest.mark.parametrize(("told", "source"), [(False, "recovered"), (True, "told")])
def test_grey_images_run_with_total_variation(told: bool, source: str) -> None:
    done, truth, (labels, recorder) = attack(TV, told=told, iterations=5)
    assert done.images.shape == truth.shape
    assert done.iterations == len(recorder.points) == 5
    assert done.label_source == source
    assert torch.equal(done.labels, labels)


def test_total_variation_of_three_channels_is_unchanged_and_of_one_is_that_of_grey_as_rgb() -> None:
    rgb, grey = (peer_breaching.prepare(TV, nn.Linear(1, 2)) for _ in range(2))
    image = torch.rand(2, 3, 8, 8)
    before = rgb.regularizers[0](image)
    of_grey = rgb.regularizers[0](image[:, :1].expand(-1, 3, -1, -1))
    peer_breaching.mend_total_variation(rgb, 3)
    peer_breaching.mend_total_variation(grey, 1)
    assert float(rgb.regularizers[0](image)) == pytest.approx(float(before))
    assert float(grey.regularizers[0](image[:, :1])) == pytest.approx(float(of_grey))


def test_joint_labels_are_those_of_the_optimised_logits() -> None:
    # What it reports by itself, the arg max of the random template, is wrong for both seeds.
    for seed in range(2):
        done, _, (labels, _) = attack(JOINT, iterations=3, seed=seed)
        assert done.label_source == "joint"
        assert torch.equal(done.labels, labels)


def test_the_budget_ends_the_attack_with_its_best_so_far() -> None:
    done, truth, (_, recorder) = attack(TV, budget_s=0.2)
    assert 0 < done.iterations < peer_breaching.MAX_ITERATIONS
    assert done.images.shape == truth.shape
    assert bool(done.images.isfinite().all())
    assert done.iterations == len(recorder.points) - 1


def test_it_is_given_the_upload_and_reaches_the_truth() -> None:
    done, truth, _ = attack(JOINT, iterations=12)
    assert cases.psnr(done.images.clamp(0, 1), truth) > 30
