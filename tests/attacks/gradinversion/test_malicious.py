"""The malicious server's methods as the frame meets them: queries, findings, stamp, processes."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fedsec.attacks.gradinversion import GradInversion, auto, malicious
from fedsec.attacks.gradinversion.settings import Malicious, MaliciousMethod, Settings
from torch import nn

import fedsec
from fedsec.findings import PublicData, Target
from fedsec.types import RoundContext, ServerView

from . import cases

SHAPE = (1, 16, 16)
BATCH = 4
METHODS = ["imprint", "fishing"]


def attack(method: Any, **changes: Any) -> GradInversion:
    return GradInversion(method=method, server="malicious", batch=BATCH, budget_s=4, **changes)


def interrogated(method: Any, model: nn.Module, public: PublicData, victims: int = 2, **changes: Any) -> Target:
    """What a malicious server holds after it has asked real clients."""
    plan, crafting = cases.recipe(lr=0.02, batch_size=BATCH), attack(method, **changes)
    data = cases.blobs(BATCH * victims, seed=1)
    asked = []
    for x, y in zip(data.images.split(BATCH), data.labels.split(BATCH), strict=True):
        views: list[ServerView] = []
        while len(views) < crafting.victims().queries:
            sent = crafting.craft(copy.deepcopy(model), views, public, plan, RoundContext(0, 1, 1))
            if sent is None:
                break
            views.append(cases.view_of(sent, cases.upload(sent, x, y, plan), BATCH, plan))
        asked.append(tuple(views))
    target = cases.target_of(model, tuple(views[-1] for views in asked), public)
    return replace(target, queries=tuple(asked))


def test_they_are_never_part_of_auto() -> None:
    assert not set(METHODS) & set(auto.METHODS)
    assert set(METHODS) == set(MaliciousMethod.__args__)  # type: ignore[attr-defined]
    assert GradInversion().craft(nn.Linear(1, 1), (), cases.blobs(2), cases.recipe(), RoundContext(0, 1, 1)) is None


@pytest.mark.parametrize("method", METHODS)
def test_images_labels_and_stamp(method: str, blobs: PublicData) -> None:
    target = interrogated(method, cases.lenet(shape=SHAPE), blobs)
    findings = attack(method).conclude(target)
    truth = cases.blobs(2 * BATCH, seed=1)
    for found, x, y in zip(findings.reconstructions, truth.images.split(4), truth.labels.split(4), strict=True):
        assert found.method == method
        assert found.certified == len(found.images) == BATCH
        for image, label in zip(found.images, found.labels, strict=True):
            errors = ((image - x) ** 2).mean((1, 2, 3))
            assert cases.psnr(image, x[errors.argmin()]) > 60
            assert int(label) == int(y[errors.argmin()])
    known = findings.assumptions
    assert known["server"] == "malicious"
    asked = [len(views) for views in target.queries]
    assert known["queries"] == {"fewest": min(asked), "most": max(asked), "all_victims": sum(asked)}
    assert (max(asked) == 1) == (method == "imprint")
    fires = {name for name, look in known["client_detectors"].items() if look["fires"]}
    assert fires == ({"duplicate_rows"} if method == "imprint" else {"bias_range", "zero_head_rows"})
    job = malicious.make_job(Malicious(method), target, Settings(budget_s=4), mode=None)  # type: ignore[arg-type]
    seed = target.ctx.entropy("gradinversion/view-0")
    elsewhere = pickle.loads(pickle.dumps(job.run))(target.queries[0], seed, True)
    assert torch.equal(elsewhere.images, findings.reconstructions[0].images)
    assert attack(method).limits(target, ()) == ()


def test_the_number_of_queries_is_limited(blobs: PublicData) -> None:
    model = cases.lenet(shape=SHAPE)
    target = interrogated("fishing", model, blobs, victims=1, queries=3)
    assert [len(views) for views in target.queries] == [3]
    found = attack("fishing").conclude(target).reconstructions[0]
    assert found.method == "prior" or len(found.images) < BATCH
    one = interrogated("fishing", model, blobs, victims=1, queries=1)
    found = attack("fishing").conclude(one).reconstructions[0]
    assert found.method == "prior"
    assert found.not_applicable["fishing"]


@pytest.mark.parametrize("method", METHODS)
def test_noise_is_known_or_ignored(method: str, blobs: PublicData) -> None:
    target = interrogated(method, cases.lenet(shape=SHAPE), blobs, victims=1)
    generator = torch.Generator().manual_seed(0)
    known = {"gaussian": {"noise": "gaussian", "noise_std": 100.0, "clip_norm": 1e9, "clip_scope": "update"}}
    noisy = []
    for view in target.queries[0]:
        update = view.updates[0]
        delta = update.delta + 100.0 * torch.randn(update.delta.shape, generator=generator)
        noisy.append(replace(view, updates=(replace(update, delta=delta),), knowledge=known))
    target = replace(target, views=(noisy[-1],), queries=(tuple(noisy),))
    findings = attack(method, adaptive="both").conclude(target)
    assert findings.reconstructions[0].method == "prior"
    assert findings.reconstructions[0].not_applicable[method]
    assert findings.naive[0].certified == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fault", ["nan", "none", "steps"])
def test_nothing_to_see_gives_the_public_mean_and_the_reason(method: str, fault: str, blobs: PublicData) -> None:
    target = interrogated(method, cases.lenet(shape=SHAPE), blobs, victims=1)
    view = target.queries[0][-1]
    broken = replace(view.updates[0], delta=torch.full_like(view.updates[0].delta, torch.nan))
    faults = {"nan": {"updates": (broken,)}, "none": {"updates": ()}, "steps": {"local_steps": 3}}
    view = replace(view, **faults[fault])  # type: ignore[arg-type]
    found = attack(method).conclude(replace(target, queries=((*target.queries[0][:-1], view),))).reconstructions[0]
    assert found.method == "prior"
    assert torch.allclose(found.images[0], blobs.images.mean(0), atol=1e-6)
    assert method in found.not_applicable
    honest = cases.lenet(shape=SHAPE)
    assert fault == "steps" or attack(method).craft(honest, (view,), blobs, view.recipe, RoundContext(0, 1, 1)) is None


def test_a_model_that_cannot_be_fished_is_asked_once_and_the_reason_is_given(blobs: PublicData) -> None:
    torch.manual_seed(0)
    model = cases.Normalised(nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    crafting = attack("fishing")
    plan = cases.recipe(batch_size=BATCH)
    assert crafting.craft(copy.deepcopy(model), (), blobs, plan, RoundContext(0, 1, 1)) is None
    data = cases.blobs(BATCH, seed=1)
    view = cases.view_of(model, cases.upload(model, data.images, data.labels, plan), BATCH, plan)
    target = replace(cases.target_of(model, (view,), blobs), queries=((view,),))
    found = crafting.conclude(target).reconstructions[0]
    assert "fully connected layer with a bias" in found.not_applicable["fishing"]


@pytest.mark.slow
def test_a_run_stays_honest_but_for_its_victims(tmp_path: Path) -> None:
    """End to end: one training for an honest and a malicious server, and the same released model."""
    result = fedsec.run(
        {
            "attack": ["none", "gradinversion:method=imprint,server=malicious,batch=4,images=8,rounds=first,bins=128"],
            "data": {"name": "synthetic-cxr:images=200"},
            "model": {"name": "lenet"},
        },
        rounds=1,
        clients=3,
        local_epochs=1,
        engine="serial",
        device="cpu",
        out=tmp_path / "run",
    )
    honest, crafted = result["cells"]
    assert honest["training"] == crafted["training"]
    assert honest["utility"] == crafted["utility"]
    assert honest["assumptions"]["server"] == "honest"
    assert crafted["assumptions"]["server"] == "malicious"
    assert crafted["assumptions"]["rounds_observed"] == [1]
    assert crafted["leakage"]["psnr"]["value"] > 60
    assert crafted["leakage"]["certified"] >= 6
