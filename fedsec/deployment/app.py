"""The Flower app that `fedsec export flower` writes: its ServerApp and its ClientApp. See docs/deployment.md.

The server runs the cells as anywhere else, with `flower.Flower` as engine; a node builds the client's seat from the
cell and the federation's facts, and trains on what lies in its own folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from fedsec.config import Cell
from fedsec.errors import ConfigError, FedsecError, RefusedError, RunError
from fedsec.federation.engines.flower import PATIENCE, Flower, answer, deployed, unwrap, wrap
from fedsec.federation.engines.messages import pack_replies, unpack_turns
from fedsec.federation.facts import Facts, planned
from fedsec.machine import prepare_for_small_networks


def server_app() -> ServerApp:
    """Runs the app's cells and leaves an ordinary run folder on the server; submitted again, it resumes."""
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        from fedsec.api import run

        settings = {key: str(value) for key, value in context.run_config.items()}
        owners = owners_of(json.loads(settings["fedsec-nodes"]), Path(settings["fedsec-keys"]))
        gathering = float(settings["fedsec-gathering"])

        def engine(clients: int, timeout: float | None, cell: str) -> Flower:
            flower = Flower(grid, clients, timeout or PATIENCE, poll=0.5, tag={"cell": cell}, owners=owners)
            missing = flower.gather(gathering)
            if len(missing) == clients:
                raise RunError(f"no client connected within {gathering:g} s; start SuperNodes and submit the run again")
            if missing:
                print(f"fedsec: starting without clients {missing}", file=sys.stderr)
            return flower

        facts = {key: Facts.from_json(own) for key, own in json.loads(settings["fedsec-facts"]).items()}
        token, plan = deployed.set(engine), planned.set(facts)
        try:
            cells = json.loads(settings["fedsec-cells"])
            run({"cells": cells}, out=settings["fedsec-out"], data_dir=settings["fedsec-data"] or None)
        finally:
            deployed.reset(token)
            planned.reset(plan)

    app.main()(main)
    return app


def owners_of(nodes: dict[str, list[int]], keys: Path) -> dict[int, bytes]:
    """Client -> its node's public key in PEM form.

    Args:
        nodes: name -> its clients. keys: folder with `NAME.pub` of each node, in OpenSSH form.

    Raises:
        ConfigError: a key is missing or cannot be read; a node without one must not take part.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

    owners: dict[int, bytes] = {}
    for name, clients in nodes.items():
        path = keys / f"{name}.pub"
        try:
            key = load_ssh_public_key(path.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"{path}: not the public key of a node ({type(error).__name__}); see README.md") from None
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        owners |= dict.fromkeys(clients, pem)
    return owners


def client_app() -> ClientApp:
    """Trains the clients of one node.

    Node configuration: `folder` with the clients' images, and `cells`, the keys of the cells that its owner agreed to.
    """
    app = ClientApp()

    def turns(message: Message, context: Context) -> Message:
        prepare_for_small_networks()
        arrays, values = unwrap(message.content)
        try:
            cell, facts = agreed_cell(str(values["cell"]), context)
            asked = unpack_turns(arrays, values, torch.device("cpu"))
            seats, data = sit_down(cell, facts, Path(str(context.node_config["folder"])), [t.client for t in asked])
        except FedsecError as error:
            return Message(wrap(*pack_replies([error])), reply_to=message)
        return Message(answer(seats, asked, data), reply_to=message)

    app.train("turns")(turns)
    return app


def agreed_cell(key: str, context: Context) -> tuple[Cell, dict[str, Any]]:
    """The cell that the server means, and its facts, if this node's owner agreed to it.

    Raises:
        RefusedError: not agreed: who owns the data decides under which defenses it is trained on.
    """
    agreed = str(context.node_config.get("cells", "")).split(",")
    if key in agreed:
        for content in json.loads(str(context.run_config["fedsec-cells"])):
            cell = Cell.from_json(content)
            if cell.key() == key:
                return cell, json.loads(str(context.run_config["fedsec-facts"]))[key]
    raise RefusedError(f"a node agreed to the cells {', '.join(agreed) or 'none'}, and was asked for {key}")


def sit_down(
    cell: Cell, facts: dict[str, Any], folder: Path, clients: list[int]
) -> tuple[Any, dict[int, tuple[Tensor, Tensor]]]:
    """The clients' seats and images.

    Raises:
        ConfigError: a client's images are missing, or not as many as the federation was calibrated on.
    """
    from fedsec.federation.assemble import take_seats
    from fedsec.federation.clients import read_client

    known = Facts.from_json(facts)
    seats, _, _ = take_seats(cell, known)
    return seats, {k: read_client(folder, k, known) for k in clients}
