"""The plugin as the frame meets it: parameters, plan, findings, processes, stamp."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import fedsec.attacks.gradinversion as package
import pytest
import torch
from fedsec.attacks.gradinversion import GradInversion

from fedsec.findings import Findings, PublicData, Target, VictimPlan

from . import cases

SHAPE = (1, 16, 16)


def test_no_file_of_the_attack_imports_a_measure_of_success() -> None:
    """No method, scorer or stopper may see the truth: metrics compare with it, so they stay out of reach."""
    for path in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any("metrics" in n or "experiment" in n or "victims" in n for n in names), path


@pytest.mark.parametrize(("rounds", "expected"), [("first", (1,)), ("last", (-1,)), ("both", (1, -1)), (7, (7,))])
def test_plan(rounds: object, expected: tuple[int, ...]) -> None:
    attack = GradInversion(rounds=rounds, images=6, batch=2, labels="oracle", mode="train")  # type: ignore[arg-type]
    assert attack.victims() == VictimPlan(expected, 6, 2, mode="train", oracle_labels=True)


def test_oracle_labels_are_not_the_default() -> None:
    assert GradInversion().labels == "recovered"
    assert not GradInversion().victims().oracle_labels


def views(count: int, **changes: object) -> Target:
    """Uploads of a LeNet client each; 16x16 images."""
    model, plan, public = cases.lenet(shape=SHAPE), cases.recipe(lr=0.1, momentum=0.9, mode="train"), cases.blobs(64)
    data = cases.blobs(count, seed=1)
    seen = []
    for i in range(count):
        x, y = data.images[i : i + 1], data.labels[i : i + 1]
        seen.append(cases.view_of(model, cases.upload(model, x, y, plan), 1, plan))
    return replace(cases.target_of(model, tuple(seen), public), **changes)  # type: ignore[arg-type]


def same(left: Findings, right: Findings) -> bool:
    pairs = zip(left.reconstructions, right.reconstructions, strict=True)
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)


def test_end_to_end_is_exact_and_the_same_in_processes() -> None:
    told: list[tuple[int, int]] = []
    attack = GradInversion(images=3)
    findings = attack.conclude(views(3, progress=lambda done, total: told.append((done, total))))
    truth = cases.blobs(3, seed=1)
    assert told == [(1, 3), (2, 3), (3, 3)]
    for i, found in enumerate(findings.reconstructions):
        assert found.method == "cascade"
        assert found.certified == 1
        assert found.labels.tolist() == truth.labels[i : i + 1].tolist()
        assert found.images.dtype == torch.float32
        assert cases.psnr(found.images, truth.images[i : i + 1]) > 60
        assert found.not_applicable["analytic"] == "the first layer is a convolution"
        assert 0 < found.seconds < 10
    told.clear()
    assert same(findings, attack.conclude(views(3, workers=2, progress=lambda d, t: told.append((d, t)))))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_stamp() -> None:
    stamp = GradInversion().conclude(views(1)).assumptions
    expected = {
        "labels": "recovered",
        "victim_batch": 1,
        "victim_mode": "train",
        "bn_statistics": "none",
        "local_steps": 1,
        "clients_in_sum": 1,
        "adaptive": [],
        "view": "individual",
        "client_optimizer": "SGD with momentum 0.9",
    }
    assert {k: stamp[k] for k in expected} == expected
    assert {"init", "restarts", "selection", "public_prior", "budget_s", "noise_seed_policy"} <= set(stamp)
    told = GradInversion(labels="oracle", adaptive=False).conclude(views(1))
    assert told.assumptions["labels"] == "oracle"
    assert told.assumptions["adaptive"] is False
    assert told.notes


def test_noise_is_adapted_to_and_naive_attack_is_an_option() -> None:
    target = views(1)
    view = target.views[0]
    update = view.updates[0]
    std = 30 * float(update.delta.norm()) / len(update.delta) ** 0.5
    noise = std * torch.randn(len(update.delta), generator=torch.Generator().manual_seed(0))
    known = {"gaussian": {"noise": "gaussian", "noise_std": std}}
    noisy = replace(view, updates=(replace(update, delta=update.delta + noise),), knowledge=known)
    truth = cases.blobs(1, seed=1).images
    target = replace(target, views=(noisy,))
    adaptive = GradInversion(budget_s=10).conclude(target)
    naive = GradInversion(budget_s=2, adaptive=False).conclude(target)
    prior = cases.psnr(target.public.images.mean(0), truth[0])
    assert cases.psnr(adaptive.reconstructions[0].images, truth) > prior - 1.5
    assert cases.psnr(adaptive.reconstructions[0].images, truth) >= cases.psnr(naive.reconstructions[0].images, truth)
    assert adaptive.assumptions["adaptive"] == [f"gaussian: noise_std={std:g}"]
    assert naive.reconstructions[0].certified == 0


@pytest.mark.parametrize("delta", ["nan", "zero", "none"])
def test_nothing_to_see_gives_the_public_mean_and_the_reason(delta: str, blobs: PublicData) -> None:
    target = views(1)
    view = target.views[0]
    update = view.updates[0]
    values = {"nan": torch.full_like(update.delta, torch.nan), "zero": torch.zeros_like(update.delta)}
    updates = () if delta == "none" else (replace(update, delta=values[delta]),)
    found = GradInversion().conclude(replace(target, views=(replace(view, updates=updates),))).reconstructions[0]
    assert found.method == "prior"
    assert torch.allclose(found.images[0], target.public.images.mean(0), atol=1e-6)
    assert "all" in found.not_applicable


def test_a_named_method_that_does_not_apply_says_so() -> None:
    found = GradInversion(method="analytic").conclude(views(1)).reconstructions[0]
    assert found.method == "prior"
    assert found.not_applicable == {"analytic": "the first layer is a convolution"}


@pytest.mark.parametrize("method", ["map_gauss_newton", "dlg", "inverting_gradients"])
def test_every_method_can_be_named(method: str) -> None:
    attack = GradInversion(method=method, budget_s=6, iterations=300, restarts=2)  # type: ignore[arg-type]
    found = attack.conclude(views(1)).reconstructions[0]
    assert found.method == method
    target = views(1)
    prior = cases.psnr(target.public.images.mean(0), cases.blobs(1, seed=1).images[0])
    assert cases.psnr(found.images, cases.blobs(1, seed=1).images) > prior + 3


def test_max_pooling_nets_are_attacked_through_their_features() -> None:
    model, plan, data = cases.small_cnn(), cases.recipe(lr=0.1), cases.blobs(1, seed=2)
    view = cases.view_of(model, cases.upload(model, data.images, data.labels, plan), 1, plan)
    target = cases.target_of(model, (view,), cases.blobs(128))
    found = GradInversion(budget_s=6).conclude(target).reconstructions[0]
    prior = cases.psnr(target.public.images.mean(0), data.images[0])
    assert cases.psnr(found.images, data.images) > prior + 4
    assert "max_pool2d" in found.not_applicable["cascade"] or "group_norm" in found.not_applicable["cascade"]
    assert "relu" in found.not_applicable["dlg"]


def test_a_batch_is_reconstructed_as_a_set() -> None:
    model, plan, data = cases.lenet(shape=SHAPE), cases.recipe(), cases.blobs(2, seed=3)
    view = cases.view_of(model, cases.upload(model, data.images, data.labels, plan), 2, plan)
    found = GradInversion(batch=2, budget_s=12).conclude(cases.target_of(model, (view,), cases.blobs(128)))
    images = found.reconstructions[0].images
    assert images.shape == (2, *SHAPE)
    pairs = [[cases.psnr(a, b) for b in data.images] for a in images]
    assert max(min(pairs[0][0], pairs[1][1]), min(pairs[0][1], pairs[1][0])) > 25
    assert "mixture of 2" in found.reconstructions[0].not_applicable["analytic"]
