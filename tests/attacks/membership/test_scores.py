"""Membership scores against brute-force definitions, and pitfalls A8, A14, A15, A16 and A17."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import nn

from fedsec.metrics.classification import auc_binary
from fedsec.metrics.membership import Interval, tpr_at

scores = importlib.import_module("fedsec.attacks.membership.scores")
signals = importlib.import_module("fedsec.metrics.signals")
perturbations = importlib.import_module("fedsec.attacks.membership.perturbations")


def simulated(seed: int, n: int = 600, z: int = 300, m: int = 8, gain: float = 0.6) -> dict[str, np.ndarray]:
    """φ of a target and m shadows that know what they were trained on by `gain`; difficulty varies by image."""
    draw = np.random.default_rng(seed)
    ease, ease_z = draw.normal(2, 1.5, n), draw.normal(2, 1.5, z)
    member = draw.permutation(n) < n // 2
    contains = np.concatenate([[c, ~c] for c in (draw.permutation(n) < n // 2 for _ in range(m // 2))])
    phi = ease + gain * member + draw.normal(0, 0.5, n)
    shadow = ease + gain * contains + draw.normal(0, 0.5, (m, n))
    population = ease_z + draw.normal(0, 0.5, z), ease_z + draw.normal(0, 0.5, (m, z))
    return {"member": member, "contains": contains, "phi": phi, "shadow": shadow, "z": population[0],
            "shadow_z": population[1]}  # fmt: skip


def log_p(phi: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -phi)


def ratios(s: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return log_p(s["phi"]), log_p(s["shadow"]), log_p(s["z"]), log_p(s["shadow_z"]), s["contains"]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.5, 1.0, 1.5]))
def test_rmia_by_search_is_the_dense_definition(seed: int, gamma: float) -> None:
    s = simulated(seed, n=60, z=40)
    own, shadow, z, shadow_z, contains = ratios(s)
    found = scores.rmia(own, shadow, z, shadow_z, contains, gamma=gamma)
    ratio_x = np.exp(own) / np.exp(shadow).mean(0)
    ratio_z = np.exp(z) / np.exp(shadow_z).mean(0)
    dense = (ratio_x[:, None] / ratio_z >= gamma).mean(1)
    assert np.all(np.abs(found - dense) < 1 / 40 + 1e-9)
    assert (np.floor(found * 40 + 1e-9) == np.round(dense * 40)).all()


def test_ties_are_broken_by_the_ratio_and_cost_no_power() -> None:
    """A15: the score without tie-break has Z + 1 values only."""
    s = simulated(1, n=8000, z=100)
    found = scores.rmia(*ratios(s))
    coarse = np.floor(found * 100)
    assert len(np.unique(coarse)) <= 101 < len(np.unique(found))
    fine, tied = (tpr_at(x[s["member"]], x[~s["member"]], 1e-3) for x in (found, coarse))
    assert isinstance(fine, Interval) and isinstance(tied, Interval) and fine.value >= tied.value


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([8, 64]))
def test_lira_is_the_likelihood_ratio(seed: int, m: int) -> None:
    s = simulated(seed, n=30, m=m)
    found = scores.lira(s["phi"], s["shadow"], s["contains"])
    inside = [s["shadow"][s["contains"][:, i], i] for i in range(30)]
    outside = [s["shadow"][~s["contains"][:, i], i] for i in range(30)]
    if m >= 64:
        spread = [[x.std(ddof=1) for x in side] for side in (inside, outside)]
    else:
        spread = [
            [np.sqrt(sum(((x - x.mean()) ** 2).sum() for x in side) / sum(len(x) - 1 for x in side))] * 30
            for side in (inside, outside)
        ]
    reference = [
        norm.logpdf(s["phi"][i], inside[i].mean(), spread[0][i])
        - norm.logpdf(s["phi"][i], outside[i].mean(), spread[1][i])
        for i in range(30)
    ]
    assert np.allclose(found, reference, atol=1e-6)
    offline = scores.lira_offline(s["phi"], s["shadow"], s["contains"])
    assert np.allclose(norm.cdf(offline), [norm.cdf(s["phi"][i], outside[i].mean(), spread[1][i]) for i in range(30)])


@pytest.mark.parametrize("method", ["lira", "lira_offline", "rmia", "rmia_offline", "loss"])
def test_every_method_finds_a_leak_and_nothing_where_nothing_is(method: str) -> None:
    for gain in (0.6, 0.0):
        s = simulated(5, n=4000, gain=gain)
        if method.startswith("lira"):
            found = getattr(scores, method)(s["phi"], s["shadow"], s["contains"])
        else:
            found = scores.loss(log_p(s["phi"])) if method == "loss" else getattr(scores, method)(*ratios(s))
        auc = float(auc_binary(found, s["member"]))
        assert auc > 0.55 if gain else abs(auc - 0.5) < 0.03


def test_images_without_a_reference_get_no_score_and_uneven_plans_do_not_invert_the_attack() -> None:
    """A14: zero padding of missing out-signals turns the attack around."""
    s = simulated(2, n=3000)
    draw = np.random.default_rng(0)
    contains = draw.random(s["contains"].shape) < draw.uniform(0.1, 0.9, 3000)
    contains[:, 0] = True
    s["shadow"] = s["shadow"] - 0.6 * s["contains"] + 0.6 * contains
    found = scores.rmia(log_p(s["phi"]), log_p(s["shadow"]), log_p(s["z"]), log_p(s["shadow_z"]), contains)
    assert np.isnan(found[0])
    answered = ~np.isnan(found)
    assert auc_binary(found[answered], s["member"][answered]) > 0.55


def test_confidence_does_not_saturate() -> None:
    """A16: ranks of logits up to ±80 equal those in higher precision; float32 softmax ties them."""
    margins = np.concatenate([np.linspace(-80, 80, 321), [700.0]])
    logits = np.stack([np.zeros_like(margins), margins], 1)
    found = signals.signals(logits, np.ones(len(margins), dtype=np.int64), "binary")
    assert np.isfinite(found.phi).all() and np.allclose(found.phi, margins)
    assert (np.diff(found.log_p) >= 0).all() and len(np.unique(found.log_p[:321])) > 240
    rounded = torch.softmax(torch.from_numpy(logits).float(), 1)[:, 1].numpy()
    assert len(np.unique(rounded)) < 250


def test_several_classes_and_labels() -> None:
    draw = np.random.default_rng(0)
    logits, y = draw.normal(size=(50, 5)), draw.integers(0, 5, 50)
    found = signals.signals(logits, y, "multiclass")
    p = np.exp(logits[np.arange(50), y]) / np.exp(logits).sum(1)
    assert np.allclose(found.phi, np.log(p / (1 - p))) and np.allclose(found.log_p, np.log(p))
    labels = draw.integers(0, 2, (50, 5)).astype(np.float64)
    labels[0, 1:] = np.nan
    many = signals.signals(logits, labels, "multilabel")
    q = 1 / (1 + np.exp(-logits))
    assert many.log_p[0] == pytest.approx(np.log(q[0, 0] if labels[0, 0] else 1 - q[0, 0]))
    assert np.allclose(many.log_p[1:], np.log(np.where(labels > 0, q, 1 - q))[1:].mean(1))


def test_scoring_leaves_the_model_as_it_was_and_takes_any_precision() -> None:
    """A17: float64 images, evaluation mode, running statistics untouched, twice the same."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 2))
    model.train()
    x = torch.rand(600, 1, 8, 8, dtype=torch.float64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = signals.logits_of(model, x), signals.logits_of(model, x)
    assert np.array_equal(first, second) and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_no_score_can_see_who_is_a_member() -> None:
    """A8: no function that makes scores takes the target's labels of membership."""
    for name, function in inspect.getmembers(scores, inspect.isfunction):
        assert not {"member", "members", "truth"} & set(inspect.signature(function).parameters), name


def test_perturbations_are_valid_images_and_fixed() -> None:
    x = torch.rand(3, 1, 16, 16)
    for number in range(perturbations.COPIES):
        once = perturbations.perturbed(x, number, torch.Generator().manual_seed(1))
        assert once.shape == x.shape and once.min() >= 0 and once.max() <= 1
        assert torch.equal(once, perturbations.perturbed(x, number, torch.Generator().manual_seed(1)))
