"""A training that was cut off and taken up again ends where one without a break ends, and the result says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsec.config import expand
from fedsec.federation.assemble import Federation, assemble, resolve
from fedsec.federation.budget import Budget
from fedsec.federation.resume import FILE, LastRound
from fedsec.federation.seats import Reply, Turn
from fedsec.federation.training import Training, train
from fedsec.privacy.ledger import Ledger

ROUNDS, CUT = 4, 3


def federation(defense: str, strategy: str = "fedavg") -> Federation:
    tables: dict[str, Any] = {
        "data": {"max_train": 120},
        "model": {"name": "lenet"},
        "federation": {
            "clients": 4,
            "rounds": ROUNDS,
            "local_steps": 1,
            "batch_size": 4,
            "engine": "serial",
            "device": "cpu",
            "strategy": strategy,
            "participation": "intermittent:p=0.8",
        },
        "defense": [defense] if defense else [],
        "baseline": False,
    }
    [cell] = expand(tables)
    return assemble(resolve(cell))


def run(table: Federation, folder: Path, cut: bool) -> Training:
    """One life of the server: reads what an earlier one left, and dies in round `CUT` where asked to."""
    last = LastRound(folder / "last", table.dataset.fingerprint, {1, 2})
    after = last.saved.number if last.saved is not None else None
    ledger = Ledger(folder / "ledger.jsonl")
    budget = Budget(table, ledger, "train-x", after)
    engine = table.engine()
    plain = engine.train

    def dying(turns: Sequence[Turn]) -> list[Reply]:
        if cut and turns[0].ctx.round == CUT:
            raise KeyboardInterrupt
        return plain(turns)

    engine.train = dying  # type: ignore[method-assign]
    table.engine = lambda: engine  # type: ignore[method-assign]
    return train(table, {1, 2}, budget=budget, last_round=last)


def both(defense: str, folder: Path, strategy: str = "fedavg") -> tuple[Training, Training]:
    whole = run(federation(defense, strategy), folder / "whole", cut=False)
    with pytest.raises(KeyboardInterrupt):
        run(federation(defense, strategy), folder / "cut", cut=True)
    return whole, run(federation(defense, strategy), folder / "cut", cut=False)


@pytest.mark.parametrize(
    "defense", ["", "foolsgold", "centered_clipping", "norm_clip:bound=adaptive", "fltrust", "dp:epsilon=50"]
)
def test_resumed_equals_uninterrupted(defense: str, tmp_path: Path) -> None:
    whole, resumed = both(defense, tmp_path)
    assert torch.equal(whole.snapshots[ROUNDS + 1][0], resumed.snapshots[ROUNDS + 1][0])
    assert whole.snapshots.keys() == resumed.snapshots.keys()
    assert [r["round"] for r in resumed.history] == list(range(1, ROUNDS + 1))
    assert [r["suspicion"] for r in whole.history] == [r["suspicion"] for r in resumed.history]
    assert any(f"stopped after round {CUT - 1}" in note for note in resumed.notes)
    assert not any("stopped" in note for note in whole.notes)
    assert whole.privacy == resumed.privacy, "seeded noise that is drawn again is released once"


def test_personal_tensors_survive(tmp_path: Path) -> None:
    whole, resumed = both("", tmp_path, "partial")
    assert whole.utility == resumed.utility


def test_noise_of_the_operating_system_is_released_twice(tmp_path: Path) -> None:
    whole, resumed = both("dp:epsilon=50,secure_rng=true", tmp_path)
    assert resumed.releases > whole.releases
    again = Ledger(tmp_path / "cut" / "ledger.jsonl")
    again.check("train-x", resumed.releases)


def test_the_ledger_reads_back_what_it_resumed(tmp_path: Path) -> None:
    whole, resumed = both("dp:epsilon=50", tmp_path)
    ledger = Ledger(tmp_path / "cut" / "ledger.jsonl")
    assert len(ledger.of("train-x")) == resumed.releases == whole.releases


def test_only_what_fits_is_taken_up(tmp_path: Path) -> None:
    table = federation("")
    with pytest.raises(KeyboardInterrupt):
        run(table, tmp_path, cut=True)
    fingerprint = table.dataset.fingerprint
    assert LastRound(tmp_path / "last", fingerprint, {1, 4}).saved is not None
    assert LastRound(tmp_path / "last", "other data").saved is None
    assert LastRound(tmp_path / "last", fingerprint, {9}).saved is not None, "a round that is still to come"
    kept = LastRound(tmp_path / "last", fingerprint)
    assert kept.saved is not None
    kept.keep(replace(kept.saved, states={}))
    assert LastRound(tmp_path / "last", fingerprint, {1}).saved is None, "round 1 is wanted and was not kept"


def test_a_damaged_or_hostile_file_is_ignored(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"half a fi")
    assert LastRound(tmp_path, "x").saved is None
    torch.save({"state": Path("/"), "fingerprint": "x"}, tmp_path / FILE)  # wants a class: weights-only refuses
    assert LastRound(tmp_path, "x").saved is None
    torch.save({"number": 3}, tmp_path / FILE)
    assert LastRound(tmp_path, "x").saved is None
