"""The BatchNorm prior: its objective, its schedule, its bookkeeping, and what honest moments are worth."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from fedsec.attacks.gradinversion import bn_prior as module
from fedsec.attacks.gradinversion.auto import reconstruct
from fedsec.attacks.gradinversion.bn_prior import Terms, align, bn_prior, objective, rate, reference_of, slack_of
from fedsec.attacks.gradinversion.clock import Clock
from fedsec.attacks.gradinversion.feature_inversion import Whitening
from fedsec.attacks.gradinversion.observation import Observation, observe
from fedsec.attacks.gradinversion.prior import fit_prior
from fedsec.attacks.gradinversion.settings import Settings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from . import cases
from .clients import view_of_round
from .test_batch_statistics import SHAPE, warmed

MODES = [("eval", "none"), ("eval", "running"), ("train", "none"), ("train", "inferred")]


def observed(mode: Literal["train", "eval"], batch: int = 1, shared: bool = True, steps: int = 1) -> Observation:
    data = cases.blobs(batch, seed=1)
    plan = cases.recipe(lr=0.1, mode=mode, steps=steps)
    seen = view_of_round(warmed(), data.images, data.labels, plan, shared=shared)
    return observe(seen, warmed(), fit_prior(cases.blobs(64)), SHAPE)


@pytest.mark.parametrize(("mode", "used"), MODES)
def test_the_truth_leaves_only_the_image_terms(mode: Literal["train", "eval"], used: Any) -> None:
    """Gradient and inferred moments are met exactly at the true images; running ones are nobody's own."""
    observation, data = observed(mode, 4), cases.blobs(4, seed=1)
    reference = reference_of(observation, used)
    terms = Terms(tv=0.0, energy=0.0, bn=1.0, reference=reference, slack=slack_of(observation, reference, used))
    value = float(objective(observation, data.labels, terms, Whitening(observation.prior).point(data.images)))
    assert abs(value) < (0.5 if used == "running" else 1e-4)
    prior = Whitening(observation.prior).point(observation.prior.mean.expand(4, -1, -1, -1))
    assert float(objective(observation, data.labels, terms, prior)) > value + 1e-3


def test_running_moments_cost_nothing_as_near_as_public_batches_are() -> None:
    observation = observed("eval", 2)
    reference = reference_of(observation, "running")
    slack = slack_of(observation, reference, "running")
    assert slack > 0
    assert slack_of(observation, reference, "inferred") == 0
    public = Whitening(observation.prior).point(observation.prior.images[:18].view(9, 2, *SHAPE).flatten(0, 1))
    quiet = Terms(tv=0, energy=0, bn=0, reference=reference)
    loud = Terms(tv=0, energy=0, bn=1, reference=reference, slack=slack)
    labels = torch.zeros(2, dtype=torch.long)
    free = [
        float(objective(observation, labels, loud, p)) - float(objective(observation, labels, quiet, p)) < 1e-3
        for p in public.split(2)
    ]
    assert sum(free) >= 5  # half of them


@given(st.integers(60, 3000))
def test_rate_warms_up_and_falls_like_a_cosine(iterations: int) -> None:
    assert rate(0, iterations, 0.0) == pytest.approx(module.STEP / module.WARM_UP)
    assert rate(iterations, iterations, 0.0) == pytest.approx(0, abs=1e-12)
    middle = rate(10 * module.WARM_UP, 20 * module.WARM_UP, 0.0)
    assert middle == pytest.approx(module.STEP / 2)
    assert rate(10 * module.WARM_UP, 20 * module.WARM_UP, 1.0) == pytest.approx(0, abs=1e-12)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(4)), st.integers(0, 99))
def test_alignment_does_not_depend_on_the_order_within_a_restart(order: list[int], seed: int) -> None:
    images = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    both = torch.stack([images, images[list(order)]])
    assert torch.allclose(align(both), both)
    third = torch.rand(1, 4, 1, 5, 5, generator=torch.Generator().manual_seed(seed + 1))
    mean = align(torch.cat([both, third]))
    assert torch.allclose(mean[0][list(order)], mean[1], atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 28, 28), (1, 32, 24)])
def test_any_channels_and_sides(shape: tuple[int, int, int]) -> None:
    from fedsec import models

    model = models.build("cnn", num_classes=2, in_channels=shape[0], image_size=24, seed=0, norm="batch")
    data = cases.blobs(2, shape, seed=1)
    seen = view_of_round(model, data.images, data.labels, cases.recipe(lr=0.1, mode="train"))
    observation = observe(seen, model, fit_prior(cases.blobs(20, shape)), shape)
    terms = Terms(reference=reference_of(observation, "inferred"))
    found = bn_prior(
        observation, data.labels, Clock(20), torch.Generator().manual_seed(0), restarts=1, iterations=4, terms=terms
    )
    assert found[0].images.shape == data.images.shape
    assert 0 <= float(found[0].images.min()) <= float(found[0].images.max()) <= 1


def test_restarts_side_by_side_equal_single_ones() -> None:
    observation, data = observed("train", 2), cases.blobs(2, seed=1)
    evaluate = module._evaluator(observation, data.labels, Terms(reference=reference_of(observation, "inferred")))
    point = 0.3 * torch.randn(3, 2, *SHAPE, generator=torch.Generator().manual_seed(0))
    for group in (None, torch.rand(3, 2, *SHAPE, generator=torch.Generator().manual_seed(1))):
        gradients, values = evaluate(point, group)
        for i in range(3):
            gradient, value = evaluate(point[i : i + 1], None if group is None else group[i : i + 1])
            assert torch.allclose(gradients[i], gradient[0], atol=1e-6, rtol=1e-3)
            assert float(values[i]) == pytest.approx(float(value), rel=1e-4)


def test_best_point_has_the_lowest_value_that_was_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    observation, data = observed("train"), cases.blobs(1, seed=1)
    seen: list[tuple[Tensor, float]] = []
    original = module._evaluator

    def recording(*arguments: Any) -> Any:
        evaluate = original(*arguments)

        def run(point: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor]:
            gradient, value = evaluate(point, group)
            seen.extend((p.clone(), float(v)) for p, v in zip(point, value, strict=True))
            return gradient, value

        return run

    monkeypatch.setattr(module, "_evaluator", recording)
    monkeypatch.setattr(module, "rate", lambda *_: 3.0)  # so coarse, and never slower, that later points are worse
    found = bn_prior(observation, data.labels, Clock(20), torch.Generator().manual_seed(0), restarts=1, iterations=60)
    best = min(seen[2:], key=lambda item: item[1])[0]  # the first two only take the time
    assert not torch.equal(best, seen[-1][0])
    assert torch.allclose(found[0].images, Whitening(observation.prior).images(best).clamp(0, 1), atol=1e-6)


def test_inferred_moments_are_worth_decibels_and_are_not_taken_from_hidden_buffers() -> None:
    """One image, train mode: with the same steps, moments add what hidden statistics keep back."""
    data, psnr = cases.blobs(1, seed=1), {}
    for shared, used in ((False, "none"), (True, "inferred")):
        observation = observed("train", shared=shared)
        terms = Terms(reference=reference_of(observation, used))  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(0)
        found = bn_prior(observation, data.labels, Clock(60), generator, restarts=1, iterations=150, terms=terms)
        psnr[used] = cases.psnr(found[0].images, data.images)
    assert psnr["inferred"] > psnr["none"] + 2


def test_a_mode_that_is_not_honest_is_refused_by_name() -> None:
    for observation, reason in (
        (observed("train", steps=2), "2 local steps"),
        (observed("train", shared=False), "no BatchNorm statistics are sent"),
        (observed("eval"), "eval mode"),
    ):
        found = reconstruct(observation, Settings(method="bn_prior", bn="inferred", budget_s=2), torch.Generator())
        assert found.method == "prior"
        assert reason in found.not_applicable["bn_prior"]
