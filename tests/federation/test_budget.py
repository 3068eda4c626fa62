"""The ledger of a run: written before the release, composed by who really took part, and never beyond the budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedsec
from fedsec.config import Cell, DataConfig, FederationConfig, ModelConfig
from fedsec.errors import RefusedError
from fedsec.federation import training as stage
from fedsec.federation.assemble import assemble
from fedsec.federation.budget import Budget
from fedsec.federation.training import train
from fedsec.plugins import PluginSpec
from fedsec.privacy.accounting import Gaussian, compose
from fedsec.privacy.ledger import PARTS, DPSGDSteps, GaussianSum, Heuristic, Ledger
from fedsec.types import RoundContext

DATA = {"name": "synthetic-cxr:images=260"}
SMALL: dict[str, Any] = {"clients": 2, "local_steps": 3, "engine": "serial", "device": "cpu"}


def cell(defense: str, **changes: Any) -> Cell:
    federation = FederationConfig(**{"rounds": 4, **SMALL, **changes})
    return Cell(
        data=DataConfig(**DATA),
        model=ModelConfig(name="lenet"),
        federation=federation,
        defense=(PluginSpec.parse(defense),),
    )


def run(folder: Path, defense: str, **changes: Any) -> dict[str, Any]:
    settings = {"rounds": 3, **SMALL, **changes}
    (one,) = fedsec.run(
        {"data": DATA, "model": {"name": "lenet"}}, defense=defense, baseline=False, out=folder, **settings
    )["cells"]
    return one


def test_a_run_leaves_a_ledger_with_everything_that_was_released(tmp_path: Path) -> None:
    result = run(tmp_path, "dp:epsilon=8,engine=ghost")
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [line["type"] for line in lines] == ["training", *["dp_sgd"] * 6, "finished"]
    first, event = lines[0], lines[1]
    assert first["training"] == result["training"] and first["data_fingerprint"] == result["data_fingerprint"]
    assert (first["delta"], first["participation"], first["unit"]) == (1e-5, "full", "sample")
    size = first["client_sizes"][0]
    assert event["q"] == pytest.approx(32 / size) and event["num_units"] == size and event["steps"] == 3
    assert (event["sampler"], event["rng"], event["clip"]) == ("poisson", "seeded", 1.0)
    whole = compose([Gaussian(event["noise_multiplier"], event["q"], 9)], 1e-5).epsilon
    assert result["privacy"]["per_client"][first["clients"][0]] == pytest.approx(whole)
    assert result["privacy"]["epsilon"] == max(result["privacy"]["per_client"].values()) <= 8
    # P15: the same request again finds its training only beside its ledger.
    (tmp_path / "artifacts" / PARTS / f"{result['training']}.jsonl").unlink()
    (tmp_path / "cells" / f"{result['id']}.json").unlink()
    with pytest.raises(RefusedError, match="0 events for train-"):
        run(tmp_path, "dp:epsilon=8,engine=ghost")


def test_only_rounds_that_a_client_took_part_in_are_spent(tmp_path: Path) -> None:
    federation = assemble(cell("dp:noise_multiplier=2,engine=ghost", rounds=5, participation="0.5"))
    ledger = Ledger(tmp_path / "ledger.jsonl")
    done = train(federation, (), budget=Budget(federation, ledger, "train-x"))
    present = [r["participants"] for r in done.history]
    for client, name in enumerate(federation.partition.names):
        rounds = sum(client in p for p in present)
        q = federation.seats.defenses[0].schedules[client].q  # type: ignore[attr-defined]
        expected = compose([Gaussian(2.0, q, 3 * rounds)], 1e-5).epsilon
        assert done.privacy["per_client"][name] == pytest.approx(expected)
    planned = federation.seats.defenses[0].privacy()
    assert planned is not None and done.privacy["epsilon"] < planned.epsilon


def test_the_release_is_in_the_ledger_before_it_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = assemble(cell("dp:noise_multiplier=2,engine=ghost"))
    path = tmp_path / "ledger.jsonl"

    def crash(*_: object) -> None:
        events = Ledger(path).of("train-x")
        assert [(e.client, e.round) for e in events] == [(0, 1), (1, 1)]
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "run_round", crash)
    with pytest.raises(KeyboardInterrupt):
        train(federation, (), budget=Budget(federation, Ledger(path), "train-x"))
    assert len(Ledger(path).of("train-x")) == 2


@pytest.mark.parametrize("limit", [0.1, 1.2, 8.0])
def test_training_ends_before_the_budget_is_exceeded_and_at_the_last_step_that_fits(
    tmp_path: Path, limit: float
) -> None:
    federation = assemble(cell(f"dp:noise_multiplier=4,max_epsilon={limit},engine=ghost", rounds=6))
    ledger = Ledger(tmp_path / "ledger.jsonl")
    done = train(federation, (), budget=Budget(federation, ledger, "train-x"))
    assert done.privacy.get("epsilon", 0.0) <= limit
    for client in range(2):
        schedule = federation.seats.defenses[0].schedules[client]  # type: ignore[attr-defined]
        steps = sum(e.count for e in ledger.events if e.client == client)
        if steps < 18:
            assert compose([Gaussian(4.0, schedule.q, steps + 1)], 1e-5).epsilon > limit
    # The largest number of steps that fits is cut within a round, too.
    assert any("privacy budget spent" in note or "stops" in note for note in done.notes) == any(
        s.allowed < 18
        for s in federation.seats.defenses[0].schedules  # type: ignore[attr-defined]
    )


def test_the_cut_off_round_really_takes_fewer_steps(tmp_path: Path) -> None:
    federation = assemble(cell("dp:noise_multiplier=4,max_epsilon=1.2,engine=ghost", rounds=6))
    budget = Budget(federation, Ledger(tmp_path / "ledger.jsonl"), "train-x")
    allowed = federation.seats.defenses[0].allowance(0)
    assert allowed is not None and 0 < allowed < 18
    seen = []
    for number in range(1, 7):
        present, limits = budget.admit([0, 1], RoundContext(0, number, 6))
        seen.append(limits.get(0, 3) if 0 in present else 0)
    assert sum(seen) == allowed
    assert seen == sorted(seen, reverse=True)


def test_other_defenses_write_down_what_they_release(tmp_path: Path) -> None:
    kinds = {"dp_client:noise_multiplier=2": GaussianSum, "gaussian:sigma=0.1": Heuristic}
    for number, (defense, kind) in enumerate(kinds.items()):
        federation = assemble(cell(defense, rounds=2))
        ledger = Ledger(tmp_path / f"{number}.jsonl")
        done = train(federation, (), budget=Budget(federation, ledger, "train-x"))
        assert [type(e) for e in ledger.events] == [kind] * 4
        assert bool(done.privacy) == (kind is GaussianSum)
        assert not any(isinstance(e, DPSGDSteps) for e in ledger.events)
    assert any("2 hospitals" in n for n in assemble(cell("dp_client")).seats.defenses[0].notes())


def test_patients_of_a_real_partition_are_the_units(tmp_path: Path) -> None:
    federation = assemble(cell("dp:unit=patient,noise_multiplier=2,engine=hooks", rounds=1))
    ledger = Ledger(tmp_path / "ledger.jsonl")
    done = train(federation, (), budget=Budget(federation, ledger, "train-x"))
    assert federation.plan.client_patients is not None
    assert [e.num_units for e in ledger.events] == list(federation.plan.client_patients)  # type: ignore[attr-defined]
    assert done.privacy["unit"] == "patient"
    assert all(p < n for p, n in zip(federation.plan.client_patients, federation.plan.client_sizes, strict=True))
