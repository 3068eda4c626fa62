"""Are the image measures those of the definition: closed forms, torchmetrics, and the specification's own cases."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from fedsec.metrics.image import (
    identical,
    match,
    mse,
    nearest_public_psnr,
    pairwise_mse,
    pixel_hash,
    psnr,
    rdlv,
    replace_missing,
    ssim,
    to_psnr,
)


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_constant_error_of_a_tenth_is_20_db(channels):
    truth = 0.8 * images(4, channels, 12, 12).double()
    assert psnr(truth + 0.1, truth).tolist() == pytest.approx([20.0] * 4, abs=1e-9)


def test_an_exact_image_is_140_db_and_does_not_touch_its_neighbours():
    truth = 0.8 * images(2, 1, 12, 12).double()
    guess = truth + torch.tensor([0.0, 0.01]).view(2, 1, 1, 1)
    assert psnr(guess, truth).tolist() == pytest.approx([140.0, 40.0])


def test_psnr_is_torchmetrics():
    truth, guess = images(5, 3, 16, 16), images(5, 3, 16, 16, seed=1)
    expected = [float(peak_signal_noise_ratio(g, t, data_range=1.0)) for g, t in zip(guess, truth, strict=True)]
    assert psnr(guess, truth).tolist() == pytest.approx(expected, abs=1e-4)


def test_values_outside_the_range_are_clamped():
    truth = torch.ones(1, 1, 4, 4)
    assert psnr(truth + 5, truth).item() == 140
    assert mse(-truth, truth).item() == 1


def test_one_nan_of_four_counts_as_the_prior():
    truth, prior = images(4, 1, 12, 12), torch.full((1, 12, 12), 0.5)
    guess = truth.clone()
    guess[2, 0, 3, 3] = float("nan")
    repaired, missing = replace_missing(guess, prior)
    assert missing.tolist() == [False, False, True, False]
    values = psnr(repaired, truth)
    assert values[[0, 1, 3]].tolist() == [140] * 3
    assert values[2].item() == pytest.approx(psnr(prior[None], truth[2:3]).item())
    with pytest.raises(ValueError, match="replace_missing"):
        psnr(guess, truth)


@pytest.mark.parametrize("shape", [(4, 1, 28, 28), (3, 3, 32, 24), (2, 1, 11, 11)])
def test_ssim_is_torchmetrics_without_its_mirrored_border(shape):
    truth = images(*shape)
    guess = (truth + 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(3))).clamp(0, 1)
    _, full = structural_similarity_index_measure(
        guess, truth, data_range=1.0, reduction="none", return_full_image=True
    )
    expected = full[..., 5:-5, 5:-5].flatten(1).mean(1)
    assert ssim(guess, truth).tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_ssim_closed_forms():
    truth = images(3, 1, 20, 20)
    assert ssim(truth, truth).tolist() == pytest.approx([1.0] * 3)
    low, high = torch.full((1, 1, 12, 12), 0.2), torch.full((1, 1, 12, 12), 0.6)
    assert ssim(low, high).item() == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4))


def test_ssim_has_no_value_below_its_window():
    assert ssim(images(2, 1, 10, 28), images(2, 1, 10, 28)) is None


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shape"):
        psnr(images(1, 1, 4, 4), images(2, 1, 4, 4))


def test_rdlv_is_zero_for_the_prior_and_a_difference_where_the_prior_says_nothing():
    prior = torch.tensor([0.5, 0.2, 0.04, -0.1])
    assert rdlv(prior, prior).tolist() == [0] * 4
    assert rdlv(torch.ones(4), prior).tolist() == pytest.approx([1.0, 4.0, 0.96, 1.1])


def test_pairwise_mse_is_that_of_every_pair():
    left, right = images(3, 2, 5, 5), images(4, 2, 5, 5, seed=1)
    expected = [[float(mse(a[None], b[None])) for b in right] for a in left]
    assert pairwise_mse(left, right).numpy() == pytest.approx(np.array(expected), abs=1e-12)
    assert pairwise_mse(left, left).diagonal().max() < 1e-14
    assert pairwise_mse(left, right[:0]).shape == (3, 0)


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(6)))
def test_matching_undoes_any_order(order):
    truth = images(6, 1, 6, 6)
    guess = (truth + 0.05 * images(6, 1, 6, 6, seed=2))[list(order)]
    assigned = match(guess, truth)
    assert [order[a] for a in assigned] == list(range(6))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_matching_is_the_best_of_all_assignments(seed):
    guess, truth = images(4, 1, 2, 2, seed=seed), images(4, 1, 2, 2, seed=seed + 1)
    errors = pairwise_mse(guess, truth)
    total = sum(float(errors[a, t]) for t, a in enumerate(match(guess, truth)))
    assert total == pytest.approx(
        min(sum(float(errors[a, t]) for t, a in enumerate(p)) for p in permutations(range(4)))
    )


def test_too_few_reconstructions_leave_truths_alone():
    truth = images(3, 1, 6, 6)
    assert match(truth[[2]], truth) == [None, None, 0]
    assert match(truth[:0], truth) == [None] * 3


def test_nearest_public_image_is_not_the_image_itself():
    truth = images(2, 1, 8, 8).mul(255).round() / 255
    public = torch.cat([truth, truth[:1] + 0.1, truth[1:] + 0.01]).clamp(0, 1)
    expected = [psnr(public[[2]], truth[:1]).item(), psnr(public[[3]], truth[1:]).item()]
    assert nearest_public_psnr(truth, public).tolist() == pytest.approx(expected)
    assert nearest_public_psnr(truth[:1], truth[:1]).isnan().all()
    assert nearest_public_psnr(truth, public[:0]).isnan().all()


def test_pixel_hash_survives_normalisation_and_sees_shape():
    x = torch.arange(256.0).reshape(1, 1, 16, 16) / 255
    again = (x - 0.5719) / 0.1684 * 0.1684 + 0.5719
    assert pixel_hash(x) == pixel_hash(again.float())
    assert pixel_hash(x) != pixel_hash(x.reshape(1, 1, 8, 32))
    changed = x.clone()
    changed[0, 0, 0, 0] += 1 / 255
    assert identical(torch.cat([x, changed]), x).tolist() == [[True], [False]]


L32 = (
    "872 3346 603 2028 2202 2926 4159 1990 519 452 3882 395 1075 61 1793 1752 205 98 3923 2973 438 2040 1833 1703 3388 "
    "3363 2978 4097 1042 4680 929 559"
)
E20 = "872 2973 3244 3680 2916 914 4291 3827 2751 200 3835 3958 17 2787 587 4178 2186 629 2699 2270"
N12 = "872 4208 3600 3268 1778 128 568 2479 4521 393 2983 1914"


def test_prior_numbers_of_the_specification(shared_data):
    """gradient-inversion.md, 5 and 6.1: image 872, its prior, and 61 attacked images beside 2,000 public ones."""
    with np.load(shared_data / "pneumoniamnist.npz") as data:
        train = torch.from_numpy(data["train_images"]).float()[:, None] / 255
    hashes = pixel_hash(train)
    assert len(hashes) - len(set(hashes)) == 18
    rows = sorted({int(i) for i in f"{L32} {E20} {N12}".split()})
    attacked = {hashes[row] for row in rows}
    public = [row for row, digest in enumerate(hashes) if digest not in attacked][:2000]
    assert (len(rows), public[-1]) == (61, 2027)
    mean = train[public].mean(0, keepdim=True)
    assert psnr(mean, train[872:873]).item() == pytest.approx(17.3, abs=0.05)
    assert ssim(mean, train[872:873]).item() == pytest.approx(0.48, abs=0.005)
    # The specification's two averages are PSNRs of the mean MSE.
    priors, public_mse = mean.expand(61, -1, -1, -1), pairwise_mse(train[rows], train[public]).amin(1)
    assert to_psnr(mse(priors, train[rows]).mean()).item() == pytest.approx(18.4, abs=0.05)
    assert to_psnr(public_mse.mean()).item() == pytest.approx(22.4, abs=0.05)
    assert nearest_public_psnr(train[rows], train[public]).numpy() == pytest.approx(to_psnr(public_mse).numpy())
