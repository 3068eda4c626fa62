"""Is re-identification perfect for the image itself, at chance for what knows nothing, and only within the class?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsec.metrics.reidentification import Ranks, draw_galleries, identifies, reidentification
from fedsec.types import Estimate


def rng():
    return np.random.default_rng(0)


def people(n, seed=0, size=8):
    """Images of n different people: a common face and 8-bit noise."""
    g = torch.Generator().manual_seed(seed)
    face = torch.rand(1, 1, size, size, generator=g)
    return ((face * 0.5 + 0.5 * torch.rand(n, 1, size, size, generator=g)) * 255).round() / 255


def rank_in_gallery(guess, truths, labels, images, gallery_labels, embed=None):
    return draw_galleries(truths, labels, images, gallery_labels, generator=rng()).ranks(guess, embed)


def test_the_image_itself_is_found_and_its_copies_do_not_count():
    truth = people(30)
    gallery = torch.cat([truth, people(300, seed=1)])
    ranks = rank_in_gallery(truth, truth, torch.ones(30), gallery, torch.ones(330))
    assert (ranks.rank == 1).all() and (ranks.gallery == 200).all()
    found = reidentification(ranks, generator=rng())
    assert found["reid_rank1"].value == 1 and found["reid_auc"].value == 1
    assert found["reid_chance"] == pytest.approx(1 / 200)
    assert (found["reid_median_rank"], found["reid_gallery"], found["reid_left_out"]) == (1, 200, 0)


@pytest.mark.parametrize("kind", ["mean", "noise"])
def test_what_knows_nothing_of_the_patient_is_at_chance(kind):
    everybody = people(1200)
    truth, gallery = everybody[:400], everybody[400:]
    guess = gallery.mean(0, keepdim=True).expand_as(truth)
    if kind == "noise":
        guess = torch.rand(truth.shape, generator=torch.Generator().manual_seed(9))
    ranks = rank_in_gallery(guess, truth, torch.zeros(400), gallery, torch.zeros(800))
    found = reidentification(ranks, generator=rng())
    assert found["reid_auc"].low < 0.5 < found["reid_auc"].high
    assert found["reid_rank1"].low < found["reid_chance"] < found["reid_rank1"].high


def test_rank_counts_only_nearer_images_of_the_same_class():
    truth = torch.full((1, 1, 2, 2), 0.5)
    guess = torch.full((1, 1, 2, 2), 0.6)
    levels = torch.tensor([0.6, 0.62, 0.75, 0.6, 0.1])
    gallery = levels.view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    ranks = rank_in_gallery(guess, truth, torch.tensor([1]), gallery, torch.tensor([1, 1, 1, 0, 1]))
    assert (ranks.rank.item(), ranks.gallery.item()) == (3, 5)


def test_equal_distances_share_their_mean_rank_and_are_no_identification():
    truth, guess = torch.full((1, 1, 2, 2), 0.25), torch.full((1, 1, 2, 2), 0.5)
    twin = torch.full((1, 1, 2, 2), 0.75)
    ranks = rank_in_gallery(guess, truth, torch.zeros(1), twin, torch.zeros(1))
    assert ranks.rank.item() == 1.5
    assert reidentification(ranks, generator=rng())["reid_rank1"].value == 0


def test_several_labels_compare_with_the_same_set_of_labels():
    truth, gallery = people(1), people(3, seed=1)
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    ranks = rank_in_gallery(truth, truth, torch.tensor([[1.0, 0.0]]), gallery, labels)
    assert ranks.gallery.item() == 3


def test_images_without_candidates_are_left_out_and_counted():
    truth = people(2)
    ranks = rank_in_gallery(truth, truth, torch.tensor([0, 1]), people(5, seed=1), torch.zeros(5))
    assert np.isnan(ranks.rank).tolist() == [False, True]
    found = reidentification(ranks, generator=rng())
    assert found["reid_left_out"] == 1 and found["reid_rank1"].value == 1 and found["reid_gallery"] == 6
    nobody = reidentification(Ranks(np.array([np.nan]), np.array([1])), generator=rng())
    assert nobody == {"reid_left_out": 1}


def test_auc_and_chance_closed_forms():
    found = reidentification(Ranks(np.array([1.0, 3.0]), np.array([5, 3])), generator=rng())
    assert found["reid_auc"].value == pytest.approx((1 + 0) / 2)
    assert found["reid_chance"] == pytest.approx((1 / 5 + 1 / 3) / 2)
    assert found["reid_median_rank"] == 2


def test_by_features_the_nearest_direction_counts():
    """The reconstruction is twice as bright: far in pixels, at no angle to its patient."""
    truth = people(30)
    gallery = people(300, seed=1)
    dim = 0.4 * truth
    pixels = rank_in_gallery(dim, truth, torch.ones(30), gallery, torch.ones(300))
    features = rank_in_gallery(dim, truth, torch.ones(30), gallery, torch.ones(300), embed=lambda x: x.flatten(1))
    assert (features.rank == 1).all()
    assert (pixels.rank > 1).any()


def test_mean_image_is_at_chance_by_features_too():
    everybody = people(1200)
    truth, gallery = everybody[:400], everybody[400:]
    guess = gallery.mean(0, keepdim=True).expand_as(truth)
    ranks = rank_in_gallery(
        guess, truth, torch.zeros(400), gallery, torch.zeros(800), embed=lambda x: x.flatten(1) ** 2
    )
    found = reidentification(ranks, generator=rng())
    assert found["reid_auc"].low < 0.5 < found["reid_auc"].high


def test_what_counts_as_identification():
    def of(value, low, n=20):
        return Estimate(value, low, 1.0, n)

    chance = {"reid_chance": 0.005}
    assert not identifies({})
    assert not identifies({**chance, "reid_rank1": of(0.05, 0.0089), "reid_auc": of(0.5, 0.4)})  # one lucky hit
    assert identifies({**chance, "reid_rank1": of(0.1, 0.028), "reid_auc": of(0.5, 0.4)})
    assert identifies({**chance, "reid_rank1": of(0, 0), "reid_auc": of(0.7, 0.6), "reid_prior_auc": of(0.5, 0.4)})
    unfair = {"reid_rank1": of(0, 0), "reid_auc": of(0.7, 0.6), "reid_prior_auc": of(0.65, 0.5)}
    assert not identifies({**chance, **unfair})
    assert not identifies({**chance, "reid_rank1": of(0.5, float("nan")), "reid_auc": of(1, float("nan"))})
