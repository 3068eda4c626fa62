"""From a view to g: units, noise, masks, sums, and what the adversary must not see."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fedsec.attacks.gradinversion.candidate import Candidate
from fedsec.attacks.gradinversion.certificate import assess
from fedsec.attacks.gradinversion.observation import Observation, observe
from fedsec.attacks.gradinversion.prior import Prior

from fedsec.types import RoundContext

from . import cases

SHAPE = (1, 16, 16)


def test_no_field_could_hold_the_truth() -> None:
    names = {f.name for f in dataclasses.fields(Observation)}
    assert not names & {"truth", "images", "original", "x", "target"}


def test_a_flipped_sign_is_detected(blob_prior: Prior) -> None:
    model, data, plan = cases.lenet(shape=SHAPE), cases.blobs(1, seed=1), cases.recipe()
    delta = cases.upload(model, data.images, data.labels, plan)
    wrong = observe(cases.view_of(model, -delta, 1, plan), model, blob_prior, SHAPE)
    checked = assess(Candidate(data.images, data.labels, "test"), wrong)
    assert checked.kappa == pytest.approx(-1, abs=1e-4)
    assert any("sign" in note for note in checked.notes)
    assert checked.certified == 0


def test_rounding_floor_has_the_size_of_real_rounding(blob_prior: Prior) -> None:
    """The floor against the float32 update of a client whose exact float64 gradient is known."""
    model, data = cases.lenet(shape=SHAPE), cases.blobs(1, seed=1)
    plan = cases.recipe(lr=0.003)
    observation = cases.observation_of(model, data.images, data.labels, blob_prior, plan)
    exact = observation.simulation.double.flat(data.images.double(), data.labels)
    ratio = float((observation.gradient - exact).norm() / observation.floor.norm())
    assert 0.7 < ratio < 1.4


def test_update_noise_is_divided_by_what_a_step_moves(blob_prior: Prior) -> None:
    model, plan = cases.lenet(shape=SHAPE), cases.recipe(lr=0.5, steps=4)
    size = sum(p.numel() for p in model.parameters())
    known = {"gaussian": {"noise": "gaussian", "noise_std": 0.2}, "laplace": {"noise": "laplace", "noise_std": 0.1}}
    view = cases.view_of(model, torch.ones(size), 1, plan, knowledge=known)
    observation = observe(view, model, blob_prior, SHAPE)
    assert observation.noise_std == pytest.approx((0.2**2 + 0.1**2) ** 0.5 / 2)
    assert observation.noise == "laplace"
    assert observe(view, model, blob_prior, SHAPE, adaptive=False).noise_std == 0


def test_dp_sgd_noise_averages_over_steps_and_clients(blob_prior: Prior) -> None:
    model = cases.lenet(shape=SHAPE)
    size = sum(p.numel() for p in model.parameters())
    known = {"dp": {"clip_norm": 2.0, "clip_scope": "sample", "noise_multiplier": 1.5, "batch_divisor": 8.0}}
    view = cases.view_of(model, torch.ones(size), 0, cases.recipe(steps=4), knowledge=known, clients=9)
    assert observe(view, model, blob_prior, SHAPE).noise_std == pytest.approx(3.0 / 2 / 3)


def test_a_hidden_sum_is_one_batch_of_all_clients(blob_prior: Prior) -> None:
    """The mean of equally weighted clients' gradients is the gradient of their joint batch."""
    model, plan = cases.lenet(shape=SHAPE), cases.recipe(batch_size=2)
    data = cases.blobs(6, seed=1)
    deltas = [cases.upload(model, data.images[i : i + 2], data.labels[i : i + 2], plan) for i in (0, 2, 4)]
    view = cases.view_of(model, torch.stack(deltas).mean(0), 0, plan, clients=3, oracle=data.labels[:2])
    observation = observe(view, model, blob_prior, SHAPE)
    assert observation.batch == 6
    assert observation.labels is None  # two of six labels are no labels
    difference = observation.simulation.flat(data.images, data.labels) - observation.gradient
    assert float(difference.norm()) < 1e-6 * observation.norm


def test_noise_level_is_estimated_where_it_is_not_published(blob_prior: Prior) -> None:
    model, data, plan = cases.mlp(pixels=256), cases.blobs(1, seed=1), cases.recipe()
    delta = cases.upload(model, data.images, data.labels, plan)
    std = 0.3 * float(delta.norm()) / len(delta) ** 0.5
    noisy = delta + std * torch.randn(len(delta), generator=torch.Generator().manual_seed(3))
    view = cases.view_of(model, noisy, 1, plan, knowledge={"noise": {"noise": "gaussian"}})
    assert observe(view, model, blob_prior, SHAPE).noise_std == pytest.approx(std, rel=0.05)


def test_masked_entries_carry_no_weight(blob_prior: Prior) -> None:
    model, data, plan = cases.lenet(shape=SHAPE), cases.blobs(1, seed=1), cases.recipe()
    delta = cases.upload(model, data.images, data.labels, plan)
    mask = torch.rand(len(delta), generator=torch.Generator().manual_seed(0)) < 0.5
    garbage = torch.where(mask, delta, torch.full_like(delta, 1e6))
    view = cases.view_of(model, garbage, 1, plan, knowledge={"he": {"mask": mask}})
    checked = assess(Candidate(data.images, data.labels, "test"), observe(view, model, blob_prior, SHAPE))
    assert checked.residual < 1e-6


def test_attack_randomness_is_none_of_a_defenses() -> None:
    """A defense draws with its client and round; no view's seed can be one of those."""
    ctx = RoundContext(0, 1, 1)
    mine = {ctx.entropy(f"gradinversion/view-{i}") for i in range(50)}
    theirs = {
        RoundContext(0, r, 1, c).entropy(p) for r in range(3) for c in (None, 0, 1) for p in ("noise", "dp", "batches")
    }
    assert len(mine) == 50
    assert not mine & theirs


def test_private_layers_are_reported(blob_prior: Prior) -> None:
    model, data, plan = cases.lenet(shape=SHAPE), cases.blobs(1, seed=1), cases.recipe()
    shared = tuple(n for n, _ in model.named_parameters() if not n.startswith("net.7"))
    delta = cases.upload(model, data.images, data.labels, plan, names=shared)
    observation = observe(cases.view_of(model, delta, 1, plan, names=shared), model, blob_prior, SHAPE)
    assert observation.simulation.names == shared
    assert any("not shared" in note for note in observation.notes)
