"""Writing a Flower app that runs a federation's cells on several machines."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from fedsec.config import Cell, expand
from fedsec.deployment import certificates
from fedsec.errors import ConfigError
from fedsec.federation.assemble import Federation, assemble, resolve, take_seats
from fedsec.federation.clients import write_client
from fedsec.federation.facts import Facts
from fedsec.federation.strategy import Strategy
from fedsec.files import write_text

FLOWER = "flwr>=1.41,<2"
PORT = 8000
GATHERING = 600
"""Seconds that the server waits for all nodes before its first round."""
MODULE = '"""Named in pyproject.toml; everything it does is in fedsec.deployment.app."""\n\n'


@dataclass(frozen=True)
class App:
    """What was written."""

    folder: Path
    cells: tuple[Cell, ...]
    clients: int
    nodes: Mapping[str, tuple[int, ...]]
    """Name -> its clients."""


def export_flower(
    tables: Mapping[str, Any],
    folder: Path,
    *,
    nodes: int = 3,
    superlink: str = "127.0.0.1",
    data_dir: Path | None = None,
    deal: bool = True,
    sizes: Sequence[int] | None = None,
) -> App:
    """Write the app.

    Args:
        tables: the configuration, as `fedsec.run` takes it. folder: must not exist, or be empty.
        nodes: machines that hold clients. superlink: host or host:port of the server.
        data_dir: where data sets are looked up first. deal: write each node's images into its folder.
        sizes: how many images each client will put there itself: its own, which the server never had.

    Raises:
        ConfigError: the folder is in use, or a cell cannot be distributed; nothing is written then.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: is not empty; name a new folder")
    cells = [_distributed(cell) for cell in expand(tables)]
    federations = [assemble(cell, data_dir) for cell in cells]
    for federation in federations:
        _check(federation, federations[0])
    first = federations[0]
    clients = len(first.clients)
    if sizes is not None:
        _check_sizes(sizes, clients, cells)
        deal = False
    if nodes > clients:
        raise ConfigError(f"--nodes {nodes}: there are {clients} clients")
    parts = np.array_split(np.arange(clients), nodes)
    owners = {f"node-{i}": tuple(int(k) for k in part) for i, part in enumerate(parts, start=1)}
    app = App(folder, tuple(cells), clients, owners)
    host, _, port = superlink.partition(":")
    facts = {c.key(): Facts.of(f.dataset, f.rows) for c, f in zip(cells, federations, strict=True)}
    if sizes is not None:
        facts = {
            key: replace(own, client_sizes=tuple(sizes), client_patients=None, patient_ids=None)
            for key, own in facts.items()
        }
        for cell in cells:  # a defense that cannot be calibrated on these sizes is refused now
            take_seats(cell, facts[cell.key()])
    _write_app(app, {key: own.to_json() for key, own in facts.items()}, host, port or str(PORT), data_dir, deal)
    for name, own in owners.items():
        (folder / "nodes" / name).mkdir(parents=True)
        for client in own if deal else ():
            write_client(folder / "nodes" / name, client, *first.clients[client])
    return app


def _distributed(cell: Cell) -> Cell:
    settings = replace(cell.federation, engine="processes", device="cpu")
    resolved = resolve(replace(cell, federation=settings))  # whoever writes the app need not have Flower
    return replace(resolved, federation=replace(resolved.federation, engine="flower"))


def _check_sizes(sizes: Sequence[int], clients: int, cells: Sequence[Cell]) -> None:
    if len(sizes) != clients or min(sizes, default=0) < 1:
        raise ConfigError(f"--sizes: {len(sizes)} numbers for {clients} clients; give one, of at least 1, for each")
    if any(cell.attack is not None for cell in cells):
        raise ConfigError("--sizes: an attack is judged by images that the server knows; export the cells without it")


def _check(federation: Federation, first: Federation) -> None:
    """Refuse what would be another experiment, or a weaker one, on several machines."""
    cell, seats = federation.cell, federation.seats
    if not seats.aggregator.sees_individuals:
        raise ConfigError(
            f"{cell.label()}: its keys would be dealt by the server, from which they are to hide the updates; "
            "run it with --engine flower on one machine"
        )
    strategy = type(seats.strategy)
    if seats.sharing.local.size or strategy.finish is not Strategy.finish or seats.strategy.final_epochs:
        raise ConfigError(
            f"strategy {cell.federation.strategy}: personal tensors, and what it keeps at the clients, would travel to "
            "the server"
        )
    if cell.model.weights is not None:
        raise ConfigError(f"model.weights={cell.model.weights}: the nodes do not have this file")
    same = len(federation.rows) == len(first.rows) and all(map(np.array_equal, federation.rows, first.rows))
    if federation.dataset.fingerprint != first.dataset.fingerprint or not same:
        raise ConfigError("an app holds cells of one data set and one partition: the nodes have their images once")


def _write_app(app: App, facts: Mapping[str, Any], host: str, port: str, data_dir: Path | None, deal: bool) -> None:
    package = app.folder / "fedsec_app"
    package.mkdir(parents=True)
    write_text(package / "__init__.py", '"""A federation that fedsec exported."""\n')
    for side in ("server", "client"):
        code = f"from fedsec.deployment.app import {side}_app\n\napp = {side}_app()\n"
        write_text(package / f"{side}_app.py", MODULE + code)
    settings = {
        "fedsec-cells": json.dumps([cell.to_json() for cell in app.cells]),
        "fedsec-facts": json.dumps(facts),
        "fedsec-nodes": json.dumps(app.nodes),
        "fedsec-keys": "keys",
        "fedsec-out": "run",
        "fedsec-data": str(data_dir.resolve()) if data_dir else "",
        "fedsec-gathering": GATHERING,
    }
    project = {
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "project": {
            "name": "fedsec-app",
            "version": "1.0.0",
            "description": "A federation that fedsec exported.",
            "license": "Apache-2.0",
            "dependencies": [FLOWER, f"fedsec=={importlib.metadata.version('fedsec')}"],
        },
        "tool": {
            "hatch": {"build": {"targets": {"wheel": {"packages": ["fedsec_app"]}}}},
            "flwr": {
                "app": {
                    "publisher": "fedsec",
                    "components": {
                        "serverapp": "fedsec_app.server_app:app",
                        "clientapp": "fedsec_app.client_app:app",
                    },
                    "config": settings,
                }
            },
        },
    }
    write_text(app.folder / "pyproject.toml", tomli_w.dumps(project))
    connection = {"address": f"{host}:{port}", "root-certificates": "HERE/certificates/ca.pem"}
    write_text(app.folder / "flower.toml", tomli_w.dumps({"superlink": {"default": "fedsec", "fedsec": connection}}))
    write_text(app.folder / ".gitignore", "certificates/\nkeys/\nnodes/\nrun/\n*.db\n")
    shutil.copy(certificates.__file__, app.folder / "certificates.py")
    write_text(app.folder / "README.md", readme(app, host, port, deal))


def readme(app: App, host: str, port: str, deal: bool) -> str:
    """The lines to type, for this app."""
    text = (Path(__file__).parent / "README-app.md").read_text(encoding="utf-8")
    keys = ",".join(cell.key() for cell in app.cells)
    described = [f"| `{c.key()}` | {c.attack or 'none'} | {c.label()} | {c.seed} |" for c in app.cells]
    starts = [
        f"""**{name}** (clients {", ".join(map(str, own))}):

```sh
flower-supernode --superlink {host}:{port} --root-certificates certificates/ca.pem \\
  --auth-supernode-private-key keys/{name} --port {9094 + i} \\
  --node-config 'folder="'$PWD'/nodes/{name}" cells="{keys}"'
```
"""
        for i, (name, own) in enumerate(app.nodes.items())
    ]
    images = "were written there by the export" if deal else "have to be put there by its hospital"
    return string.Template(text).substitute(
        cells="\n".join(described),
        address=f"{host}:{port}",
        host=host,
        port=port,
        listen=host if host in ("127.0.0.1", "localhost") else "0.0.0.0",
        names=" ".join(app.nodes),
        register="\n".join(f"flwr supernode register keys/{name}.pub fedsec --name {name}" for name in app.nodes),
        starts="\n".join(starts),
        images=images,
        gathering=GATHERING,
    )
