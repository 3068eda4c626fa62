"""Flower: clients' turns travel as its messages, on this machine (simulation) or many (SuperLink and SuperNodes).

The round stays where it is, in `round.py`: this file is how turns get to the nodes and replies back, and Flower's
simulation. `fedsec/deployment` is the app for several machines. Needs `pip install 'fedsec[flower]'`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from queue import Empty, Queue
from typing import Any

# Before flwr is imported: it reports home unless told not to, and so does ray.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsec.errors import ConfigError, FedsecError, RunError
from fedsec.federation.engines.base import ClientData, Engine, reason
from fedsec.federation.engines.messages import Arrays, Values, pack_replies, pack_turns, unpack_replies, unpack_turns
from fedsec.federation.round import client_turn
from fedsec.federation.seats import Reply, Seats, Turn
from fedsec.machine import prepare_for_small_networks, usable_cores

PATIENCE = 3600.0
"""Seconds that a deployed client may take where the configuration gives no `client_timeout`."""
GATHERING = 600.0
"""Seconds that a deployed server waits for all clients before its first round."""
START = 900.0
"""Seconds that the simulation may take to start."""
TURNS, HELLO = "train.turns", "query.hello"


# --- the server's side ------------------------------------------------------------------------------------------------


class Flower(Engine):
    """Turns over a Grid. A node's clients travel in one message; which clients are whose, the nodes say once.

    A node that answers too late sits out until its old answer is in; one that is gone is met again when it returns.

    Args:
        grid: of Flower. clients: how many the federation has. timeout: seconds for one message, there and back.
        poll: seconds between two looks for replies. tag: sent with every message (which cell is meant).
        owners: client -> public key (PEM) of the node that it lives on; None: the nodes are asked who they are.
        close: called at the end.
    """

    def __init__(
        self,
        grid: Grid,
        clients: int,
        timeout: float,
        *,
        poll: float = 0.02,
        tag: Mapping[str, str] | None = None,
        owners: Mapping[int, bytes] | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        self.grid = grid
        self.clients = clients
        self.timeout = timeout
        self.poll = poll
        self.tag = dict(tag or {})
        self.owners = owners
        self.nodes: dict[int, int] = {}
        """Client -> node."""
        self.known: set[int] = set()
        self.late: dict[str, int] = {}
        """Message that was given up -> its node."""
        self._close = close

    def gather(self, patience: float) -> list[int]:
        """Wait until every client has a node; returns the clients that have none when patience is over."""
        deadline = time.monotonic() + patience
        while True:
            self.meet()
            missing = [k for k in range(self.clients) if k not in self.nodes]
            if not missing or time.monotonic() >= deadline:
                return missing
            time.sleep(self.poll)

    def meet(self) -> None:
        """Find out which clients live on which node that is connected now."""
        present = {node.node_id: node for node in self.grid.get_nodes()}
        if self.owners is not None:  # the key that a node proved to hold says it, not the node
            by_key = {node.public_key: identity for identity, node in present.items()}
            self.nodes = {k: by_key[key] for k, key in self.owners.items() if key in by_key}
            return
        self.known &= present.keys()
        self.nodes = {k: n for k, n in self.nodes.items() if n in present}
        fresh = {node: RecordDict() for node in sorted(present.keys() - self.known)}
        for node, message in self._exchange(fresh, HELLO, "hello").items():
            if isinstance(message, str):
                continue  # it is asked again next time
            self.known.add(node)
            for client in message.content.config_records["hello"]["clients"]:
                self.nodes.setdefault(int(client), node)

    def train(self, turns: Sequence[Turn]) -> list[Reply]:
        """One message a node with the turns of its clients."""
        self._forgive()
        self.meet()
        busy = set(self.late.values())
        replies: list[Reply] = []
        shares: dict[int, list[Turn]] = {}
        for turn in turns:
            node = self.nodes.get(turn.client)
            if node is None:
                replies.append(Reply(turn.client, None, failure="absent: no node of it is connected"))
            elif node in busy:
                replies.append(Reply(turn.client, None, failure="late: its node still works on an earlier round"))
            else:
                shares.setdefault(node, []).append(turn)
        contents = {node: self._content(*pack_turns(share)) for node, share in shares.items()}
        group = str(turns[0].ctx.round) if turns else ""
        for node, message in self._exchange(contents, TURNS, group).items():
            share = shares[node]
            if isinstance(message, str):
                replies += [Reply(turn.client, None, failure=message) for turn in share]
                continue
            try:
                arrays, values = unwrap(message.content)
            except Exception as error:  # whatever a hostile node put there
                why = f"garbage: its reply cannot be read ({reason(error)})"
                replies += [Reply(turn.client, None, failure=why) for turn in share]
                continue
            replies += unpack_replies(arrays, values, share)
        return replies

    def _content(self, arrays: Arrays, values: Values) -> RecordDict:
        return wrap(arrays, {**values, **self.tag})

    def _exchange(self, contents: Mapping[int, RecordDict], kind: str, group: str) -> dict[int, Message | str]:
        """Send one message a node and wait; node -> its reply, or why there is none."""
        answers: dict[int, Message | str] = {}
        waiting: dict[str, int] = {}
        for node, content in contents.items():
            message = Message(content, node, kind, ttl=self.timeout + 60, group_id=group)
            [identity] = self.grid.push_messages([message]) or [None]
            if identity is None:
                answers[node] = "its node did not take the message"
            else:
                waiting[str(identity)] = node
        deadline = time.monotonic() + self.timeout  # the upload of large models to the grid is not a client's fault
        while waiting:
            for reply in self.grid.pull_messages(list(waiting)):
                owner = waiting.pop(reply.metadata.reply_to_message_id, None)
                if owner is not None:
                    answers[owner] = f"its node failed: {_error(reply)}" if reply.has_error() else reply
            if time.monotonic() >= deadline:
                break
            if waiting:
                time.sleep(self.poll)
        for identity, node in waiting.items():
            answers[node] = f"timeout: no reply within {self.timeout:g} s"
            self.late[identity] = node
        return answers

    def _forgive(self) -> None:
        """A node whose late answer has come, or whose message is void, may take part again."""
        if self.late:
            for reply in self.grid.pull_messages(list(self.late)):
                self.late.pop(reply.metadata.reply_to_message_id, None)

    def close(self) -> None:
        """Let the simulation end; a deployed app ends by itself."""
        if self._close is not None:
            self._close()


def _error(message: Message) -> str:
    text = str(message.error.reason or f"code {message.error.code}").strip().splitlines()
    return text[-1][:300] if text else f"code {message.error.code}"


def wrap(arrays: Arrays, values: Values) -> RecordDict:
    """One message's content."""
    filled = {name: Array(array) for name, array in arrays.items() if array.size}
    empty = [name for name, array in arrays.items() if not array.size]
    return RecordDict(
        {"arrays": ArrayRecord(filled), "values": ConfigRecord({**values, "empty": empty} if empty else values)}
    )


def unwrap(content: RecordDict) -> tuple[Arrays, Values]:
    """What `wrap` wrapped."""
    values = dict(content.config_records["values"])
    arrays: Arrays = {name: array.numpy() for name, array in content.array_records["arrays"].items()}
    empty = values.pop("empty", [])
    for name in empty if isinstance(empty, list) else []:
        arrays[str(name)] = torch.empty(0).numpy()
    return arrays, values


# --- the clients' side ------------------------------------------------------------------------------------------------


def answer(seats: Seats, turns: Iterable[Turn], data: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> RecordDict:
    """Carry out one node's turns."""
    replies: list[Reply | FedsecError] = []
    for turn in turns:
        try:
            replies.append(client_turn(seats, turn, *data[turn.client]))
        except FedsecError as error:
            replies.append(error)
        except Exception as error:
            replies.append(Reply(turn.client, None, failure=reason(error)))
    return wrap(*pack_replies(replies))


@lru_cache(maxsize=1)
def _simulated(path: str) -> tuple[Seats, ClientData]:
    """What the simulation's processes share: read once a process, images mapped from one file."""
    prepare_for_small_networks()
    # Written by this user's own run, moments ago, in a folder that only this user can read.
    seats, data = torch.load(path, mmap=True, weights_only=False)
    return seats, data


def simulated_client(path: str) -> ClientApp:
    """The ClientApp of the simulation; small, since it is sent along with every message."""
    app = ClientApp()

    def hello(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])  # the node's own id is another one in every run
        return Message(RecordDict({"hello": ConfigRecord({"clients": [partition]})}), reply_to=message)

    def turns(message: Message, context: Context) -> Message:
        seats, data = _simulated(path)
        device = next(seats.model.parameters()).device
        asked = unpack_turns(*unwrap(message.content), device)
        return Message(answer(seats, asked, dict(enumerate(data))), reply_to=message)

    app.query("hello")(hello)
    app.train("turns")(turns)
    return app


def simulate(seats: Seats, data: ClientData, timeout: float | None) -> Flower:
    """Start Flower's simulation with one virtual node a client.

    Raises:
        ConfigError: its extra is not installed. RunError: it does not start.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("engine=flower: the simulation needs ray: pip install 'fedsec[flower]', or use processes")
    from flwr.simulation import run_simulation

    folder = tempfile.mkdtemp(prefix="fedsec-flower-")
    path = str(Path(folder) / "seats.pt")
    torch.save((seats, data), path)
    grids: Queue[Grid | BaseException] = Queue()
    done = threading.Event()
    server = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        grids.put(grid)
        done.wait()

    server.main()(main)

    def run() -> None:
        cores = min(usable_cores(), len(data))
        backend: Any = {
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": cores, "include_dashboard": False, "log_to_driver": False},
        }
        try:
            with quiet():
                run_simulation(server, simulated_client(path), len(data), backend_config=backend)
        except BaseException as error:  # flwr leaves through SystemExit
            grids.put(error)

    thread = threading.Thread(target=run, name="fedsec-flower", daemon=True)

    def close() -> None:
        done.set()
        thread.join(60)
        shutil.rmtree(folder, ignore_errors=True)

    thread.start()
    try:
        grid = grids.get(timeout=START)
        if isinstance(grid, BaseException):
            raise grid
        engine = Flower(grid, len(data), timeout or PATIENCE, close=close)
        if missing := engine.gather(START):
            raise RunError(f"{len(missing)} of {len(data)} virtual nodes did not start")
    except (Exception, SystemExit) as error:
        close()
        why = f"nothing within {START:g} s" if isinstance(error, Empty) else reason(error)
        raise RunError(f"engine=flower: the simulation did not start ({why}); use engine=processes") from error
    return engine


@contextmanager
def quiet() -> Iterator[None]:
    """Flower's own words go no further than warnings; that `run_simulation` will go some day is known here."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# --- which of the two -------------------------------------------------------------------------------------------------

deployed: ContextVar[Callable[[int, float | None, str], Flower] | None] = ContextVar("deployed", default=None)
"""Set by the ServerApp of an exported app: (clients, timeout, cell) -> the engine over its nodes."""


def open_engine(seats: Seats, data: ClientData, timeout: float | None, cell: str) -> Flower:
    """The engine of a training: over the nodes of the app that this process serves, else a simulation."""
    nodes = deployed.get()
    return simulate(seats, data, timeout) if nodes is None else nodes(len(data), timeout, cell)
