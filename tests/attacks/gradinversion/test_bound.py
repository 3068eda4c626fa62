"""Is the bound the closed form where there is one, and does it follow noise, masks, clipping and batches?"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
from fedsec.attacks.gradinversion import bound as module
from fedsec.attacks.gradinversion.bound import bound, fisher_weights, information, jacobian_rank, scaled, van_trees
from fedsec.attacks.gradinversion.candidate import NotApplicable
from fedsec.attacks.gradinversion.clock import Clock
from fedsec.attacks.gradinversion.gauss_newton import Problem, minimise
from fedsec.attacks.gradinversion.limits import limits_of
from fedsec.attacks.gradinversion.observation import Observation, observe, rounding
from fedsec.attacks.gradinversion.prior import Prior
from fedsec.attacks.gradinversion.rank import rank_index_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsec.findings import PublicData
from fedsec.metrics.verdict import Standing, verdict

from . import cases

SHAPE = (1, 16, 16)
D = 256


@dataclass(frozen=True)
class Linear:
    """A client whose upload is linear in its images: the mean of A·x."""

    matrix: Tensor
    batch: int = 1
    steps: int = 1
    divisor: float | None = None

    @property
    def params(self) -> dict[str, Tensor]:
        return {"w": self.matrix.new_zeros(len(self.matrix))}

    @property
    def size(self) -> int:
        return len(self.matrix)

    def flat(self, x: Tensor, y: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix.T).mean(0)


def double(prior: Prior) -> Prior:
    return replace(prior, **{f.name: getattr(prior, f.name).double() for f in fields(prior) if f.type == "Tensor"})


def linear(prior: Prior, seed: int, noise_std: float, batch: int = 1, **changes: object) -> Observation:
    matrix = torch.randn(90, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    simulation, gradient = Linear(matrix, batch), torch.zeros(90, dtype=torch.float64)
    floor = rounding(simulation, gradient, 1.0, 1)  # type: ignore[arg-type]
    return Observation(simulation, gradient, floor, double(prior), SHAPE, 1.0, noise_std=noise_std, **changes)  # type: ignore[arg-type]


def covariance(prior: Prior) -> Tensor:
    p = double(prior)
    return (p.basis * p.variance) @ p.basis.T


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 100), noise=st.floats(1e-3, 10))
def test_linear_gaussian_closed_form(blob_prior: Prior, seed: int, noise: float) -> None:
    observation = linear(blob_prior, seed, noise)
    x, y = torch.rand(1, *SHAPE, dtype=torch.float64), torch.zeros(1)
    a = observation.simulation.matrix  # type: ignore[attr-defined]
    c = covariance(blob_prior)
    left = c - c @ a.T @ torch.linalg.solve(a @ c @ a.T + noise**2 * torch.eye(90, dtype=torch.float64), a @ c)
    found = bound(observation, x, y)
    assert found is not None
    assert found.mse == pytest.approx(float(left.trace()) / D, rel=1e-8)
    public = torch.rand(5, *SHAPE, dtype=torch.float64)
    averaged = van_trees(observation, public, torch.zeros(5))
    assert averaged is not None and averaged.mse == pytest.approx(found.mse, rel=1e-8)


def test_linear_gaussian_closed_form_of_a_batch(blob_prior: Prior) -> None:
    """Two images, seen through their mean alone: A(x₁ + x₂)/2."""
    observation = linear(blob_prior, 0, 0.1, batch=2)
    a = observation.simulation.matrix / 2  # type: ignore[attr-defined]
    both, prior = torch.cat([a, a], 1), torch.block_diag(*[torch.linalg.inv(covariance(blob_prior))] * 2)
    left = torch.linalg.inv(both.T @ both / 0.1**2 + prior)
    found = bound(observation, torch.rand(2, *SHAPE, dtype=torch.float64), torch.zeros(2))
    assert found is not None
    assert found.mse == pytest.approx(float(left.trace()) / (2 * D), rel=1e-8)


def noisy(model: nn.Module, prior: Prior, std: float, count: int = 1, **knowledge: object) -> Observation:
    data, plan = cases.blobs(count, seed=1), cases.recipe()
    known = {"gaussian": {"noise": "gaussian", "noise_std": std, **knowledge}} if std or knowledge else {}
    delta = cases.upload(model, data.images, data.labels, plan)
    return observe(cases.view_of(model, delta, count, plan, knowledge=known), model, prior, SHAPE)


def truth(count: int = 1) -> tuple[Tensor, Tensor]:
    data = cases.blobs(count, seed=1)
    return data.images, data.labels


@settings(deadline=None, max_examples=15)
@given(low=st.floats(1e-4, 1), factor=st.floats(1.1, 100))
def test_the_bound_and_the_index_fall_as_noise_grows(blob_prior: Prior, low: float, factor: float) -> None:
    x, y = torch.rand(1, *SHAPE, dtype=torch.float64), torch.zeros(1)
    quiet, loud = (bound(linear(blob_prior, 0, noise), x, y) for noise in (low, low * factor))
    assert quiet is not None and loud is not None
    assert quiet.mse < loud.mse
    assert rank_index_noise(quiet.information, D) >= rank_index_noise(loud.information, D)


def test_the_same_of_a_network(blob_prior: Prior) -> None:
    model = cases.lenet(shape=SHAPE)
    found = [bound(noisy(model, blob_prior, std), *truth()) for std in (1e-3, 1)]
    errors = [b.mse for b in found if b is not None]
    indices = [rank_index_noise(b.information, D) for b in found if b is not None]
    assert errors[0] < errors[1]
    assert indices[0] > indices[1]


def test_without_room_for_the_update_the_prior_remains(blob_prior: Prior) -> None:
    found = bound(noisy(cases.lenet(shape=SHAPE), blob_prior, 1e6), *truth())
    assert found is not None
    assert found.mse == pytest.approx(float(blob_prior.variance.double().mean()), rel=1e-4)
    assert rank_index_noise(found.information, D) == 0


def test_information_through_clipping_is_that_of_differences_and_reverse_mode(blob_prior: Prior) -> None:
    model, (x, y) = cases.lenet(shape=SHAPE), truth()
    norm = 0.1 * noisy(model, blob_prior, 0.0).norm
    observation = noisy(model, blob_prior, 0.01, clip_norm=norm, clip_scope="update")
    assert observation.simulation.update_clip is not None
    weights, simulation = fisher_weights(observation), observation.simulation.double
    assert weights is not None
    found = information(observation, x, y, weights, scaled(blob_prior))
    z, directions = x.double().requires_grad_(True), scaled(blob_prior).double()
    chosen = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tangent = 1e-5 * (chosen @ directions).view_as(z)
    slope = (simulation.flat(z.detach() + tangent, y) - simulation.flat(z.detach() - tangent, y)) / 2e-5
    back = torch.autograd.grad(simulation.flat(z, y) @ (weights * slope), z)[0]
    expected = directions @ back.flatten()
    assert float((found @ chosen - expected).norm()) < 1e-4 * float(expected.norm())
    free = information(noisy(model, blob_prior, 0.01), x, y, weights, scaled(blob_prior))
    assert float(found.trace()) < 0.1 * float(free.trace())


def test_laplace_noise_tells_twice_as_much_as_gaussian_noise_of_its_variance(blob_prior: Prior) -> None:
    model = cases.lenet(shape=SHAPE)
    laplace = fisher_weights(noisy(model, blob_prior, 0.2, noise="laplace"))
    gauss = fisher_weights(noisy(model, blob_prior, 0.2 / math.sqrt(2)))
    assert laplace is not None and gauss is not None
    torch.testing.assert_close(laplace, gauss, rtol=1e-4, atol=0)


def test_rounding_to_steps_counts_as_their_variance(blob_prior: Prior) -> None:
    observation = noisy(cases.lenet(shape=SHAPE), blob_prior, 0.0, noise=None, noise_std=None, quantisation_step=0.03)
    weights = fisher_weights(observation)
    assert weights is not None
    torch.testing.assert_close(weights, torch.full_like(weights, 12 / 0.03**2), rtol=1e-3, atol=0)


def test_what_was_not_sent_tells_nothing(blob_prior: Prior) -> None:
    model = cases.lenet(shape=SHAPE)
    whole = noisy(model, blob_prior, 0.05)
    mask = torch.rand(len(whole.gradient), generator=torch.Generator().manual_seed(0)) < 0.02
    part = noisy(model, blob_prior, 0.05, mask=mask)
    weights = fisher_weights(part)
    assert weights is not None and bool(((weights > 0) == mask).all())
    found, free = bound(part, *truth()), bound(whole, *truth())
    assert found is not None and free is not None and found.mse > free.mse


@pytest.mark.parametrize("knowledge", [{}, {"clip_norm": 1e-3, "clip_scope": "sample"}])
def test_images_whose_uploads_add_up_are_taken_one_by_one(
    blob_prior: Prior, monkeypatch: pytest.MonkeyPatch, knowledge: dict[str, object]
) -> None:
    observation = noisy(cases.lenet(shape=SHAPE), blob_prior, 0.01, 2, **knowledge)
    assert module._share(observation.simulation, *truth(2)) == 0.5
    cheap = bound(observation, *truth(2))
    monkeypatch.setattr(module, "_share", lambda *_: None)
    whole = bound(observation, *truth(2))
    assert cheap is not None and whole is not None and cheap.mse == pytest.approx(whole.mse, rel=1e-4)


def test_batch_norm_mixes_the_images() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sigmoid(), nn.Flatten(), nn.Linear(2 * 14 * 14, 2))
    data, plan, model = cases.blobs(2, seed=1), cases.recipe(mode="train"), cases.Normalised(net)
    prior = cases.prior_of(cases.blobs(40))
    observation = observe(
        cases.view_of(model, cases.upload(model, data.images, data.labels, plan), 2, plan), model, prior, SHAPE
    )
    assert module._share(observation.simulation, data.images, data.labels) is None


def test_no_bound_without_noise_or_with_noise_below_rounding(blob_prior: Prior) -> None:
    model = cases.lenet(shape=SHAPE)
    assert bound(noisy(model, blob_prior, 0.0), *truth()) is None
    assert bound(noisy(model, blob_prior, 1e-12), *truth()) is None
    assert jacobian_rank(noisy(model, blob_prior, 0.0), *truth()) == D


def test_too_large_is_said_with_the_numbers(blob_prior: Prior, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UNKNOWNS", 100)
    with pytest.raises(NotApplicable, match="by 256 unknowns"):
        bound(noisy(cases.lenet(shape=SHAPE), blob_prior, 0.1), *truth())


def test_limits_of_views(blobs: PublicData) -> None:
    model, plan, data = cases.lenet(shape=SHAPE), cases.recipe(), cases.blobs(3, seed=1)
    known = {"gaussian": {"noise": "gaussian", "noise_std": 0.1}}
    views = []
    for i in range(3):
        delta = cases.upload(model, data.images[i : i + 1], data.labels[i : i + 1], plan)
        views.append(cases.view_of(model, delta, 1, plan, knowledge=known if i < 2 else {}))
    views.append(cases.view_of(model, delta, 4, plan, clients=4))
    pairs = [(data.images[i : i + 1], data.labels[i : i + 1]) for i in (0, 1, 2, 2)]
    first, second, exact, hidden = limits_of(cases.target_of(model, tuple(views), blobs), pairs, None)
    assert first.values["rank_index_structural"] == 1
    assert first.bound_mse is not None and second.bound_mse is not None
    assert 0 < first.values["rank_index_noise"] < 1
    assert "rank_index_structural" not in second.values
    assert exact.bound_mse is None and exact.notes == ("no bound: the observation is exact",)
    assert hidden.bound_mse is None and "sum" in hidden.notes[0]
    alone = limits_of(cases.target_of(model, (views[2],), blobs), pairs[2:3], None)[0]
    assert (alone.values["jacobian_rank"], alone.values["rank_index_noise"]) == (D, 1.0)


def xray(model: nn.Module, x: Tensor, y: Tensor, prior: Prior, relative: float, k: int) -> Observation:
    """An upload with Gaussian noise of so many times its norm, seeded as in the specification, §6.1."""
    plan = cases.recipe()
    delta = cases.upload(model, x, y, plan)
    std = relative * float(delta.norm()) / len(delta) ** 0.5
    draw = torch.randn(len(delta), generator=torch.Generator().manual_seed(7 + 37 * k))
    known = {"gaussian": {"noise": "gaussian", "noise_std": std}}
    return observe(cases.view_of(model, delta + std * draw, 1, plan, knowledge=known), model, prior, (1, 28, 28))


# Relative noise -> bound in dB, untrained and trained: the specification, §4.
TABLE = {0.01: (49.0, 51.3), 0.1: (35.6, 37.1), 0.3: (30.6, 31.8), 1.0: (26.0, 27.1)}


@pytest.mark.slow
@pytest.mark.parametrize("relative", TABLE)
@pytest.mark.parametrize("trained", [False, True])
def test_the_bound_column_of_the_specification(
    xrays: tuple[Tensor, Tensor], xray_prior: Prior, trained_lenet: nn.Module, relative: float, trained: bool
) -> None:
    """Its prior has a slightly higher floor, which counts where noise is least."""
    model = trained_lenet if trained else cases.lenet()
    errors = []
    for k, i in enumerate(cases.N12):
        x, y = xrays[0][i : i + 1].clone(), xrays[1][i : i + 1]
        found = bound(xray(model, x, y, xray_prior, relative, k), x, y)
        assert found is not None
        errors.append(found.mse)
    value = -10 * math.log10(sum(errors) / len(errors))
    assert value == pytest.approx(TABLE[relative][trained], abs=0.5)


@pytest.mark.slow
def test_too_few_steps_are_not_read_as_privacy(
    xrays: tuple[Tensor, Tensor], xray_prior: Prior, trained_lenet: nn.Module
) -> None:
    """Image 872, trained, relative noise 0.01: three Gauss-Newton steps end far below the bound."""
    x, y = xrays[0][872:873].clone(), xrays[1][872:873]
    observation = xray(trained_lenet, x, y, xray_prior, 0.01, 0)
    problem = Problem(lambda z: observation.simulation.flat(z, y), observation.gradient, observation.std**2)
    found = bound(observation, x, y)
    assert found is not None
    limit, prior = -10 * math.log10(found.mse), cases.psnr(xray_prior.mean, x[0])
    results = {}
    for steps in (3, 40):
        start = torch.zeros(1, xray_prior.rank)
        z = minimise(problem, xray_prior, start, Clock(600), max_iter=steps).coordinates
        results[steps] = cases.psnr(xray_prior.synthesise(z).clamp(0, 1), x)
    assert "attack failed; privacy not shown" in verdict(Standing(results[3], prior, limit))
    assert results[40] >= 49
    assert "near the limit" in verdict(Standing(results[40], prior, limit))
