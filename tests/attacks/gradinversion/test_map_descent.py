"""Batches by descent: its Gaussian error, its coordinates, its starts, and that it never runs away."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fedsec.attacks.gradinversion import map_descent as module
from fedsec.attacks.gradinversion.approximation import ErrorModel, fit_error, white_error
from fedsec.attacks.gradinversion.clock import Clock
from fedsec.attacks.gradinversion.curvature import full_curvature, prior_curvature, shared_curvature
from fedsec.attacks.gradinversion.examples import find_examples, share_of
from fedsec.attacks.gradinversion.map_descent import map_descent
from fedsec.attacks.gradinversion.observation import observe
from fedsec.attacks.gradinversion.prior import Prior
from fedsec.attacks.gradinversion.side_by_side import minimise_all
from fedsec.attacks.gradinversion.starts import check_distinct, public_mixtures
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from . import cases

SHAPE = (1, 16, 16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_psnr(images: Tensor, truth: Tensor) -> float:
    """-10·log10 of the mean squared error under the best assignment."""
    cost = (images.flatten(1)[:, None] - truth.flatten(1)[None]).pow(2).mean(2).numpy()
    rows, columns = linear_sum_assignment(cost)
    return -10 * math.log10(max(1e-14, float(cost[rows, columns].mean())))


def model_of_rank(rank: int) -> tuple[ErrorModel, Tensor]:
    basis = torch.linalg.qr(torch.randn(30, rank, generator=generator()).double())[0]
    variance = 2 + torch.rand(rank, generator=generator(1)).double() * 50
    dense = 2 * torch.eye(30).double() + basis @ (variance - 2).diag() @ basis.T
    return ErrorModel(2.0, basis, variance), dense


@pytest.mark.parametrize("rank", [0, 4])
def test_error_model_is_the_dense_gaussian(rank: int) -> None:
    model, dense = model_of_rank(rank)
    rows = torch.randn(5, 30, generator=generator(2)).double()
    inverse = torch.linalg.inv(dense)
    assert torch.allclose(model.precision(rows), rows @ inverse)
    assert torch.allclose(model.square(rows), ((rows @ inverse) * rows).sum(1))
    assert torch.allclose((model.whiten(rows) ** 2).sum(1), model.square(rows))
    assert torch.allclose(model.whiten(model.whiten(rows)), model.precision(rows))


def test_fitted_error_predicts_that_of_new_batches() -> None:
    """χ² of errors that the fit has not seen is their number of entries; a white model of the same size is far off."""
    loud = 20 * torch.randn(3, 400, generator=generator(1)) / 20

    def errors(count: int, seed: int) -> Tensor:
        draw = generator(seed)
        return torch.randn(count, 3, generator=draw) @ loud + 0.1 * torch.randn(count, 400, generator=draw)

    batch = 4
    error = fit_error(errors(300, 2) / batch, batch, 0.0)
    fresh = errors(200 * batch, 3).view(200, batch, 400).mean(1)
    assert float(error.square(fresh).mean()) == pytest.approx(400, rel=0.25)
    white = white_error(float(fresh.pow(2).mean()), fresh[0])
    direction = torch.linalg.svd(loud)[2][50] * 0.1
    assert float(error.square(direction[None])) > 50 * float(white.square(direction[None]))


def slopes_of(count: int, rank: int, entries: int) -> Tensor:
    return torch.randn(count, rank, entries, generator=generator()).double()


def test_full_coordinates_make_the_gauss_newton_matrix_the_identity() -> None:
    slopes, variance = slopes_of(3, 5, 40), torch.rand(5, generator=generator(1)).double() + 0.1
    curvature = full_curvature(slopes, variance)
    rows = slopes.flatten(0, 1)
    matrix = rows @ rows.T + (1 / variance).repeat(3).diag()
    moved = curvature.place(torch.eye(15).double().view(15, 3, 5)).flatten(1)
    assert torch.allclose(moved @ matrix @ moved.T, torch.eye(15).double(), atol=0.02)


def test_shared_coordinates_do_so_for_equal_images() -> None:
    """With all J_i equal, A = 1·1ᵀ ⊗ JᵀJ + I ⊗ Λ⁻¹ exactly."""
    one, variance = slopes_of(1, 5, 40), torch.rand(5, generator=generator(1)).double() + 0.1
    curvature = shared_curvature(one.repeat(2, 1, 1), variance, 4)
    rows = one.repeat(4, 1, 1).flatten(0, 1)
    matrix = rows @ rows.T + (1 / variance).repeat(4).diag()
    moved = curvature.place(torch.eye(20).double().view(20, 4, 5)).flatten(1)
    assert torch.allclose(moved @ matrix @ moved.T, torch.eye(20).double(), atol=0.02)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["shared", "full", "prior"])
def test_coordinates_invert_and_gradients_follow(kind: str, batch: int) -> None:
    slopes, variance = slopes_of(max(2, batch), 5, 40), torch.rand(5, generator=generator(1)).double() + 0.1
    curvature = {
        "shared": lambda: shared_curvature(slopes, variance, batch),
        "full": lambda: full_curvature(slopes[:batch], variance),
        "prior": lambda: prior_curvature(variance, batch),
    }[kind]()
    z = torch.randn(2, batch, 5, generator=generator(2)).double()
    assert torch.allclose(curvature.place(curvature.locate(z)), z)
    weights = torch.randn(2, batch, 5, generator=generator(3)).double()
    point = curvature.locate(z).requires_grad_(True)
    (expected,) = torch.autograd.grad((curvature.place(point) * weights).sum(), point)
    assert torch.allclose(curvature.pull(weights), expected)


def rosenbrock(points: Tensor) -> tuple[Tensor, Tensor]:
    p = points.detach().requires_grad_(True)
    values = ((1 - p[:, :-1]) ** 2 + 100 * (p[:, 1:] - p[:, :-1] ** 2) ** 2).sum(1)
    return values.detach(), torch.autograd.grad(values.sum(), p)[0]


def test_every_start_reaches_the_minimum() -> None:
    start = torch.tensor([[-1.2, 1.0], [0.0, 3.0], [1.0, 1.0]]).double()
    ended = minimise_all(rosenbrock, start, Clock(10), evaluations=200)
    assert torch.allclose(ended.points, torch.ones(3, 2).double(), atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_stored_pairs_re_evaluate_and_no_run_ends_above_its_start(seed: int, evaluations: int) -> None:
    """Through a wall of NaN, an abyss behind the limit, and a cut in the middle of a line search."""

    def evaluate(points: Tensor) -> tuple[Tensor, Tensor]:
        values, slopes = rosenbrock(points)
        values = torch.where(points[:, 0] < -1.5, torch.nan, values)
        return torch.where(points.abs().amax(1) > 4, -1e9, values), slopes

    start = 2 * torch.rand(4, 3, generator=generator(seed)).double() - 1
    ended = minimise_all(evaluate, start, Clock(10), evaluations=evaluations, limit=4.0)
    assert torch.equal(evaluate(ended.points)[0], ended.values)
    assert bool((ended.values <= rosenbrock(start)[0]).all())
    assert float(ended.points.abs().max()) <= 4
    assert ended.evaluations <= evaluations


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_mixtures_find_what_was_mixed_and_never_take_an_image_twice(seed: int) -> None:
    shares = torch.randn(40, 25, generator=generator(seed))
    truth = torch.randperm(40, generator=generator(seed + 1))[:3]
    found = public_mixtures(shares, shares[truth].sum(0), 3, generator(seed + 2), 40)
    assert found[0].tolist() == sorted(truth.tolist())
    twice = public_mixtures(shares, 3 * shares[truth[0]], 3, generator(seed + 2), 5)
    assert all(len(set(rows.tolist())) == 3 for rows in twice)


def test_shares_of_the_images_add_up_to_the_update(blob_prior: Prior) -> None:
    model, data = cases.lenet(shape=SHAPE), cases.blobs(3, seed=1)
    observation = cases.observation_of(model, data.images, data.labels, blob_prior)
    summed = replace(observation, simulation=replace(observation.simulation, divisor=3.0))
    masked = replace(observation, kept=torch.arange(len(observation.gradient)) % 3 > 0)
    for seen in (observation, summed, masked):
        share = share_of(seen)
        assert share is not None
        total = sum(share(x[None], y[None]) for x, y in zip(data.images, data.labels, strict=True))
        expected = seen.simulation.flat(data.images, data.labels) * seen.weights
        assert torch.allclose(torch.as_tensor(total), expected, atol=1e-5)


def test_examples_have_the_labels_of_the_batch(blob_prior: Prior) -> None:
    model, data = cases.lenet(shape=SHAPE), cases.blobs(3, seed=1)
    labels = torch.tensor([1, 0, 1])
    observation = cases.observation_of(model, data.images, labels, blob_prior)
    examples = find_examples(observation, labels, 60.0)
    assert examples is not None
    assert float((examples.labels == 1).float().mean()) == pytest.approx(2 / 3)
    public = {x.numpy().tobytes(): int(y) for x, y in zip(blob_prior.images, blob_prior.labels, strict=True)}
    assert all(public[x.numpy().tobytes()] == int(y) for x, y in zip(examples.images, examples.labels, strict=True))
    assert find_examples(observation, labels, 0.0) is None


def test_what_few_components_miss_of_a_batch_is_predicted(blob_prior: Prior) -> None:
    """χ² of batches that the fit has not seen is the number of entries, and their misses are not white."""
    model, public = cases.lenet(shape=SHAPE), cases.prior_of(cases.blobs(600))
    fresh, labels, rank = cases.blobs(400, seed=5), torch.tensor([0, 1]), 24
    observation = cases.observation_of(model, fresh.images[:2], labels, public)
    examples = find_examples(observation, labels, 60.0)
    share = share_of(observation)
    assert examples is not None
    assert share is not None
    error = examples.error(public, rank, torch.arange(40), 0.0)
    pair = replace(error, white=error.white / 20, variance=error.variance / 20)  # the fit was for 40 images
    ratios, white = [], []
    for zero, one in zip((fresh.labels == 0).nonzero()[:60, 0], (fresh.labels == 1).nonzero()[:60, 0], strict=True):
        x = fresh.images[[int(zero), int(one)]]
        restricted = public.synthesise(public.coordinates(x, rank))
        missed = observation.simulation.flat(x, labels) - observation.simulation.flat(restricted, labels)
        ratios.append(float(pair.square(missed[None])) / len(missed))
        white.append(float(missed.pow(2).mean()))
    assert 0.4 < sum(ratios) / len(ratios) < 2.5
    assert pair.white < 0.5 * sum(white) / len(white)


def test_images_that_share_moments_have_no_shares_of_their_own(blob_prior: Prior) -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten(), torch.nn.Linear(256, 2))
    data = cases.blobs(2, seed=1)
    observation = cases.observation_of(model, data.images, data.labels, blob_prior, cases.recipe(mode="train"))
    assert share_of(observation) is None
    found = map_descent(observation, data.labels, Clock(1), generator(), rounds=1)
    assert bool(torch.isfinite(found[0].images).all())


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 20, 12)])
def test_images_of_a_batch_start_apart(shape: tuple[int, int, int]) -> None:
    model, data = cases.lenet(shape=shape), cases.blobs(3, shape, seed=1)
    prior = cases.prior_of(cases.blobs(128, shape))
    observation = cases.observation_of(model, data.images, data.labels, prior)
    for seconds in (60.0, 0.0):  # with examples and without
        examples = find_examples(observation, data.labels, seconds)
        search = module._Search(observation, data.labels, generator(), examples, False)
        for points in search.starts(module.LADDER[0])[0]:
            check_distinct(prior.synthesise(points), prior.spread)


def test_four_images_of_one_class_come_apart(blob_prior: Prior, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 dB, the goal for X-rays; what the images have in common alone gives less than 20."""
    monkeypatch.setattr(module, "LADDER", module.LADDER[:4])
    model, data, y = cases.lenet(shape=SHAPE), cases.blobs(4, seed=3), torch.zeros(4, dtype=torch.long)
    observation = cases.observation_of(model, data.images, y, blob_prior)
    found = map_descent(observation, y, Clock(60), generator(), rounds=1)
    assert batch_psnr(found[0].images, data.images) > 30
    together = data.images.mean(0, keepdim=True).expand_as(data.images)
    assert batch_psnr(together, data.images) < 20


def test_noise_that_is_known_leaves_the_prior_where_it_hides_everything(blob_prior: Prior) -> None:
    model, data, plan = cases.lenet(shape=SHAPE), cases.blobs(2, seed=3), cases.recipe()
    delta = cases.upload(model, data.images, data.labels, plan)
    near, psnr = blob_prior.mean.expand(2, *SHAPE), []
    for relative in (0.1, 1e3):
        std = relative * float(delta.norm()) / len(delta) ** 0.5
        noisy = delta + std * torch.randn(len(delta), generator=generator(7))
        knowledge = {"gaussian": {"noise": "gaussian", "noise_std": std}}
        observation = observe(cases.view_of(model, noisy, 2, plan, knowledge=knowledge), model, blob_prior, SHAPE)
        found = map_descent(observation, data.labels, Clock(4), generator(), rounds=1)
        psnr.append(batch_psnr(found[0].images, data.images))
    assert psnr[0] > batch_psnr(near, data.images) + 3
    assert psnr[1] > batch_psnr(near, data.images) - 0.5


@pytest.mark.slow
def test_reference_batch(xrays: tuple[Tensor, Tensor], xray_prior: Prior) -> None:
    """Four X-rays of one class, untrained LeNet: the specification's prototype ended at 38.2 dB; the goal is 30."""
    images, labels = xrays
    rows = cases.L32[:4]
    observation = cases.observation_of(cases.lenet(), images[rows], labels[rows], xray_prior)
    found = map_descent(observation, labels[rows], Clock(20), generator(1), rounds=1)
    assert batch_psnr(found[0].images, images[rows]) > 35
