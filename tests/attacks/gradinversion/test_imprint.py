"""The imprint block: what it sorts, what it gives away, and what it must not claim."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedsec.attacks.gradinversion import imprint
from fedsec.attacks.gradinversion.candidate import NotApplicable
from fedsec.attacks.gradinversion.observation import Observation, observe
from fedsec.attacks.gradinversion.prior import Prior
from fedsec.attacks.gradinversion.settings import SortBy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsec.findings import PublicData, Reconstruction
from fedsec.models.base import last_linear
from fedsec.types import Update

from . import cases

SHAPE = (1, 16, 16)
LR = 0.02
"""As the federation's default: the update is rounded to the spacing of the parameters divided by it."""


def crafted(model: nn.Module, public: PublicData, bins: int = 512, kind: SortBy = "mean") -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    return imprint.craft(
        copy.deepcopy(model), public, cases.recipe(lr=LR), bins=bins, kind=kind, generator=generator
    ).eval()


def seen(
    model: nn.Module, x: Tensor, y: Tensor, prior: Prior, *, sent: nn.Module | None = None, **changes: object
) -> Observation:
    """What a server that crafted `model` observes of a client that was sent `sent`."""
    plan = cases.recipe(lr=LR, batch_size=len(x))
    delta = cases.upload(sent or model, x, y, plan)
    return observe(cases.view_of(model, delta, len(x), plan, **changes), model, prior, tuple(x.shape[1:]))


def nearest(found: Reconstruction, truth: Tensor) -> list[float]:
    """PSNR of each reconstruction against the true image it resembles most."""
    errors = ((found.images[:, None].double() - truth[None].double()) ** 2).mean((2, 3, 4)).amin(1)
    return [-10 * math.log10(max(1e-14, float(e))) for e in errors]


def test_the_block_keeps_names_order_and_nearly_the_images(blobs: PublicData) -> None:
    honest = cases.lenet(shape=SHAPE)
    model = crafted(honest, blobs)
    names = [n for n, _ in model.named_parameters()]
    assert names[:4] == [f"imprint.{layer}.{part}" for layer in ("first", "second") for part in ("weight", "bias")]
    assert names[4:] == [n for n, _ in honest.named_parameters()]
    assert last_linear(model) == last_linear(honest)
    first, second = model.imprint.first, model.imprint.second
    assert bool((first.weight == first.weight[0]).all())
    assert bool((second.weight == second.weight[:, :1]).all())
    assert bool((first.bias.diff() <= 0).all())
    levels = (torch.arange(512, dtype=torch.float64) + 0.5) / 512
    edges = imprint.smooth_quantiles(blobs.images.mean((1, 2, 3)).double(), levels)
    torch.testing.assert_close(-first.bias.double() / first.weight[0].double().sum(), edges, rtol=1e-4, atol=1e-5)
    moved = model.imprint(blobs.images).detach() - blobs.images
    assert 0 < float(moved.pow(2).mean().sqrt()) < 0.1 * float(blobs.images.std())
    torch.testing.assert_close(copy.deepcopy(model)(blobs.images), model(blobs.images))


@pytest.mark.parametrize("kind", ["mean", "gaussian", "cosine"])
@pytest.mark.parametrize("build", [cases.lenet, cases.small_cnn, cases.mlp])
def test_a_batch_is_read_exactly_through_any_network(
    build: object, kind: SortBy, blobs: PublicData, blob_prior: Prior
) -> None:
    options = {cases.lenet: {"shape": SHAPE}, cases.mlp: {"pixels": 256}}.get(build, {})  # type: ignore[call-overload]
    model = crafted(build(**options), blobs, kind=kind)  # type: ignore[operator]
    data = cases.blobs(8, seed=5)
    found = imprint.read(seen(model, data.images, data.labels, blob_prior))
    assert len(found.images) >= 7
    assert found.certified >= 7
    assert sorted(nearest(found, data.images))[-found.certified] > 60
    assert found.est_psnr is not None and found.est_psnr > 60


def test_labels_are_read_from_the_size_of_the_signal(blobs: PublicData, blob_prior: Prior) -> None:
    model = crafted(cases.lenet(shape=SHAPE, classes=5), blobs)
    data = cases.blobs(6, seed=6)
    y = torch.tensor([0, 4, 2, 2, 1, 3])
    found = imprint.read(seen(model, data.images, y, blob_prior))
    order = [int(((image - data.images) ** 2).mean((1, 2, 3)).argmin()) for image in found.images]
    assert found.labels.tolist() == y[order].tolist()
    assert found.certified == len(order) >= 5


def test_colour_images() -> None:
    shape = (3, 16, 12)
    public, data = cases.blobs(96, shape), cases.blobs(5, shape, seed=2)
    model = crafted(cases.mlp(pixels=576), public)
    found = imprint.read(seen(model, data.images, data.labels, cases.prior_of(public)))
    assert found.certified >= 4
    assert min(nearest(found, data.images)[: found.certified]) > 60


@settings(max_examples=10, deadline=None)
@given(count=st.integers(200, 900), seed=st.integers(0, 10**6))
def test_smoothed_quantiles_give_every_bin_its_share(count: int, seed: int) -> None:
    """(1 − 1/K)^(B−1) of the images are alone if all bins are equally probable; plain quantiles of few images are not.

    With N = K a bin between plain quantiles has an exponential share, and 1 − 2/K takes the place of 1 − 1/K.
    """
    rng = np.random.default_rng(seed)
    bins, batch = 512, 128
    levels = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    edges = imprint.smooth_quantiles(torch.tensor(rng.normal(size=count)), levels).numpy()
    alone = []
    for _ in range(40):
        held = np.bincount(np.searchsorted(edges, rng.normal(size=batch)), minlength=bins + 1)[1:]
        alone.append((held == 1).sum() / batch)
    assert np.mean(alone) == pytest.approx((1 - 1 / bins) ** (batch - 1), abs=0.05)


def test_the_expected_share_of_xrays_is_alone(xrays: tuple[Tensor, Tensor], xray_prior: Prior) -> None:
    """(1 − 1/512)^63 = 0.884; four draws of 64 images: a binomial standard deviation of 0.02."""
    images, labels = xrays
    public = cases.public_of(images, labels)
    model = crafted(cases.mlp(), public)
    known = {image.numpy().tobytes() for image in public.images}
    pool = [i for i in range(len(images)) if images[i].numpy().tobytes() not in known]
    generator = torch.Generator().manual_seed(0)
    alone = 0
    for _ in range(4):
        rows = [pool[i] for i in torch.randperm(len(pool), generator=generator)[:64].tolist()]
        found = imprint.read(seen(model, images[rows], labels[rows], xray_prior))
        right = nearest(found, images[rows])
        assert min(right[: found.certified]) > 50
        alone += sum(value > 50 for value in right)
    assert alone / 256 == pytest.approx(0.884, abs=0.07)


def test_two_images_in_one_bin_are_never_certified(blobs: PublicData, blob_prior: Prior) -> None:
    """Their mixture lies in the box and in the bin; only the size of its signal tells."""
    model = crafted(cases.lenet(shape=SHAPE), blobs)
    data = cases.blobs(3, seed=8)
    first = data.images[:1]
    twin = first.flip(3)
    x = torch.cat([first, twin, data.images[1:]])
    found = imprint.read(seen(model, x, torch.tensor([1, 1, 0, 1]), blob_prior))
    assert found.certified == 2
    assert min(nearest(found, x)[:2]) > 60
    assert len(found.images) == 3
    assert nearest(found, x)[2] < 40
    assert any("several images" in note for note in found.notes)


def test_nothing_is_certified_where_there_is_nothing(blobs: PublicData, blob_prior: Prior) -> None:
    honest = cases.lenet(shape=SHAPE)
    model, other = crafted(honest, blobs), crafted(cases.lenet(shape=SHAPE, seed=1), blobs)
    certified = 0
    for seed in range(6):
        data = cases.blobs(8, seed=20 + seed)
        clean = seen(model, data.images, data.labels, blob_prior)
        generator = torch.Generator().manual_seed(seed)
        wrong = [
            replace(clean, gradient=clean.norm * torch.randn(clean.gradient.shape, generator=generator) / 500),
            seen(model, data.images, data.labels, blob_prior, sent=other),
        ]
        for observation in wrong:
            # Another network behind the same block sends the images themselves: then only the labels are unproven.
            try:
                found = imprint.read(observation)
            except NotApplicable:
                continue
            certified += sum(value < 50 for value in nearest(found, data.images)[: found.certified])
    assert certified == 0


def test_undeclared_noise_gives_no_false_claim(blobs: PublicData, blob_prior: Prior) -> None:
    model = crafted(cases.lenet(shape=SHAPE), blobs)
    data = cases.blobs(8, seed=9)
    clean = seen(model, data.images, data.labels, blob_prior)
    for share in (1e-6, 1e-5, 1e-4, 1e-3):
        generator = torch.Generator().manual_seed(1)
        noise = (
            share * clean.norm * torch.randn(clean.gradient.shape, generator=generator) / clean.gradient.numel() ** 0.5
        )
        try:
            found = imprint.read(replace(clean, gradient=clean.gradient + noise))
        except NotApplicable:
            continue
        assert all(value > 45 for value in nearest(found, data.images)[: found.certified])


def test_a_sum_over_clients_hides_nothing(blobs: PublicData, blob_prior: Prior) -> None:
    model = crafted(cases.lenet(shape=SHAPE), blobs)
    data = cases.blobs(12, seed=10)
    plan = cases.recipe(lr=LR, batch_size=4)
    parts = [cases.upload(model, x, y, plan) for x, y in zip(data.images.split(4), data.labels.split(4), strict=True)]
    view = cases.view_of(model, torch.stack(parts).mean(0), 0, plan, clients=3)
    found = imprint.read(observe(view, model, blob_prior, SHAPE))
    assert found.certified >= 10
    assert min(nearest(found, data.images)[: found.certified]) > 60


def test_clipping_alone_hides_nothing(blobs: PublicData, blob_prior: Prior) -> None:
    model = crafted(cases.lenet(shape=SHAPE), blobs)
    data = cases.blobs(8, seed=11)
    plan = cases.recipe(lr=LR, batch_size=8)
    delta = cases.upload(model, data.images, data.labels, plan)
    known = {"gaussian": {"clip_norm": 1.0, "clip_scope": "update", "clip_order": 2}}
    view = cases.view_of(model, delta / delta.norm(), 8, plan, knowledge=known)
    found = imprint.read(observe(view, model, blob_prior, SHAPE))
    assert found.certified >= 7
    assert min(nearest(found, data.images)[: found.certified]) > 60


@pytest.mark.parametrize("clip", [None, 1.0])
def test_noise_protects_only_together_with_clipping(clip: float | None, blobs: PublicData, blob_prior: Prior) -> None:
    """The server chooses the size of its signal; what clipping leaves of it drowns."""
    model = crafted(cases.lenet(shape=SHAPE), blobs)
    data = cases.blobs(8, seed=12)
    plan = cases.recipe(lr=LR, batch_size=8)
    delta = cases.upload(model, data.images, data.labels, plan)
    known: dict[str, object] = {"noise": "gaussian", "noise_std": 0.01}
    if clip is not None:
        delta = delta * clip / delta.norm()
        known |= {"clip_norm": clip, "clip_scope": "update", "clip_order": 2}
    noise = 0.01 * torch.randn(delta.shape, generator=torch.Generator().manual_seed(2))
    observation = observe(
        cases.view_of(model, delta + noise, 8, plan, knowledge={"gaussian": known}), model, blob_prior, SHAPE
    )
    if clip is not None:
        with pytest.raises(NotApplicable, match="none of 512 bins stands out of the noise"):
            imprint.read(observation)
        return
    found = imprint.read(observation)
    assert len(found.images) >= 6
    assert np.median(nearest(found, data.images)) > 40


def test_the_most_agreed_scale_survives_mixtures() -> None:
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    signal = 0.037 * expected[torch.arange(20), torch.randint(0, 3, (20,), generator=generator)]
    signal[:8] = torch.rand(8, generator=generator, dtype=torch.float64)
    assert imprint.agreeing_scale(signal, expected) == pytest.approx(0.037, rel=1e-6)


def test_a_hidden_block_is_not_applicable(blobs: PublicData, blob_prior: Prior) -> None:
    model = crafted(cases.lenet(shape=SHAPE), blobs)
    data = cases.blobs(2, seed=1)
    shared = tuple(n for n, _ in model.named_parameters() if not n.startswith("imprint.first"))
    plan = cases.recipe(lr=LR)
    delta = cases.upload(model, data.images, data.labels, plan, names=shared)
    view = cases.view_of(model, delta, 2, plan, names=shared)
    with pytest.raises(NotApplicable, match="not sent as a whole"):
        imprint.read(observe(view, model, blob_prior, SHAPE))


def test_the_view_needs_no_more_than_its_update(blobs: PublicData, blob_prior: Prior) -> None:
    """Permuting the batch permutes nothing that the server sees."""
    model = crafted(cases.lenet(shape=SHAPE), blobs)
    data = cases.blobs(6, seed=4)
    plan = cases.recipe(lr=LR, batch_size=6)
    view = cases.view_of(model, cases.upload(model, data.images, data.labels, plan), 6, plan)
    shuffled = replace(
        view, updates=(Update(0, cases.upload(model, data.images.flip(0), data.labels.flip(0), plan), 6),)
    )
    one, two = (imprint.read(observe(v, model, blob_prior, SHAPE)) for v in (view, shuffled))
    torch.testing.assert_close(one.images.sum(0), two.images.sum(0), rtol=1e-4, atol=1e-4)
