"""The plugin in whole rounds: who is malicious, what it sees, when it acts, and that it acts at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from fedsec.attacks.poisoning import Method, Poisoning
from fedsec.attacks.poisoning.flip import flipped
from fedsec.defenses.robust.krum import Krum
from fedsec.defenses.robust.median import Median

from fedsec.errors import ConfigError
from fedsec.federation.engines.serial import Serial
from fedsec.federation.round import run_round
from fedsec.metrics.robustness import without_effect
from fedsec.types import FederationPlan, RoundContext, to_json
from tests.federation import toy

SIZES = (24, 17, 32, 20, 28, 16, 30)


def run(attack: Poisoning, rounds: int = 1, rule: Any = Krum(declared_f=1), seed: int = 0) -> tuple[Any, list[Any]]:
    data = toy.clients(SIZES)
    table = toy.seats(aggregator=rule.aggregator()) if rule is not None else toy.seats()
    plan = FederationPlan(table.recipe, rounds, SIZES)
    attack = attack.calibrate(plan, RoundContext(seed, 0, rounds))
    table = replace(table, attack=attack, malicious=attack.controls(len(SIZES)))
    state = toy.state(table)
    records = []
    with Serial(table, data) as engine:
        for number in range(1, rounds + 1):
            ctx = RoundContext(seed, number, rounds)
            records.append(run_round(table, state, range(len(SIZES)), ctx, engine.train))
    return state, records


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_changes_something(method: str) -> None:
    """Attack names that match nothing have passed for robust rules elsewhere."""
    state, records = run(Poisoning(method=method, fraction=0.3))
    assert len(records[0].malicious) == 2
    assert not without_effect([to_json(vars(r)) for r in records])
    assert torch.isfinite(state.params).all()


def test_nobody_acting_is_noticed() -> None:
    _, records = run(Poisoning(method="zero", fraction=0.3, when="from:5"), rounds=2)
    assert without_effect([to_json(vars(r)) for r in records])


def test_seats_are_drawn_once_and_by_seed() -> None:
    plan = FederationPlan(toy.recipe(), 5, SIZES)
    drawn = [Poisoning(fraction=0.3).calibrate(plan, RoundContext(s, 0, 5)).controls(7) for s in range(6)]
    assert len(set(drawn)) > 1
    _, records = run(Poisoning(method="zero", fraction=0.3), rounds=3)
    assert len({r.malicious for r in records}) == 1
    largest = Poisoning(fraction=0.3, seats="largest").calibrate(plan, RoundContext(0, 0, 5))
    assert largest.controls(7) == {2, 6}
    assert replace(largest, seats="smallest").controls(7) == {1, 5}


def test_a_fraction_of_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match="is nobody"):
        Poisoning(fraction=0.01).controls(7)


@pytest.mark.parametrize(
    ("when", "acting"), [("always", {1, 2, 3, 4}), ("from:3", {3, 4}), ("every:2", {2, 4}), ("only:3", {3})]
)
def test_when(when: str, acting: set[int]) -> None:
    _, records = run(Poisoning(method="zero", fraction=0.3, when=when), rounds=4)
    assert {r.round for r in records if all(v > 0 for v in r.tampering.values())} == acting


def test_knowledge_limits_what_it_sees() -> None:
    honest, ctx = (0, 2, 3, 6), RoundContext(0, 1, 3)
    assert set(Poisoning().sees(honest, ctx)) == set(honest)
    assert set(Poisoning(knowledge="own").sees(honest, ctx)) == set()
    two = Poisoning(knowledge=2)
    assert len(two.sees(honest, ctx)) == 2
    assert two.sees(honest, ctx) == two.sees(honest, replace(ctx, round=2))
    assert Poisoning(knowledge="rule").knows_rule
    assert not Poisoning().knows_rule


def test_own_knowledge_works_in_a_round() -> None:
    for method in ("min_max", "alie", "fang", "mimic"):
        _, records = run(Poisoning(method=method, fraction=0.3, knowledge="own"))
        assert any(v > 0 for v in records[0].tampering.values())


def test_rule_aware_works_against_a_rule_by_coordinate() -> None:
    _, records = run(Poisoning(method="rule_aware", fraction=0.3), rule=Median())
    assert any(v > 0 for v in records[0].tampering.values())


def test_rule_aware_needs_a_rule() -> None:
    with pytest.raises(ConfigError, match="rule_aware searches against a robust rule"):
        run(Poisoning(method="rule_aware", fraction=0.3), rule=None)
    with pytest.raises(ConfigError, match="median gives no weights"):
        run(Poisoning(method="rule_aware", objective="weight", fraction=0.3), rule=Median())


def test_a_binary_label_flip_stays_binary() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0, 1, 1, 0])
    assert flipped(y, 2, "all", 1.0, generator).tolist() == [1, 0, 0, 1]
    many = torch.randint(0, 7, (500,), generator=generator)
    other = flipped(many, 7, "random", 1.0, generator)
    assert bool((other != many).all())
    assert set(other.tolist()) == set(range(7))
    half = flipped(many, 7, "all", 0.5, generator)
    assert 0.4 < float((half != many).float().mean()) < 0.6
    with pytest.raises(ConfigError, match="two classes"):
        flipped(y * 0, 1, "all", 1.0, generator)


def test_the_same_labels_are_flipped_in_every_round() -> None:
    plan = FederationPlan(toy.recipe(), 5, SIZES)
    attack = Poisoning(method="label_flip", share=0.5).calibrate(plan, RoundContext(0, 0, 5))
    x, y = toy.images(30, seed=1)
    one = attack.on_data(x, y, RoundContext(0, 1, 5, 2))[1]
    assert torch.equal(one, attack.on_data(x, y, RoundContext(0, 4, 5, 2))[1])
    assert not torch.equal(one, attack.on_data(x, y, RoundContext(0, 1, 5, 3))[1])


def test_drift_grows() -> None:
    _, records = run(Poisoning(method="drift", fraction=0.3), rounds=4)
    changed = [sum(r.tampered.values()) for r in records]
    assert changed == sorted(changed)
    assert changed[0] < changed[-1]


def test_the_footprint_is_recorded() -> None:
    _, records = run(Poisoning(method="sign_flip", fraction=0.3))
    assert records[0].tampering == pytest.approx(dict.fromkeys(records[0].malicious, 2.0), rel=1e-5)
    assert records[0].deviation is not None
    _, honest = run(Poisoning(method="size_liar", fraction=0.3))
    assert set(honest[0].tampering.values()) == {float("inf")}
