"""A real SuperLink and three SuperNodes on this machine: the same result as on one engine, and what breaks is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsec[flower]'")

from fedsec import checkpoint
from fedsec.api import run

from .deployment import Deployment

pytestmark = pytest.mark.slow

PNEUMONIA = Path(os.environ.get("FEDSEC_DATA", "/nowhere")) / "pneumoniamnist.npz"


def tables(rounds: int, timeout: float, **changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"name": "pneumoniamnist"} if PNEUMONIA.is_file() else {"name": "synthetic-cxr"}
    return {
        "data": {**data, "max_train": 300},
        "model": {"name": "lenet"},
        "federation": {
            "clients": 10,
            "rounds": rounds,
            "local_steps": 2,
            "batch_size": 8,
            "client_timeout": timeout,
            "device": "cpu",
        },
        "baseline": False,
        **changes,
    }


CELLS = {
    "dp+gradinversion": {"attack": ["gradinversion:images=2,budget_s=2,restarts=1"], "defense": ["dp:epsilon=8"]},
    "dos+poisoning": {"attack": ["poisoning:fraction=0.3"], "defense": ["dos"]},
}
SAME = ("utility", "robustness", "privacy")


def released(folder: Path, cell: dict[str, Any]) -> torch.Tensor:
    tensors, _ = checkpoint.load(folder / "artifacts" / cell["training"] / "snapshots.safetensors")
    return max(((k, t) for k, t in tensors.items() if k.endswith("/params")), key=lambda pair: int(pair[0][6]))[1]


@pytest.mark.parametrize("name", CELLS)
def test_the_same_cell_on_every_engine(name: str, tmp_path: Path) -> None:
    asked = tables(2, 900, **CELLS[name])
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for engine in ("serial", "processes", "flower"):
        own = {**asked, "federation": {**asked["federation"], "engine": engine}}
        [cell] = run(own, out=tmp_path / engine)["cells"]
        found[engine] = tmp_path / engine, cell
    with Deployment(tmp_path / "app", asked) as app:
        app.superlink()
        for node in app.app.nodes:
            app.flwr("supernode", "register", f"keys/{node}.pub", "fedsec", "--name", node)
            app.supernode(node)
        app.submit()
        app.wait(app.results, 1500, "the run is complete")
        [cell] = app.results().values()
        found["deployed"] = app.folder / "run", cell
        assert not cell.get("failed_clients")
    assert not app.left()
    base, first = found["serial"]
    for engine, (folder, cell) in found.items():
        difference = (released(folder, cell) - released(base, first)).abs().max()
        costs = {k: cell["cost"][k] for k in ("seconds", "rounds_per_second", "upload_bytes_per_client")}
        print(f"{name:>18} {engine:>10} {difference:.1e} {costs}")
        assert difference <= 1e-5, engine
        assert cell["cost"]["upload_bytes_per_client"] == first["cost"]["upload_bytes_per_client"]
        for part in SAME:
            assert _close(cell.get(part), first.get(part)), (engine, part)
        assert cell.get("leakage", {}).keys() == first.get("leakage", {}).keys()


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_close, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == pytest.approx(b, abs=1e-4)
    return bool(a == b)


def test_what_breaks_is_named_and_the_run_ends_well(tmp_path: Path) -> None:
    """A garbage node, a hanging one, one killed in mid-round, a stranger, and a SuperLink killed and restarted."""
    asked = tables(4, 90, defense=["median"])
    with Deployment(tmp_path / "app", asked) as app:
        app.superlink()
        for node in app.app.nodes:
            app.flwr("supernode", "register", f"keys/{node}.pub", "fedsec", "--name", node)
        stranger = app.supernode("stranger")
        (tmp_path / "app/nodes/node-2/mischief").write_text("garbage")
        (tmp_path / "app/nodes/node-3/mischief").write_text("hang")
        for node in app.app.nodes:
            app.supernode(node)
        app.submit()
        app.wait(lambda: app.last_round() >= 1, 900, "round 1 is over")
        (tmp_path / "app/nodes/node-2/mischief").unlink()
        app.wait(lambda: app.log("node-1").count("Receiving: train.turns") >= 2, 300, "node-1 has its second task")
        app.kill("node-1")
        app.wait(lambda: app.last_round() >= 2, 900, "round 2 is over")

        assert stranger.wait(60) != 0, "an unknown key is turned away"
        assert "Receiving" not in app.log("stranger") and "SuperNode ID" not in app.log("stranger")

        app.kill("superlink")
        app.kill("node-3")  # it would hang for an hour
        (tmp_path / "app/nodes/node-3/mischief").unlink()
        app.superlink()
        app.comeback("node-1")
        app.comeback("node-3")
        app.submit()
        app.wait(app.results, 1500, "the run is complete")
        [cell] = app.results().values()
        failed = cell["failed_clients"]
        print(failed, cell["notes"])
    assert not app.left(), "nothing of it is running any more"
    nodes = {name: [str(k) for k in clients] for name, clients in app.app.nodes.items()}
    assert all(failed["1"][k].startswith("garbage") for k in nodes["node-2"])
    assert all(failed["1"][k].startswith("timeout") for k in nodes["node-3"])
    assert all(failed["2"][k].startswith(("timeout", "its node failed", "absent")) for k in nodes["node-1"])
    assert all(failed["2"][k].startswith("late") for k in nodes["node-3"])
    assert not set(nodes["node-1"]) & failed["1"].keys() and not set(nodes["node-2"]) & failed["2"].keys()
    assert set(failed) == {"1", "2"}, "after the restart everybody takes part again"
    assert any("stopped after round" in note for note in cell["notes"])
    assert cell["utility"]["auc"]["n"] > 0
