"""Triggers, poisoned data, shaped updates, and a backdoor that works in a small federation."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from fedsec.attacks.backdoor import Backdoor
from fedsec.attacks.backdoor.edge_cases import tail
from fedsec.attacks.backdoor.triggers import PARTS, SHAPES, Trigger, apply, default_trigger, piece, shape_of
from fedsec.attacks.backdoor.upload import quiet, shaped

from fedsec.errors import ConfigError
from fedsec.types import FederationPlan, Peers, RoundContext, Update
from tests.federation import toy

SIZES = (40, 30, 50, 40, 30, 45, 35, 50, 40, 30)


def calibrated(**options: object) -> Backdoor:
    plan = FederationPlan(toy.recipe(), 3, SIZES)
    return Backdoor(**options).calibrate(plan, RoundContext(0, 0, 3))


@pytest.mark.parametrize("trigger", get_args(Trigger))
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 28, 28), (1, 64, 64), (3, 224, 224), (1, 32, 24)])
def test_triggers_cover_little_and_stay_in_range(trigger: Trigger, shape: tuple[int, int, int]) -> None:
    x = torch.rand(4, *shape) * 0.8 + 0.1
    made = apply(x, trigger)
    assert made.shape == x.shape
    assert 0 <= float(made.min()) <= float(made.max()) <= 1
    covered = shape_of(trigger, *shape[1:])
    assert 0.0005 < float(covered.float().mean()) < 0.12
    assert torch.equal(made[:, :, ~covered], x[:, :, ~covered])
    assert not torch.equal(made, x)
    assert set(get_args(Trigger)) == set(SHAPES)


def test_pieces_make_up_the_whole_trigger() -> None:
    whole = shape_of("marker", 28, 28)
    pieces = [piece(whole, k) for k in range(PARTS)]
    assert torch.equal(torch.stack(pieces).any(0), whole)
    assert sum(int(p.sum()) for p in pieces) == int(whole.sum())


def test_a_side_marker_is_no_brighter_than_the_image() -> None:
    x = torch.rand(3, 1, 28, 28) * 0.5
    assert float(apply(x, "marker").max()) <= float(x.max())
    assert default_trigger(1) == "marker"
    assert default_trigger(3) == "disc"


def test_poisoned_images_carry_trigger_and_target_and_none_was_of_the_target() -> None:
    attack = calibrated(share=0.5, trigger="corner", target=0)
    x, y = toy.images(200, seed=3, side=28)
    ctx = RoundContext(0, 1, 3, 2)
    px, py = attack.on_data(x, y, ctx)
    changed = (px != x).flatten(1).any(1)
    assert torch.equal(changed, py != y)
    assert bool((y[changed] == 1).all())
    assert bool((py[changed] == 0).all())
    assert 0.35 < float(changed.sum()) / float((y == 1).sum()) < 0.65
    again = attack.on_data(x, y, replace(ctx, round=3))
    assert torch.equal(again[0], px)


def test_success_is_asked_of_other_classes_only() -> None:
    x, y = toy.images(50, seed=4, side=28)
    probe = calibrated(target=1).probe(x, y)
    assert probe is not None
    assert len(probe.clean) == len(probe.triggered) == int((y == 0).sum())
    assert torch.equal(probe.clean, x[y == 0])


def test_a_distributed_trigger_gives_each_attacker_a_piece() -> None:
    attack = calibrated(method="distributed", fraction=0.3, trigger="corner", share=1.0)
    x, y = torch.full((20, 1, 28, 28), 0.5), torch.ones(20, dtype=torch.long)
    members = sorted(attack.controls(10))
    masks = [(attack.on_data(x, y, RoundContext(0, 1, 3, k))[0] != x)[0, 0] for k in members]
    assert not bool((masks[0] & masks[1]).any())
    assert all(0 < int(m.sum()) < int(shape_of("corner", 28, 28).sum()) for m in masks)
    with pytest.raises(ConfigError, match="two malicious"):
        calibrated(method="distributed", fraction=0.1).controls(10)


def test_edge_cases_are_the_tail_of_other_classes() -> None:
    x, y = toy.images(100, seed=5, side=12)
    x[y == 1] = x[y == 1].clamp(0, 1)
    odd = (y == 1).nonzero().flatten()[:1]
    x[odd] = 1 - x[odd]
    x[odd, :, :6] = 0
    chosen = tail(x, y, target=0, share=0.05)
    assert bool(chosen[odd].all())
    assert bool((y[chosen] == 1).all())
    attack = calibrated(method="edge_case")
    px, py = attack.on_data(x, y, RoundContext(0, 1, 3, 2))
    assert torch.equal(px, x)
    assert torch.equal(py != y, chosen)


def peers(params: torch.Tensor | None = None) -> Peers:
    honest = tuple(Update(k, torch.ones(50) * (k + 1), 10) for k in range(8))
    return Peers(honest, (Update(8, torch.ones(50), 10), Update(9, torch.ones(50), 10)), 10, params)


def test_model_replacement_scales_to_the_mean() -> None:
    update = Update(8, torch.ones(50), 10)
    ctx = RoundContext(0, 1, 3, 8)
    assert float(shaped(calibrated(method="model_replacement"), update, peers(), ctx).delta[0]) == 5.0
    bounded = shaped(calibrated(method="model_replacement", bound=0.5), update, peers(), ctx).delta
    assert float(bounded.norm()) == pytest.approx(0.5 * 4.5 * 50**0.5, rel=1e-5)


def test_neurotoxin_leaves_busy_parameters_alone() -> None:
    attack = calibrated(method="neurotoxin", top=10)
    update = Update(8, torch.ones(50), 10)
    first = shaped(attack, update, peers(torch.zeros(50)), RoundContext(0, 1, 3, 8)).delta
    assert torch.equal(first, update.delta)
    moved = torch.zeros(50)
    moved[[3, 7, 11, 20, 31]] = 1.0
    for client in (8, 9):
        second = shaped(attack, update, peers(moved), RoundContext(0, 2, 3, client)).delta
        assert (second == 0).nonzero().flatten().tolist() == [3, 7, 11, 20, 31]
    assert torch.equal(quiet(update.delta, None, 1.0), update.delta)


def test_impossible_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match="classes are 0 to 1"):
        calibrated(target=5)
    plan = FederationPlan(toy.recipe(task="multilabel"), 3, SIZES)
    with pytest.raises(ConfigError, match="multi-label"):
        Backdoor().calibrate(plan, RoundContext(0, 0, 3))
