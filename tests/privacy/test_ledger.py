"""The ledger: composition per client, maximum over clients, and survival of restarts and broken files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedsec.errors import RefusedError
from fedsec.privacy.accounting import Gaussian, compose
from fedsec.privacy.ledger import DPSGDSteps, GaussianSum, Heuristic, Ledger, LocalGaussian, LocalLaplace, spent

DELTA = 1e-5


def one_round(client: int, number: int, images: int = 1000) -> DPSGDSteps:
    return DPSGDSteps(client, number, "sample", 1.1, 64 / images, -(-images // 64), 1.0, images, 64.0)


def test_a_federation_spends_the_maximum_and_never_the_sum() -> None:
    """P30, and the worked example: 50 rounds of one hospital with 1,000 images spend 10.81."""
    small, large = one_round(0, 0, 500), one_round(1, 0)
    events = [e for _ in range(50) for e in (small, large)]
    result = spent(events, DELTA, "sample", ("Poisson sampling",))
    assert result is not None
    assert result.per_client[1] == pytest.approx(10.81, abs=0.02)
    assert result.epsilon == result.per_client[0] > result.per_client[1]
    assert result.assumptions == ("Poisson sampling",)
    assert (result.accountant, result.unit, result.delta) == ("prv", "sample", DELTA)


def test_a_restart_changes_nothing(tmp_path: Path) -> None:
    """P1, P15."""
    path = tmp_path / "ledger.jsonl"
    for number in range(1, 51):
        Ledger(path).record(one_round(0, number))
    events = Ledger(path).events
    assert events == tuple(one_round(0, number) for number in range(1, 51))
    total = Ledger(path).spent(DELTA, "sample")
    assert total is not None
    assert total.epsilon == pytest.approx(10.81, abs=0.02)


def test_every_event_survives_the_file(tmp_path: Path) -> None:
    events = [
        one_round(3, 1),
        LocalGaussian(0, 1, "client (local)", 2.0, 1.0),
        LocalLaplace(0, 2, "client (local)", 5.0, 2.0, 3),
        Heuristic(1, 1, "update", "percentile noise", {"sigma": 0.1}),
        GaussianSum(2, 4, "client (central)", 1.5, 0.5, "0.5"),
    ]
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for event in events:
        ledger.record(event)
    assert Ledger(ledger.path).events == tuple(events)


@pytest.mark.parametrize(
    "damage", ["not json", '{"type": "dp_sgd"}', '{"type": "magic", "client": 0}', "[]", '"dp_sgd"']
)
def test_a_damaged_ledger_is_refused_by_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).record(one_round(0, 1))
    path.write_text(path.read_text() + damage + "\n")
    with pytest.raises(RefusedError, match=r"ledger\.jsonl:3"):
        Ledger(path)


def test_units_are_kept_apart_and_heuristics_give_no_epsilon() -> None:
    local = LocalGaussian(0, 0, "client (local)", 4.0, 2.0, releases=9)
    heuristic = Heuristic(0, 1, "client (local)", "percentile noise")
    result = spent([one_round(0, 1), local, heuristic], DELTA, "client (local)")
    assert result is not None
    assert result.epsilon == compose([Gaussian(2.0, 1.0, 9)], DELTA).epsilon
    assert spent([heuristic], DELTA, "client (local)") is None
    assert spent([], DELTA, "sample") is None


def test_the_reason_for_the_upper_bound_is_reported() -> None:
    loud = DPSGDSteps(0, 0, "sample", 0.2, 0.064, 800, 1.0, 1000, 64.0)
    result = spent([loud], DELTA, "sample")
    assert result is not None
    assert result.accountant == "rdp"
    assert any("PRV skipped" in text for text in result.assumptions)


def test_a_training_that_was_killed_counts_once_with_seeded_and_twice_with_fresh_noise(tmp_path: Path) -> None:
    """P15: seeded noise releases the very same numbers again; fresh noise does not."""
    for rng, expected in (("seeded", 3), ("system", 5)):
        path = tmp_path / rng
        for rounds in (2, 3):
            ledger = Ledger(path)
            ledger.begin("train-a", delta=DELTA)
            for number in range(1, rounds + 1):
                ledger.record(replace(one_round(0, number), rng=rng))
        ledger.finish()
        ledger.begin("train-b")
        ledger.record(one_round(7, 1))
        assert len(Ledger(path).of("train-a")) == expected
        assert [a.finished for a in Ledger(path).attempts] == [False, True, False]
        assert Ledger(path).attempts[0].header == {"delta": DELTA}


def test_a_ledger_shorter_than_its_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.begin("train-a")
    for number in (1, 2):
        ledger.record(one_round(0, number))
    ledger.finish()
    Ledger(path).check("train-a", 2)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2]) + "\n")
    with pytest.raises(RefusedError, match="1 events for train-a, which released 2"):
        Ledger(path).check("train-a", 2)
    path.unlink()
    with pytest.raises(RefusedError, match="0 events for train-a"):
        Ledger(path).check("train-a", 2)
    path.write_text("\n".join([*lines[:2], lines[3]]) + "\n")
    with pytest.raises(RefusedError, match=r"ledger\.jsonl:3: .*events are missing"):
        Ledger(path)
