"""The exported app without a network: server and nodes give what one machine gives, and refuse the rest."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsec[flower]'")

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.app import Context, RecordDict
from flwr.app.user_config import UserConfig

from fedsec import checkpoint
from fedsec.api import run
from fedsec.deployment.app import client_app, owners_of, server_app
from fedsec.deployment.certificates import node_key
from fedsec.deployment.export import App, export_flower
from fedsec.errors import ConfigError, RefusedError

from .grid import LocalGrid, Node

TABLES: dict[str, Any] = {
    "data": {"max_train": 60},
    "model": {"name": "lenet"},
    "federation": {"clients": 4, "rounds": 2, "local_steps": 1, "device": "cpu"},
    "attack": ["poisoning:fraction=0.3"],
    "defense": ["median"],
    "baseline": False,
}


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> App:
    written = export_flower(TABLES, tmp_path / "app", nodes=2)
    for name in written.nodes:
        node_key(written.folder / "keys", name)
    monkeypatch.chdir(written.folder)
    return written


def config(app: App) -> dict[str, Any]:
    return dict(tomllib.loads((app.folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"])


def nodes(app: App, cells: str | None = None) -> dict[int, Node]:
    agreed = ",".join(c.key() for c in app.cells) if cells is None else cells
    found = {}
    for identity, name in enumerate(reversed(list(app.nodes)), start=70):
        public: Any = load_ssh_public_key((app.folder / "keys" / f"{name}.pub").read_bytes())
        own = {"folder": str(app.folder / "nodes" / name), "cells": agreed}
        key = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        found[identity] = Node(client_app(), own, config(app), key)
    return found


def serve(app: App, members: dict[int, Node]) -> dict[str, Any]:
    settings = {**config(app), "fedsec-gathering": 0.1}
    context = Context(1, 0, UserConfig({}), RecordDict(), UserConfig(settings))
    server_app()(LocalGrid(members), context)
    [cell] = (app.folder / "run" / "cells").glob("*.json")
    return dict(json.loads(cell.read_text()))


def test_the_app_gives_what_one_machine_gives(app: App, tmp_path: Path) -> None:
    cell = serve(app, nodes(app))
    plain = {**TABLES, "federation": {**TABLES["federation"], "engine": "serial"}}
    [expected] = run(plain, out=tmp_path / "serial")["cells"]
    for part in ("utility", "robustness", "leakage"):
        assert cell.get(part) == expected.get(part)
    a, b = (
        checkpoint.load(folder / "artifacts" / c["training"] / "snapshots.safetensors")[0]["round-3/params"]
        for folder, c in ((app.folder / "run", cell), (tmp_path / "serial", expected))
    )
    assert float((a - b).abs().max()) <= 1e-5


def test_a_node_answers_to_no_cell_that_its_owner_did_not_agree_to(app: App) -> None:
    with pytest.raises(RefusedError, match="agreed to the cells"):
        serve(app, nodes(app, cells="0000aaaa"))
    assert not (app.folder / "run" / "cells").exists() or not list((app.folder / "run" / "cells").glob("*.json"))


def test_a_missing_node_costs_its_clients_and_nothing_else(app: App) -> None:
    members = nodes(app)
    members.pop(70)
    cell = serve(app, members)
    missing = {str(k) for k in app.nodes["node-2"]}
    assert all(set(failed) == missing for failed in cell["failed_clients"].values())
    assert all(why.startswith("absent") for failed in cell["failed_clients"].values() for why in failed.values())


def test_hospitals_train_on_images_that_the_server_never_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [12, 9, 20, 7]
    asked = {**TABLES, "attack": [], "defense": ["dp:epsilon=20"]}
    app = export_flower(asked, tmp_path / "app", nodes=2, sizes=sizes)
    rng = np.random.default_rng(0)
    for name, clients in app.nodes.items():
        node_key(app.folder / "keys", name)
        for client in clients:
            images = rng.integers(0, 256, (sizes[client], *_side(app)), dtype=np.uint8)
            path = app.folder / "nodes" / name / f"client-{client}.npz"
            np.savez(path, images=images, labels=rng.integers(0, 2, sizes[client]))
    monkeypatch.chdir(app.folder)
    cell = serve(app, nodes(app))
    assert not cell.get("failed_clients") and cell["privacy"]["epsilon"] == pytest.approx(20, rel=0.01)
    ledger = next((app.folder / "run" / "artifacts").rglob("ledgers/*.jsonl")).read_text()
    events = [json.loads(line) for line in ledger.splitlines()]
    assert {(e["client"], e["num_units"]) for e in events if e["type"] == "dp_sgd"} == set(enumerate(sizes))


def _side(app: App) -> tuple[int, int]:
    facts = json.loads(config(app)["fedsec-facts"])[app.cells[0].key()]
    return facts["image_shape"][1], facts["image_shape"][2]


def test_a_node_without_a_key_on_the_server_is_refused(app: App) -> None:
    (app.folder / "keys" / "node-2.pub").write_text("ssh-rsa nonsense")
    with pytest.raises(ConfigError, match=r"node-2\.pub"):
        owners_of({k: list(v) for k, v in app.nodes.items()}, app.folder / "keys")
    (app.folder / "keys" / "node-2.pub").unlink()
    with pytest.raises(ConfigError, match=r"node-2\.pub"):
        owners_of({k: list(v) for k, v in app.nodes.items()}, app.folder / "keys")


def test_images_that_do_not_fit_stop_the_run_by_name(app: App) -> None:
    (app.folder / "nodes" / "node-1" / "client-1.safetensors").unlink()
    with pytest.raises(Exception, match="client-1"):
        serve(app, nodes(app))
