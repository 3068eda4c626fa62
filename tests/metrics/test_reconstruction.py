"""Does the leakage table count every attacked image, in any order, and show the prior beside it?"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsec.findings import Reconstruction
from fedsec.metrics.encoder import PublicEncoder
from fedsec.metrics.image import nearest_public_psnr, psnr
from fedsec.metrics.limits import beside_limits
from fedsec.metrics.reconstruction import complete, summarise_reconstructions
from fedsec.types import to_json

BATCHES, SIZE = 12, 4


def rng():
    return np.random.default_rng(0)


def images(*shape, seed=0):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 255).round() / 255


def attacked(channels=1, pixels=12):
    truths = [images(SIZE, channels, pixels, pixels, seed=b) for b in range(BATCHES)]
    labels = [torch.arange(SIZE) % 2 for _ in truths]
    return truths, labels


def summarise(guesses, truths, labels, guessed_labels=None, public=None, **more):
    guessed_labels = guessed_labels or labels
    results = tuple(Reconstruction(g, y, "test") for g, y in zip(guesses, guessed_labels, strict=True))
    public = images(50, *truths[0].shape[1:], seed=99) if public is None else public
    return summarise_reconstructions(results, truths, labels, public, generator=rng(), draws=200, **more)


def test_every_key_of_the_specification():
    truths, labels = attacked()
    gallery = images(600, 1, 12, 12, seed=77)
    found = summarise(
        [t[torch.tensor([2, 0, 3, 1])] for t in truths],
        truths,
        labels,
        [y[torch.tensor([2, 0, 3, 1])] for y in labels],
        gallery_images=gallery,
        gallery_labels=torch.arange(600) % 2,
    )
    assert found["psnr"].value == found["psnr_of_mean_mse"].value == 140
    assert found["psnr"].n == BATCHES
    assert found["ssim"].value == pytest.approx(1)
    assert found["rdlv"].value > 1
    truth, public = torch.cat(truths), images(50, 1, 12, 12, seed=99)
    prior = public.double().mean(0, keepdim=True).expand_as(truth)
    assert found["prior_psnr"].value == pytest.approx(float(np.median(psnr(prior, truth))))
    assert found["nearest_public_psnr"].value == pytest.approx(float(np.median(nearest_public_psnr(truth, public))))
    assert found["label_accuracy"].value == found["label_accuracy_matched"].value == found["label_exact"].value == 1
    assert found["reid_rank1"].value == found["reid_auc"].value == 1
    assert found["reid_chance"] == 1 / 200 and found["reid_gallery"] == 200
    assert found["reid_prior_auc"].low < 0.5 < found["reid_prior_auc"].high
    assert {name: e.value for name, e in found["success"].items()} == dict.fromkeys(
        ["psnr_20", "psnr_25", "psnr_30", "psnr_40", "beats_nearest_public", "ssim_0.5", "ssim_0.7", "ssim_0.9"], 1.0
    )
    assert found["n_missing"] == found["n_surplus"] == 0
    assert len(found["images"]) == BATCHES * SIZE
    row = {"victim": 1, "psnr": 140.0, "missing": False, "ssim": pytest.approx(1), "rank": 1.0}
    assert found["images"][5].pop("matched_public_psnr") < 15  # noise as the public images are
    assert found["images"][5] == row | {"prior_psnr": pytest.approx(float(psnr(prior[5:6], truth[5:6])))}
    json.dumps(to_json(found), allow_nan=False)


@settings(deadline=None, max_examples=10)
@given(st.permutations(range(SIZE)))
def test_the_order_within_a_batch_does_not_matter(order):
    truths, labels = attacked()
    noisy = [(t + 0.1 * images(*t.shape, seed=5)).clamp(0, 1) for t in truths]
    straight, shuffled = (summarise(g, truths, labels) for g in (noisy, [n[list(order)] for n in noisy]))
    assert straight["psnr"] == shuffled["psnr"]
    assert straight["images"] == shuffled["images"]


def test_batches_are_not_mixed():
    truths, labels = attacked()
    found = summarise(truths[::-1], truths, labels)
    assert found["psnr"].value < 20


def test_the_prior_has_no_leakage():
    truths, labels = attacked()
    public = images(50, 1, 12, 12, seed=99)
    found = summarise([public.mean(0, keepdim=True).expand_as(t) for t in truths], truths, labels, public=public)
    assert found["psnr"].value == pytest.approx(found["prior_psnr"].value, abs=1e-4)
    assert found["rdlv"].value == pytest.approx(0, abs=1e-5)
    assert found["success"]["psnr_20"].value == 0


def test_missing_and_broken_images_count_as_the_prior():
    truths, labels = attacked()
    guesses = [t.clone() for t in truths]
    guesses[0][1, 0, 0, 0] = float("nan")
    guesses[1] = guesses[1][:2]
    guesses[2] = guesses[2][:0]
    guessed_labels = [labels[0], labels[1][:2], labels[2][:0], *labels[3:]]
    found = summarise(guesses, truths, labels, guessed_labels)
    assert found["n_missing"] == 1 + 2 + 4
    assert [row["missing"] for row in found["images"][:4]] == [False, True, False, False]
    prior = images(50, 1, 12, 12, seed=99).double().mean(0)
    assert found["images"][1]["psnr"] == pytest.approx(psnr(prior[None], truths[0][1:2]).item())
    assert found["label_accuracy"].value == pytest.approx(1 - 6 / 48)
    assert found["success"]["psnr_40"].value == pytest.approx(1 - 7 / 48)


def test_more_reconstructions_than_images_are_declared():
    truths, labels = attacked()
    guesses = [torch.cat([t, images(2, 1, 12, 12, seed=9)]) for t in truths]
    found = summarise(guesses, truths, labels, [torch.cat([y, y[:2]]) for y in labels])
    assert found["n_surplus"] == 2 * BATCHES and found["psnr"].value == 140


def test_labels_are_scored_as_a_multiset_and_per_matched_image():
    truths, labels = attacked()
    found = summarise(truths, truths, labels, [torch.tensor([1, 0, 0, 0]) for _ in labels])
    assert found["label_accuracy"].value == 0.75
    assert found["label_accuracy_matched"].value == 0.25
    assert found["label_exact"].value == 0


def test_several_labels_count_as_a_whole():
    truths, _ = attacked()
    labels = [torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]) for _ in truths]
    wrong = [y.clone().index_fill(0, torch.tensor([3]), 1) for y in labels]
    assert summarise(truths, truths, labels, wrong)["label_accuracy"].value == 0.75


def test_mean_mse_is_not_the_mean_of_decibels():
    truths, labels = attacked()
    guesses = [t.clone() for t in truths]
    guesses[0] = 1 - guesses[0]
    found = summarise(guesses, truths, labels)
    error = np.mean([10 ** (-row["psnr"] / 10) for row in found["images"]])
    assert found["psnr"].value == 140
    assert found["psnr_of_mean_mse"].value == pytest.approx(-10 * np.log10(error))


def test_few_images_have_no_interval_and_small_images_no_ssim():
    truths, labels = [images(3, 3, 8, 8)], [torch.zeros(3)]
    found = summarise(truths, truths, labels)
    assert found["psnr"].value == 140 and np.isnan(found["psnr"].low)
    assert np.isnan(found["success"]["psnr_30"].low)
    assert not {"ssim", "rdlv", "prior_ssim", "reid_auc"} & found.keys()
    json.dumps(to_json(found), allow_nan=False)


def test_public_images_are_not_candidates():
    truths, labels = attacked()
    public = images(50, 1, 12, 12, seed=99)
    found = summarise(
        truths, truths, labels, public=public, gallery_images=public, gallery_labels=torch.zeros(len(public))
    )
    assert found["reid_left_out"] == BATCHES * SIZE and "reid_auc" not in found


def test_a_row_without_its_prior_is_refused():
    truths, labels = attacked()
    found = summarise(truths, truths, labels)
    assert complete(found) == found
    del found["prior_psnr"]
    with pytest.raises(ValueError, match="without prior_psnr"):
        complete(found)


def test_the_best_of_many_pairs_comes_with_its_chance_level():
    """Reconstructions that have nothing to do with the truth: the maximum over pairs is large, and so is its null."""
    truths, labels = attacked()
    strangers = [images(SIZE, 1, 12, 12, seed=500 + b) for b in range(BATCHES)]
    gallery = {"gallery_images": images(400, 1, 12, 12, seed=77), "gallery_labels": torch.arange(400) % 2}
    unrelated = summarise(strangers, truths, labels, **gallery)
    assert unrelated["rdlv_max"] > 0.1
    assert unrelated["rdlv_max"] == pytest.approx(unrelated["rdlv_max_null"], rel=0.4)
    exact = summarise(truths, truths, labels, **gallery)
    assert exact["rdlv_max"] > 3 * exact["rdlv_max_null"]
    assert "rdlv_max" not in summarise(truths, truths, labels)


def test_features_and_identification_by_a_network():
    truths, labels = attacked()
    pool = images(400, 1, 12, 12, seed=77)
    body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 8)).requires_grad_(False)
    encoder = PublicEncoder(body, torch.nn.Linear(8, 2).requires_grad_(False), torch.zeros(8), 2, 400, 0.0)
    found = summarise(
        truths,
        truths,
        labels,
        gallery_images=pool,
        gallery_labels=torch.arange(400) % 2,
        victim_features=lambda x: x.flatten(1),
        encoder=encoder,
    )
    assert found["feature_mse_victim"].value == found["feature_mse_public"].value == 0
    assert found["prior_feature_mse_victim"].value == pytest.approx(1 / 12, rel=0.2)
    assert found["reid_encoder_rank1"].value == found["reid_encoder_auc"].value == 1
    assert found["reid_encoder_prior_auc"].low < 0.5 < found["reid_encoder_prior_auc"].high
    assert found["diagnosis_retained"].value == found["diagnosis_original"].value
    assert found["diagnosis_chance"] == 0.5


def test_label_sets():
    truths, labels = attacked()
    tried = [(torch.tensor([0, 0, 0, 0]), torch.tensor([1, 0, 1, 0])), (torch.tensor([1, 1, 1, 1]),)] * (BATCHES // 2)
    guesses = tuple(Reconstruction(t, y[0], "test", label_set=y) for t, y in zip(truths, tried, strict=True))
    public = images(50, 1, 12, 12, seed=99)
    found = summarise_reconstructions(guesses, truths, labels, public, generator=rng(), draws=50)
    assert found["label_set_coverage"].value == 0.5
    assert found["label_set_size"] == 1.5
    assert "label_set_size" not in summarise(truths, truths, labels)


def test_without_a_prior_there_is_no_table():
    truths, labels = attacked()
    with pytest.raises(ValueError, match="public set is empty"):
        summarise(truths, truths, labels, public=images(0, 1, 12, 12))


def test_contract_violations_are_named():
    truths, labels = attacked()
    with pytest.raises(ValueError, match="1 reconstructions"):
        summarise_reconstructions(
            (Reconstruction(truths[0], labels[0], "x"),), truths, labels, truths[0], generator=rng()
        )
    with pytest.raises(ValueError, match="test returned images of shape"):
        summarise([t[:, :, :6] for t in truths], truths, labels)


def test_several_guesses_are_held_against_as_many_public_images() -> None:
    """Nine guesses for one truth, matched with it, beat the mean image by luck alone."""
    noise = torch.rand(200, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    public = torch.linspace(0.1, 0.9, 200)[:, None, None, None] + 0.05 * noise  # they differ in brightness
    order = torch.from_numpy(rng().permutation(200))
    truths = [public[order[i : i + 1]] for i in range(20)]
    rest = public[order[20:]]
    guesses = [Reconstruction(rest[i * 9 : i * 9 + 9], torch.zeros(9, dtype=torch.long), "luck") for i in range(20)]
    labels = [torch.zeros(1, dtype=torch.long)] * 20
    found = summarise_reconstructions(guesses, truths, labels, rest, generator=np.random.default_rng(1), draws=200)
    assert found["psnr"].value > found["prior_psnr"].value + 1, "matching alone beats the mean"
    assert abs(found["matched_public_psnr"].value - found["psnr"].value) < 2
    text = beside_limits(found["images"], (), generator=np.random.default_rng(2))["verdict"]
    assert text.startswith("Not shown to be private") and "matched with the truth in the same way" in text
    one = [Reconstruction(g.images[:1], g.labels[:1], "luck") for g in guesses]
    alone = summarise_reconstructions(one, truths, labels, rest, generator=np.random.default_rng(1), draws=200)
    assert "matched_public_psnr" not in alone
