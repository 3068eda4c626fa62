"""A search for breakdown points in a real folder: few trainings, resumed, refused where it makes no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsec.cli.tables import breaking
from fedsec.config import expand
from fedsec.errors import ConfigError
from fedsec.figures import draw
from fedsec.grid.breakdown import search, series_of
from fedsec.store import BREAKDOWN, RunFolder

TABLES: dict[str, Any] = {
    "sweep": {"breakdown": {"drop": 0.05}},
    "data": {"name": "synthetic-cxr:images=260"},
    "model": {"name": "lenet"},
    "federation": {"clients": 5, "rounds": 2, "local_steps": 2, "lr": 0.1},
    "attack": [{"name": "poisoning", "method": "scale", "factor": 1000.0}],
    "defense": [{"name": "fedavg", "kappa": "inf"}, {"name": "median"}],
}


def test_a_mean_breaks_at_once_and_the_search_resumes(tmp_path: Path) -> None:
    found = search(TABLES, out=tmp_path / "r", jobs=1)
    assert found["failed"] == [] and found["unfinished"] == 0
    mean, median = found["breakdown"]
    assert mean["clients"] == 5 and mean["limit"] == 2 and mean["finished"] and median["finished"]
    assert set(mean["auc_drop"]) == {"1", "2"}
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "r" / "cells").glob("*.json")}
    assert len(kept) == 2 + sum(len(s["auc_drop"]) for s in (mean, median))
    again = search(TABLES, out=tmp_path / "r", jobs=1)
    assert again["breakdown"] == found["breakdown"]
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "r" / "cells").glob("*.json")} == kept
    assert json.loads((tmp_path / "r" / BREAKDOWN).read_text())["series"] == found["breakdown"]
    names = {p.name for p in draw(tmp_path / "r")}
    assert {"breakdown.png", "breakdown.csv"} <= names and not any(n.startswith("tradeoff") for n in names)
    calm = [c for c in RunFolder.open(tmp_path / "r").results() if c["attack"] is None]
    hit = [c for c in RunFolder.open(tmp_path / "r").results() if (c["attack"] or {}).get("fraction") == 0.4]
    drop = calm[0]["utility"]["auc"]["value"] - hit[0]["utility"]["auc"]["value"]
    assert mean["auc_drop"]["2"]["value"] == pytest.approx(drop, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack": ["none"]}, "needs attacks"),
        ({"attack": [{"name": "poisoning", "fraction": 0.2}]}, "leave it out"),
        ({"federation": {"rounds": 2}}, "federation.clients"),
        ({"sweep": {"breakdown": {"dorp": 0.1}}}, "not dorp"),
        ({"sweep": {"breakdown": {"drop": 0.7}}}, "between 0 and 0.5"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        series_of({**TABLES, **change})


def test_other_commands_say_where_to_go() -> None:
    with pytest.raises(ConfigError, match="fedsec sweep"):
        expand(TABLES)


def test_what_is_printed() -> None:
    item = {"reason": "", "finished": True, "point": None, "limit": 4, "monotone": True}
    assert breaking(item) == "> 4"
    assert breaking({**item, "point": 2, "monotone": False}) == "2*"
    assert breaking({**item, "finished": False}) == "…"
    assert breaking({**item, "reason": "no"}) == "failed"
    assert breaking(None) == ""
