"""Fishing: the head decides which images speak, the server counts them, and one image's gradient is left."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from fedsec.attacks.gradinversion import fishing
from fedsec.attacks.gradinversion.auto import reconstruct
from fedsec.attacks.gradinversion.candidate import NotApplicable
from fedsec.attacks.gradinversion.observation import observe
from fedsec.attacks.gradinversion.prior import Prior
from fedsec.attacks.gradinversion.settings import Settings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsec.findings import PublicData
from fedsec.types import ServerView

from . import cases

SHAPE = (1, 16, 16)
LR = 0.02


def ask(
    model: nn.Module,
    lever: fishing.Lever,
    threshold: float,
    x: Tensor,
    y: Tensor,
    lr: float = LR,
    sent: nn.Module | None = None,
) -> ServerView:
    """One query, answered by a real client."""
    plan = cases.recipe(lr=lr, batch_size=len(x))
    hooked = fishing.craft(copy.deepcopy(model), lever, threshold)
    return cases.view_of(hooked, cases.upload(hooked, x, y, plan), len(x), plan)


def fish(
    model: nn.Module, public: PublicData, x: Tensor, y: Tensor, limit: int = 64, lr: float = LR
) -> tuple[fishing.Lever, list[fishing.Answer]]:
    """Ask until every image is alone."""
    lever = fishing.find_lever(copy.deepcopy(model), public, "multiclass")
    answers: list[fishing.Answer] = []
    while len(answers) < limit:
        threshold = fishing.next_threshold(answers, lever, len(x))
        if threshold is None:
            break
        answers.append(fishing.answer(ask(model, lever, threshold, x, y, lr), lever))
    return lever, answers


def positions(model: nn.Module, lever: fishing.Lever, x: Tensor) -> Tensor:
    """aᵀh of the true images."""
    with torch.no_grad():
        return fishing.feature_function(model, lever.weight)(x) @ lever.direction


@pytest.mark.parametrize("classes", [2, 4])
def test_the_head_counts_images_below_a_threshold(classes: int, blobs: PublicData) -> None:
    model = cases.lenet(shape=SHAPE, classes=classes)
    data = cases.blobs(12, seed=3)
    y = torch.arange(12) % classes
    public = replace(blobs, labels=torch.zeros_like(blobs.labels))
    lever = fishing.find_lever(copy.deepcopy(model), public, "multiclass")
    where = positions(model, lever, data.images).sort().values
    order = positions(model, lever, data.images)
    for cut in (2, 5, 9):
        threshold = float(where[cut - 1 : cut + 1].mean())
        got = fishing.answer(ask(model, lever, threshold, data.images, y), lever)
        below = order < threshold
        expected = int((below & (y == 0)).sum()) - int((~below & (y != 0)).sum())
        assert got.excess == pytest.approx(expected, abs=1e-3)
        assert got.threshold == pytest.approx(threshold, abs=1e-5)


def test_two_thresholds_isolate_a_gradient_that_knows_no_label(blobs: PublicData) -> None:
    """Whatever the class of the image between them, the difference is the gradient of that image with label c."""
    model = cases.lenet(shape=SHAPE)
    data = cases.blobs(6, seed=3)
    lever = fishing.find_lever(copy.deepcopy(model), blobs, "multiclass")
    order = positions(model, lever, data.images).argsort()
    where = positions(model, lever, data.images)[order]
    low, high = float(where[1:3].mean()), float(where[2:4].mean())
    for own in (0, 1):
        y = torch.randint(0, 2, (6,), generator=torch.Generator().manual_seed(own))
        y[order[2]] = own
        views = [ask(model, lever, t, data.images, y, lr=1.0) for t in (high, low)]
        got = 6 * (views[1].updates[0].delta - views[0].updates[0].delta)
        alone = ask(model, lever, high, data.images[order[2]][None], torch.tensor([lever.caught]), lr=1.0)
        conv = slice(0, alone.layout.size - alone.layout.sizes[-1] - alone.layout.sizes[-2])
        expected = -alone.updates[0].delta[conv]
        assert float((got[conv] - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("labels", ["one class", "the other class", "mixed"])
@pytest.mark.parametrize("classes", [2, 3])
def test_every_image_of_a_batch_is_caught(labels: str, classes: int, blobs: PublicData, blob_prior: Prior) -> None:
    model = cases.lenet(shape=SHAPE, classes=classes)
    data = cases.blobs(5, seed=7)
    public = replace(blobs, labels=torch.ones_like(blobs.labels))
    y = {"one class": torch.ones(5).long(), "the other class": torch.zeros(5).long()}.get(
        labels, torch.arange(5) % classes
    )
    lever, answers = fish(model, public, data.images, y)
    cut = fishing.intervals(answers, lever, 5)
    assert [part.count for part in cut] == [1] * 5
    observations = {id(a.view): observe(a.view, model, blob_prior, SHAPE) for a in answers}
    found = fishing.sort_labels(cut, lever, observations, observations[id(answers[0].view)])
    for part, label in zip(cut, found.tolist(), strict=True):
        sides = [part.high] if part.low is None else [part.high, part.low]
        alone = fishing.single_image(part, lever, [observations[id(a.view)] for a in sides])
        result = reconstruct(alone, Settings(budget_s=4), torch.Generator().manual_seed(0))
        errors = ((result.images - data.images) ** 2).mean((1, 2, 3))
        assert -10 * math.log10(float(errors.min())) > 60
        assert result.method == "cascade"
        assert result.certified == 1
        assert result.est_psnr is not None
        assert result.est_psnr < -10 * math.log10(max(1e-14, float(errors.min()))) + 20
        assert label == int(y[errors.argmin()])


def test_the_large_weights_round_their_own_gradient_away(blobs: PublicData, blob_prior: Prior) -> None:
    """At rate 0.02 the row with the threshold says nothing of da; the other rows, sent as zero, say all of it."""
    model, data = cases.lenet(shape=SHAPE), cases.blobs(4, seed=2)
    y = torch.full((4,), int(blobs.labels.bincount().argmax()))
    lever, answers = fish(model, blobs, data.images, y)
    part = next(p for p in fishing.intervals(answers, lever, 4) if p.count == 1)
    sides = [part.high] if part.low is None else [part.high, part.low]
    observations = [observe(a.view, model, blob_prior, SHAPE) for a in sides]
    raw = [float(o.gradients[lever.bias][lever.caught]) for o in observations]
    spoilt = 4 * (raw[0] - (raw[1] if len(raw) > 1 else 0.0))
    assert abs(spoilt + 1) > 0.1
    whole = fishing.single_image(part, lever, observations)
    torch.testing.assert_close(whole.gradients[lever.bias].sum(), torch.tensor(0.0), rtol=0, atol=1e-6)
    assert float(whole.gradients[lever.bias][lever.caught]) == pytest.approx(-1, abs=1e-5)


class Crowd:
    """A batch as counts alone: where its images lie, and which are of class c."""

    def __init__(self, where: Sequence[float], caught: Sequence[bool]) -> None:
        self.images = list(zip(where, caught, strict=True))

    def answer(self, threshold: float) -> fishing.Answer:
        below = sum(c and w < threshold for w, c in self.images)
        return fishing.Answer(threshold, below - sum(not c and w >= threshold for w, c in self.images), None)  # type: ignore[arg-type]


LEVER = fishing.Lever("w", "b", 0, torch.ones(1), torch.linspace(-2, 2, 101, dtype=torch.float64))


@settings(max_examples=200, deadline=None)
@given(
    where=st.lists(st.integers(-400, 400), min_size=1, max_size=24, unique=True),
    bits=st.integers(0, 2**24 - 1),
)
def test_bisection_ends_with_every_image_alone(where: list[int], bits: int) -> None:
    crowd = Crowd([w / 100 for w in where], [bool(bits >> i & 1) for i in range(len(where))])
    answers: list[fishing.Answer] = []
    while (threshold := fishing.next_threshold(answers, LEVER, len(where))) is not None:
        assert threshold not in {a.threshold for a in answers}
        answers.append(crowd.answer(threshold))
        assert len(answers) < 12 * len(where) + 12
    parts = fishing.intervals(answers, LEVER, len(where))
    assert sum(p.count for p in parts) == len(where)
    assert all(p.count == 1 for p in parts)


def test_equal_images_are_given_up() -> None:
    crowd = Crowd([0.123, 0.123, 1.0], [True, True, True])
    answers: list[fishing.Answer] = []
    while (threshold := fishing.next_threshold(answers, LEVER, 3)) is not None:
        answers.append(crowd.answer(threshold))
        assert len(answers) < 100
    assert sorted(p.count for p in fishing.intervals(answers, LEVER, 3)) == [1, 2]


def test_an_image_on_the_threshold_is_tried_again_elsewhere() -> None:
    ends = [fishing.Answer(t, e, None) for t, e in ((LEVER.ends[1], 2.0),)]  # type: ignore[arg-type]
    first = fishing.next_threshold(ends, LEVER, 2)
    assert first is not None
    blurred = fishing.Answer(first, 0.5, None)  # type: ignore[arg-type]
    assert not blurred.sharp
    second = fishing.next_threshold([*ends, blurred], LEVER, 2)
    assert second is not None
    assert abs(second - first) > 0.01


@pytest.mark.parametrize("others", [1, 2])
def test_a_lie_about_the_batch_size_is_noticed(others: int, blobs: PublicData) -> None:
    model, data = cases.lenet(shape=SHAPE), cases.blobs(4, seed=2)
    caught = int(blobs.labels.bincount().argmax())
    y = torch.tensor([caught, caught, caught, 1 - caught] if others == 1 else [caught, 1 - caught] * 2)
    lever = fishing.find_lever(copy.deepcopy(model), blobs, "multiclass")
    answers: list[fishing.Answer] = []
    with pytest.raises(NotApplicable, match="not as claimed"):
        for _ in range(20):
            threshold = fishing.next_threshold(answers, lever, 6)
            assert threshold is not None
            view = ask(model, lever, threshold, data.images, y)
            update = replace(view.updates[0], num_samples=6)
            answers.append(fishing.answer(replace(view, updates=(update,)), lever))


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"noise": "gaussian", "noise_std": 0.01}, "noise hides how many images"),
        ({"noise": "gaussian"}, "an unknown number of images"),
        ({"clip_norm": 1.0, "clip_scope": "update"}, "clipping hides"),
        ({"clip_norm": 1.0, "clip_scope": "sample", "noise_multiplier": 1.0, "batch_divisor": 4.0}, "clipping hides"),
    ],
)
def test_defenses_that_blur_the_count_are_named(known: dict[str, object], reason: str, blobs: PublicData) -> None:
    model, data = cases.lenet(shape=SHAPE), cases.blobs(4, seed=2)
    lever = fishing.find_lever(copy.deepcopy(model), blobs, "multiclass")
    view = replace(ask(model, lever, lever.ends[1], data.images, data.labels), knowledge={"defense": known})
    with pytest.raises(NotApplicable, match=reason):
        fishing.answer(view, lever)
    assert fishing.answer(view, lever, adaptive=False).sharp


def test_models_that_cannot_be_levered_are_named(blobs: PublicData) -> None:
    with pytest.raises(NotApplicable, match="no softmax"):
        fishing.find_lever(cases.lenet(shape=SHAPE), blobs, "multilabel")
    pooled = cases.Normalised(nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(NotApplicable, match="fully connected layer with a bias, not in flatten"):
        fishing.find_lever(pooled, blobs, "multiclass")
    bare = cases.Normalised(nn.Sequential(nn.Flatten(), nn.Linear(256, 2, bias=False)))
    with pytest.raises(NotApplicable, match="fully connected layer with a bias"):
        fishing.find_lever(bare, blobs, "multiclass")


@pytest.mark.slow
@pytest.mark.parametrize("batch", [8, 16, 32])
def test_xrays_of_one_class(batch: int, xrays: tuple[Tensor, Tensor], xray_prior: Prior) -> None:
    """The spec's batches of one class: an image alone within 9 queries, at 74 dB or better (§2.11)."""
    images, labels = xrays
    model, public = cases.lenet(), cases.public_of(images, labels)
    x, y = images[cases.L32[:batch]], labels[cases.L32[:batch]]
    lever, answers = fish(model, public, x, y, limit=9)
    alone = [part for part in fishing.intervals(answers, lever, batch) if part.count == 1]
    assert alone
    for part in alone[:2]:
        sides = [part.high] if part.low is None else [part.high, part.low]
        observations = [observe(a.view, model, xray_prior, (1, 28, 28)) for a in sides]
        result = reconstruct(fishing.single_image(part, lever, observations), Settings(), torch.Generator())
        assert result.certified == 1
        assert -10 * math.log10(float(((result.images - x) ** 2).mean((1, 2, 3)).min())) > 74
