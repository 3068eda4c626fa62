"""What every registered strategy promises. A new strategy is one row of `ROWS`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fedsec
from fedsec import plugins
from fedsec.errors import ConfigError
from fedsec.federation.composition import compose
from fedsec.federation.engines.processes import Processes
from fedsec.federation.engines.serial import Serial
from fedsec.federation.strategy import Strategy, report_fault
from fedsec.types import Update

from ..strategies import small

LABELS = {"faithful", "faithful, fixed", "reconstruction", "ours"}


@dataclass(frozen=True)
class Row:
    """`extras`: all that a client sends beside shared tensors; `norm`: of the network; `side`: the server's own."""

    extras: frozenset[str] = frozenset()
    norm: str = "group"
    params: str = ""


ROWS = {
    "fedavg": Row(),
    "fedsgd": Row(),
    "partial": Row(),
    "fedprox": Row(),
    "moon": Row(),
    "fedbn": Row(norm="batch"),
    "silobn": Row(norm="batch"),
    "adabn": Row(norm="batch"),
    "local": Row(),
    "finetune": Row(),
    "iopfl": Row(),
    "pfedme": Row(),
    "harmofl": Row(),
    "hffed": Row(),
    "pfa": Row(norm="batch"),
    "gossip": Row(),
    "heterofl": Row(frozenset({"capacity", "classes"})),
    "cusfl": Row(params="warmup=0"),
    "fedsm": Row(frozenset({"personal", "selector"})),
    "loss_weighted": Row(frozenset({"loss"})),
    "fedslid": Row(frozenset({"label_histogram"})),
    "bsm": Row(),
    "ldam": Row(),
    "focal": Row(),
    "cb": Row(),
    "ekd": Row(),
    "fedmas": Row(frozenset({"rf"})),
    "siteaware_gnn": Row(),
    "replay": Row(frozenset({"decoder"}), params="generator_rounds=1,generator_epochs=1"),
    "dann": Row(frozenset({"features"})),
    "feature_stats": Row(frozenset({"moments"})),
    "medisecfed": Row(frozenset({"images", "votes"}), params="steps=2,images=2"),
}


def word(name: str) -> str:
    return f"{name}:{ROWS[name].params}" if ROWS[name].params else name


def test_the_table_is_complete() -> None:
    ours = {n for n, p in plugins._entry_points("strategies").items() if p.value.startswith("fedsec.")}
    assert set(ROWS) == ours


@pytest.mark.parametrize("name", ROWS)
def test_serial_and_processes_agree_and_nothing_undeclared_leaves(name: str) -> None:
    seen: list[Any] = []
    runs = []
    for engine in (Serial, Processes):
        strategy = compose(word(name))
        table, state = small.federation(strategy, norm=ROWS[name].norm)
        data = small.clients()
        with engine(table, data) as runner:  # type: ignore[abstract]
            records = small.rounds(table, state, data, runner.train, 2, watch=seen.append)
        assert all(not r.failed for r in records), records[0].failed
        runs.append(state)
    first, second = runs
    small.assert_same(first, second)
    sent = {key for view in seen for u in view.updates for key in u.extras}
    assert sent == (ROWS[name].extras if strategy.server_seat == "" else set())
    assert [r.upload_bytes for r in records] == [
        round(sum(wire_bytes(u) for u in view.updates) / len(view.updates)) if view.updates else record.upload_bytes
        for view, record in zip(seen[-2:], records, strict=True)
    ]
    for view in seen:
        for update in view.updates:
            assert update.delta.numel() == table.sharing.params.size
            assert report_fault(strategy, update) is None


def wire_bytes(update: Update) -> int:
    """The shared tensors, or what is written of them, the buffers, and the declared reports; nothing else."""
    whole = update.wire.num_bytes if update.wire else 4 * update.delta.numel()
    buffers = 0 if update.buffers is None else 4 * update.buffers.numel()
    return whole + buffers + sum(t.numel() * t.element_size() for t in update.extras.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_whole_run_from_the_command_line_s_side(name: str, tmp_path: Path) -> None:
    tables = {
        "data": {"name": "synthetic-cxr:images=260"},
        "model": {"name": "cnn", "norm": ROWS[name].norm},
        "federation": {"engine": "serial", "strategy": word(name)},
    }
    cell = fedsec.run(tables, out=tmp_path / "run", clients=2, rounds=2, local_epochs=1, attack="none")["cells"][0]
    assert not cell.get("failed_clients")
    personal = plugins.load("strategies", name).personal
    assert ("shared" in cell["utility"]) == (personal and name not in ("local", "medisecfed"))


SERVERS = (
    "gradinversion:images=1,budget_s=0.05,clock=work,bound=false,rounds=last",
    "membership:methods=loss+loss_series+grad_cos,shadows=0",
    "extras",
)
ODD = {"partial", "hffed", "moon", "ekd", "siteaware_gnn"}
"""Whose last fully connected layer stays at home, or does not make the logits, or is never passed."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ODD else pytest.mark.slow) for n in ROWS])
def test_every_attack_from_the_server_s_seat_runs_or_is_refused_with_a_reason(name: str) -> None:
    tables = {
        "data": {"name": "synthetic-cxr:images=200"},
        "model": {"name": "cnn", "norm": "group" if name == "heterofl" else "batch"},
        "federation": {"engine": "serial", "clients": 2, "rounds": 1, "local_epochs": 1, "strategy": word(name)},
        "baseline": False,
    }
    if name == "gossip":
        tables["federation"] |= {"strategy": "gossip:observer=0"}  # type: ignore[operator]
    for attack in SERVERS:
        if name in ("local", "medisecfed") and (name == "local" or attack != "extras"):
            with pytest.raises(ConfigError, match=r"no parameter leaves a client|sends nothing"):
                fedsec.run(tables, attack=attack)
        else:
            cell = fedsec.run(tables, attack=attack)["cells"][0]
            assert "leakage" in cell or cell["notes"]


@pytest.mark.parametrize("name", ROWS)
def test_it_says_where_it_comes_from_and_what_it_sends(name: str) -> None:
    cls = plugins.load("strategies", name)
    assert issubclass(cls, Strategy)
    assert cls.name == name and cls.goal and cls.source and cls.label in LABELS
    assert {r.name for r in cls.reports} == ROWS[name].extras
    assert all(r.tells for r in cls.reports)


@pytest.mark.parametrize("name", ROWS)
def test_every_client_can_be_judged(name: str) -> None:
    strategy = compose(word(name))
    table, state = small.federation(strategy, norm=ROWS[name].norm)
    data = small.clients()
    small.rounds(table, state, data, Serial(table, data).train, 1)
    for client, (x, _) in enumerate(data):
        model = strategy.personal_model(small.twin(table), table.sharing, client, state, x).eval()
        with torch.no_grad():
            assert torch.isfinite(model(x)).all()
    with torch.no_grad():
        unseen = strategy.unseen_model(small.twin(table), table.sharing, state, data[0][0]).eval()
        assert torch.isfinite(unseen(data[0][0])).all()
