"""Several local steps: orders, the walk, defect correction, and certificates that refuse where they must."""

from __future__ import annotations

import math
from dataclasses import replace

import fedsec.attacks.gradinversion.simulation as simulation_module
import pytest
import torch
from fedsec.attacks.gradinversion import GradInversion
from fedsec.attacks.gradinversion.auto import reconstruct
from fedsec.attacks.gradinversion.candidate import NotApplicable
from fedsec.attacks.gradinversion.cascade import cascade
from fedsec.attacks.gradinversion.certificate import assess
from fedsec.attacks.gradinversion.chain import find_chain
from fedsec.attacks.gradinversion.clock import Clock
from fedsec.attacks.gradinversion.defect import corrected
from fedsec.attacks.gradinversion.fedavg import alike, check_applicable, fedavg
from fedsec.attacks.gradinversion.local_training import copies, distinct_orders, fixed_order, matched_order
from fedsec.attacks.gradinversion.observation import Observation
from fedsec.attacks.gradinversion.prior import Prior
from fedsec.attacks.gradinversion.settings import Settings
from fedsec.attacks.gradinversion.trace import trace
from fedsec.attacks.gradinversion.unrolled import Unrolled, batch_size, one_step, unrolled_along
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsec.findings import PublicData

from . import cases

SHAPE = (1, 16, 16)


def local(prior: Prior, count: int = 1, **changes: object) -> tuple[Observation, PublicData]:
    """A LeNet client that trained for several steps."""
    data = cases.blobs(count, seed=1)
    plan = cases.recipe(**changes)
    return cases.observation_of(cases.lenet(shape=SHAPE), data.images, data.labels, prior, plan), data


@pytest.mark.parametrize(
    ("kinds", "size", "steps", "expected"),
    [
        ((0, 0, 0, 0), 2, 2, 1),  # one epoch of alike images: an order is a choice of names
        ((0, 0, 0, 1), 2, 2, 2),  # the odd one in the first batch or in the second
        ((0, 0, 0, 0), 2, 4, 3),  # 2x2 tables with margins of 2
        ((0, 0, 0, 0), 1, 8, 24),  # 4! permutations of the second epoch
        ((0,) * 8, 2, 8, 282),  # 4x4 tables with margins of 2 (OEIS A000681)
        ((0, 1, 2, 3), 2, 4, 36),  # (4 choose 2) squared
    ],
)
def test_number_of_distinct_orders(kinds: tuple[int, ...], size: int, steps: int, expected: int) -> None:
    found = distinct_orders(kinds, size, steps, 500)
    assert found is not None
    assert len(found) == expected
    assert distinct_orders(kinds, size, steps, expected - 1) is None


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 2))
def test_every_epoch_of_an_order_holds_every_image_once(images: int, size: int, rounds: int) -> None:
    steps = rounds * -(-images // size)
    for order in distinct_orders([0] * images, size, steps, 200) or [fixed_order(images, size, steps)]:
        per_epoch = -(-images // size)
        for e in range(rounds):
            epoch = [i for part in order[e * per_epoch : (e + 1) * per_epoch] for i in part]
            assert sorted(epoch) == list(range(images))


def test_copies_are_matched_whatever_their_order() -> None:
    images = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    second = [2, 0, 3, 1]
    mean, order = matched_order(torch.cat([images, images[second]]), 4, 2, 4)
    assert torch.allclose(mean, images)
    assert order == ((0, 1), (2, 3), (2, 0), (3, 1))
    assert copies(4, 2, 4) == ((0, 1), (2, 3), (4, 5), (6, 7))


def test_prior_between_epochs_ignores_their_order() -> None:
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert float(alike(torch.cat([z, z[[3, 1, 0, 2]]]), 4)) == pytest.approx(0, abs=1e-9)
    assert float(alike(torch.cat([z, 2 * z]), 4)) > 1


def test_the_right_order_explains_an_update_and_a_wrong_one_does_not(blob_prior: Prior) -> None:
    """Renaming images must not change what is simulated."""
    observation, data = local(blob_prior, 4, lr=0.05, steps=2, batch_size=2)
    right = unrolled_along(observation, data.labels, ((3, 2), (1, 0)))
    moved = replace(
        observation, gradient=right.observation.simulation.flat(data.images[list(right.source)], right.labels)
    )
    again = unrolled_along(moved, data.labels, ((3, 2), (1, 0)))
    assert again.residual(data.images[list(again.source)]) < 1e-6
    wrong = unrolled_along(moved, data.labels, ((0, 1), (2, 3)))
    assert wrong.residual(data.images[list(wrong.source)]) > 1e-3


def test_steps_computed_again_give_the_same_slopes(blob_prior: Prior, monkeypatch: pytest.MonkeyPatch) -> None:
    observation, data = local(blob_prior, 4, lr=0.05, steps=4, batch_size=2, momentum=0.9)
    slopes = []
    for limit in (10**9, 0):
        monkeypatch.setattr(simulation_module, "RECOMPUTE", limit)
        x = data.images.clone().requires_grad_(True)
        value = observation.eager.simulation.flat(x, data.labels).pow(2).sum()
        slopes.append(torch.autograd.grad(value, x)[0])
    assert torch.allclose(*slopes, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_step_is_right_to_first_order_in_the_rate(blob_prior: Prior, momentum: float) -> None:
    """A tenth of the rate leaves a tenth of the error; without the momentum's factor it would not shrink at all."""
    errors = []
    for lr in (1e-3, 1e-4):
        observation, data = local(blob_prior, 1, lr=lr, steps=4, momentum=momentum)
        single = one_step(observation)
        miss = single.simulation.flat(data.images, data.labels) - single.gradient
        errors.append(float(miss.norm() / single.gradient.norm()))
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)


@pytest.mark.parametrize("changes", [{"steps": 2}, {"steps": 8}, {"steps": 4, "momentum": 0.9}])
def test_one_image_behind_several_steps_is_exact_and_proven(blob_prior: Prior, changes: dict[str, object]) -> None:
    observation, data = local(blob_prior, 1, lr=0.02, **changes)
    chain = find_chain(trace(observation.simulation.model, blob_prior.mean[None].clone()), observation.complete)
    single = assess(cascade(one_step(observation), chain, data.labels)[0], observation)
    training = Unrolled(observation, data.labels, (0,))
    found = corrected(training, lambda one: cascade(one, chain, data.labels)[0], Clock(20))
    assert found is not None
    found = assess(found, observation)
    assert found.certified == 1
    exact = cases.psnr(found.images, data.images)
    assert exact > 60
    assert found.est_psnr is not None and found.est_psnr <= exact + 20
    assert found.residual < single.residual  # the closed form alone misses what the steps do


def test_closed_forms_for_one_step_prove_nothing_of_several(blob_prior: Prior) -> None:
    observation, data = local(blob_prior, 1, lr=0.002, steps=8)
    found = reconstruct(observation, Settings("cascade", budget_s=5), torch.Generator().manual_seed(0))
    assert found.certified == 0
    assert found.residual > 1e-3
    assert cases.psnr(found.images, data.images) < 60


def test_a_fully_connected_first_layer_stays_exact(blob_prior: Prior) -> None:
    """dW = (Σ_t δ_t)·xᵀ for any number of plain steps on one image; weight decay ends that, and is seen to."""
    model, data = cases.mlp(pixels=256), cases.blobs(1, seed=1)
    y = cases.unlikely(model, data.images)
    for decay, proven in ((0.0, 1), (0.1, 0)):
        plan = cases.recipe(lr=0.05, steps=4, weight_decay=decay)
        observation = cases.observation_of(model, data.images, y, blob_prior, plan)
        found = reconstruct(observation, Settings("analytic", budget_s=5), torch.Generator().manual_seed(0))
        assert found.certified == proven


def test_auto_uses_it_for_several_steps(blob_prior: Prior) -> None:
    observation, data = local(blob_prior, 1, lr=0.02, steps=3)
    found = reconstruct(observation, Settings(budget_s=10), torch.Generator().manual_seed(0))
    assert found.method == "fedavg"
    assert found.certified == 1
    assert cases.psnr(found.images, data.images) > 60


def test_it_says_when_it_does_not_apply(blob_prior: Prior) -> None:
    observation, _ = local(blob_prior, 4, lr=0.05, steps=2, batch_size=2)
    many = replace(observation, simulation=replace(observation.simulation, steps=200))
    with pytest.raises(NotApplicable, match=r"200 steps of 2 images are 400 .*256"):
        check_applicable(many)
    summed = replace(observation, simulation=replace(observation.simulation, clients=3))
    with pytest.raises(NotApplicable, match="3 clients"):
        check_applicable(summed)
    single, _ = local(blob_prior, 1)
    found = reconstruct(single, Settings("fedavg", budget_s=2), torch.Generator().manual_seed(0))
    assert "single local step" in found.not_applicable["fedavg"]
    assert batch_size(observation) == 2


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 2])
def test_mini_batches_are_told_apart(blob_prior: Prior, epochs: int) -> None:
    """Four images, two a step: better than the public mean by far, and the order of the second epoch is found."""
    data = cases.blobs(4, seed=3)
    model = cases.lenet(shape=SHAPE)
    base = cases.observation_of(
        model, data.images, data.labels, blob_prior, cases.recipe(lr=0.002, steps=2 * epochs, batch_size=2)
    )
    order = ((0, 1), (2, 3), (0, 3), (1, 2))[: 2 * epochs]
    truth = unrolled_along(base, data.labels, order)
    sent = truth.observation.simulation.flat(data.images[list(truth.source)], truth.labels)
    observation = replace(base, gradient=sent)
    found, place = fedavg(observation, data.labels, Clock(40), torch.Generator().manual_seed(0))
    error = ((found.images[:, None] - data.images[None]) ** 2).flatten(2).mean(2).min(0).values.mean()
    prior = (blob_prior.mean - data.images).pow(2).mean()
    assert -10 * math.log10(float(error)) > -10 * math.log10(float(prior)) + 6
    assert place.simulation.order is not None


def test_parameters() -> None:
    plan = GradInversion(batch=4, local_epochs=2, local_batch=2).victims()
    assert (plan.epochs, plan.batch_size) == (2, 2)
    with pytest.raises(ValueError, match="not both"):
        GradInversion(local_epochs=2, local_steps=3)
    with pytest.raises(ValueError, match="labels=joint"):
        GradInversion(labels="joint", method="cascade")
