"""The round does not notice that its clients are Flower nodes: same parameters, same view, and every fault named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

flwr = pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsec[flower]'")

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402

from fedsec.errors import ConfigError  # noqa: E402
from fedsec.federation.engines.flower import Flower, simulated_client  # noqa: E402
from fedsec.federation.engines.serial import Serial  # noqa: E402
from fedsec.federation.round import run_round  # noqa: E402
from fedsec.federation.seats import RoundRecord, Seats  # noqa: E402
from fedsec.types import RoundContext, ServerView  # noqa: E402

from ..federation import toy  # noqa: E402
from .grid import LocalGrid, Node  # noqa: E402

SIZES = (24, 17, 32)
OWN = {11: [0, 1], 12: [2]}
"""Node -> its clients; node ids are Flower's and say nothing about the clients."""


def nodes(path: str) -> dict[int, Node]:
    return {900 - k: Node(simulated_client(path), {"partition-id": k}, {}, bytes([k])) for k in range(len(SIZES))}


@pytest.fixture
def federation(tmp_path: Any) -> tuple[Seats, LocalGrid, Flower]:
    seats = toy.seats(toy.network(norm=True))
    path = str(tmp_path / "seats.pt")
    torch.save((seats, toy.clients(SIZES)), path)
    grid = LocalGrid(nodes(path))
    engine = Flower(grid, len(SIZES), timeout=0.05, poll=0.001)
    assert engine.gather(1.0) == []
    return seats, grid, engine


def rounds(
    seats: Seats, engine: Serial | Flower, count: int = 2, before: Any = None
) -> tuple[Tensor, list[RoundRecord], list[ServerView]]:
    state, records, views = toy.state(seats), [], []
    with engine:
        for number in range(1, count + 1):
            if before is not None:
                before(number)
            ctx = RoundContext(0, number, count)
            records.append(run_round(seats, state, range(len(SIZES)), ctx, engine.train, watch=views.append))
    return state.params, records, views


def test_same_parameters_and_same_view_as_serial(federation: tuple[Seats, LocalGrid, Flower]) -> None:
    seats, _, engine = federation
    params, records, views = rounds(seats, engine)
    own = toy.seats(toy.network(norm=True))
    expected, plain, seen = rounds(own, Serial(own, toy.clients(SIZES)))
    assert torch.equal(params, expected)
    assert [r.upload_bytes for r in records] == [r.upload_bytes for r in plain] and not records[0].failed
    for view, other in zip(views, seen, strict=True):
        assert [u.client for u in view.updates] == [u.client for u in other.updates] == [0, 1, 2]
        assert all(torch.equal(a.delta, b.delta) for a, b in zip(view.updates, other.updates, strict=True))
    assert engine.nodes == {0: 900, 1: 899, 2: 898}, "the partition id says who a node is, not its order"


def test_faults_are_named_and_the_run_goes_on(federation: tuple[Seats, LocalGrid, Flower]) -> None:
    seats, grid, engine = federation
    hanging, garbage, dying = (grid.members[n] for n in (900, 899, 898))

    def before(number: int) -> None:
        hanging.instead = (lambda message: None) if number == 1 else None
        garbage.instead = nonsense if number == 2 else None
        dying.online = number < 3

    _, records, _ = rounds(seats, engine, 4, before)
    assert records[0].failed[0].startswith("timeout") and set(records[0].weights) == {1, 2}
    assert records[1].failed[0].startswith("late") and records[1].failed[1].startswith("garbage")
    assert set(records[1].weights) == {2}
    assert records[2].failed[2].startswith("absent") and records[2].failed[0].startswith("late")
    assert len(hanging.received) == 2, "a hanging node gets no further work"


def nonsense(message: Message) -> Message:
    return Message(RecordDict({"values": ConfigRecord({"0/loss": "yes"}), "arrays": ArrayRecord()}), reply_to=message)


def test_a_late_answer_lets_a_node_back_in_and_is_not_used(federation: tuple[Seats, LocalGrid, Flower]) -> None:
    seats, grid, engine = federation
    slow = grid.members[900]
    kept: list[Message] = []

    def before(number: int) -> None:
        slow.instead = (lambda message: kept.append(message)) if number == 1 else None
        if number == 2:  # the answer to round 1 arrives now
            slow_reply = slow.app(kept[0], context_of(slow))
            grid.replies["m4"] = slow_reply
            slow_reply.metadata.__dict__["_reply_to_message_id"] = "m4"

    _, records, _ = rounds(seats, engine, 2, before)
    assert records[0].failed[0].startswith("timeout")
    assert not records[1].failed and set(records[1].weights) == {0, 1, 2}


def context_of(node: Node) -> Any:
    from flwr.app import Context
    from flwr.app.user_config import UserConfig

    return Context(1, 1, UserConfig(node.config), RecordDict(), UserConfig(node.run_config))


def test_any_content_is_survived(federation: tuple[Seats, LocalGrid, Flower]) -> None:
    seats, grid, engine = federation
    grid.members[900].instead = lambda message: Message(RecordDict(), reply_to=message)
    grid.members[899].instead = lambda message: Message(
        RecordDict({"values": ConfigRecord({"clients": [1]}), "arrays": ConfigRecord({})}), reply_to=message
    )
    _, [record], _ = rounds(seats, engine, 1)
    assert set(record.failed) == {0, 1} and set(record.weights) == {2}


def test_a_node_without_a_registered_key_gets_nothing(tmp_path: Any) -> None:
    seats = toy.seats()
    path = str(tmp_path / "seats.pt")
    torch.save((seats, toy.clients(SIZES)), path)
    members = nodes(path)
    stranger = Node(simulated_client(path), {"partition-id": 0}, {}, b"somebody else's key")
    grid = LocalGrid({**members, 5: stranger})
    engine = Flower(grid, len(SIZES), timeout=0.05, poll=0.001, owners={k: bytes([k]) for k in range(len(SIZES))})
    assert engine.gather(1.0) == []
    _, [record], _ = rounds(seats, engine, 1)
    assert not record.failed and not stranger.received
    members[900].online = False  # and the stranger is not asked in its place
    _, [record], _ = rounds(seats, engine, 1)
    assert record.failed[0].startswith("absent") and not stranger.received


def test_a_node_that_comes_back_takes_part_again(federation: tuple[Seats, LocalGrid, Flower]) -> None:
    seats, grid, engine = federation

    def before(number: int) -> None:
        grid.members[900].online = number != 2

    _, records, _ = rounds(seats, engine, 3, before)
    assert [set(r.failed) for r in records] == [set(), {0}, set()]


def test_a_wrong_configuration_stops_the_run(federation: tuple[Seats, LocalGrid, Flower]) -> None:
    seats, grid, engine = federation
    app = ClientApp()

    @app.train("turns")
    def turns(message: Message, context: Any) -> Message:
        from fedsec.federation.engines.flower import wrap
        from fedsec.federation.engines.messages import pack_replies

        return Message(wrap(*pack_replies([ConfigError("this cannot work")])), reply_to=message)

    grid.members[900].app = app
    with pytest.raises(ConfigError, match="this cannot work"):
        rounds(seats, engine, 1)


@pytest.mark.parametrize("defense", ["he", "secagg"])
def test_encrypted_and_masked_payloads_travel_as_bytes(defense: str, tmp_path: Any) -> None:
    from fedsec import plugins
    from fedsec.types import FederationPlan

    model = toy.network()
    layout = toy.seats(model).sharing.params
    plan = FederationPlan(toy.recipe(), 1, SIZES, layout=layout)
    rule = plugins.build("defenses", plugins.PluginSpec(defense, {})).calibrate(plan)
    seats = toy.seats(model, defenses=(rule,), aggregator=rule.aggregator())
    path = str(tmp_path / "seats.pt")
    torch.save((seats, toy.clients(SIZES)), path)
    grid = LocalGrid(nodes(path))
    engine = Flower(grid, len(SIZES), timeout=60, poll=0.001)
    engine.gather(1.0)
    params, [record], [view] = rounds(seats, engine, 1)
    assert not record.failed
    assert view.clients_in_sum == len(SIZES) and view.updates[0].client == -1, "the sum is all that the view holds"
    plain = toy.seats(toy.network())
    expected, _, _ = rounds(plain, Serial(plain, toy.clients(SIZES)), 1)
    torch.testing.assert_close(params, expected, atol=1e-4, rtol=0)
