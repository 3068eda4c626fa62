"""A Grid without a network: real Flower messages and ClientApps, and nodes that misbehave when they are told to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid


class Node:
    """One SuperNode: an app, its configuration, and optionally what it does instead of answering."""

    def __init__(self, app: ClientApp, config: dict[str, Any], run_config: dict[str, Any], key: bytes) -> None:
        self.app = app
        self.config = config
        self.run_config = run_config
        self.key = key
        self.online = True
        self.instead: Callable[[Message], Message | None] | None = None
        self.received: list[Message] = []

    def handle(self, message: Message, identity: int) -> Message | None:
        self.received.append(message)
        if self.instead is not None:
            return self.instead(message)
        context = Context(
            run_id=1,
            node_id=identity,
            node_config=UserConfig(self.config),
            state=RecordDict(),
            run_config=UserConfig(self.run_config),
        )
        try:
            return self.app(message, context)
        except Exception as error:
            return Message(Error(code=2, reason=f"{type(error).__name__}: {error}"), reply_to=message)


class LocalGrid(Grid):
    """Delivers at once, through Flower's own serialisation."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        self.members = nodes
        self.replies: dict[str, Message] = {}
        self.sent = 0

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [n for n, node in self.members.items() if node.online]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=n, public_key=self.members[n].key) for n in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identities = []
        for message in messages:
            self.sent += 1
            identity = f"m{self.sent}"
            message.metadata.__dict__["_message_id"] = identity
            target = message.metadata.dst_node_id
            reply = self.members[target].handle(travelled(message), target)
            if reply is not None:
                self.replies[identity] = travelled(reply)
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        time.sleep(0.001)
        return [self.replies.pop(m) for m in list(message_ids) if m in self.replies]


def travelled(message: Message) -> Message:
    return message_from_proto(message_to_proto(message))
