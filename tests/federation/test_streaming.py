"""A streamed round is the round: same model, same record; and never more than a few updates in memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from fedsec import plugins
from fedsec.defense import Defense
from fedsec.federation.desk import ServerState
from fedsec.federation.engines.base import Engine
from fedsec.federation.engines.processes import Processes
from fedsec.federation.engines.serial import Serial
from fedsec.federation.round import run_round
from fedsec.federation.seats import Reply, RoundRecord, Seats, Turn
from fedsec.federation.streaming import run_streamed, streams
from fedsec.types import Payload, RoundContext, Update

from . import toy

SIZES = (24, 17, 32, 5, 20, 9, 11)
CTX = RoundContext(0, 1, 1)


def plain(seats: Seats, engine: Engine, state: ServerState) -> tuple[ServerState, RoundRecord]:
    return state, run_round(seats, state, range(len(SIZES)), CTX, engine.train)


def streamed(seats: Seats, engine: Engine, state: ServerState) -> tuple[ServerState, RoundRecord]:
    return state, run_streamed(seats, state, dict(enumerate(SIZES)), CTX, engine.stream)


def same(a: tuple[ServerState, RoundRecord], b: tuple[ServerState, RoundRecord], exact: bool = True) -> None:
    tolerance = {"atol": 0.0 if exact else 1e-6, "rtol": 0.0}
    torch.testing.assert_close(a[0].params, b[0].params, **tolerance)
    torch.testing.assert_close(a[0].buffers, b[0].buffers, **tolerance)
    assert a[1].failed == b[1].failed and a[1].upload_bytes == b[1].upload_bytes
    assert a[1].loss == pytest.approx(b[1].loss) and a[1].weights == pytest.approx(b[1].weights)


@pytest.mark.parametrize("engine", [Serial, Processes])
def test_streamed_is_the_round_to_the_last_bit(engine: Any) -> None:
    seats = toy.seats(toy.network(norm=True))
    one, other = toy.state(seats), toy.state(seats)
    with engine(seats, toy.clients(SIZES)) as running:
        same(plain(seats, running, one), streamed(seats, running, other))


class Troubled(Serial):
    """Client 1 fails, client 2 sends NaN, client 4 diverges."""

    def stream(self, turns: Sequence[Turn]) -> Iterator[Reply]:
        for reply in super().stream(turns):
            if reply.client == 1:
                yield Reply(1, None, failure="it broke")
                continue
            assert isinstance(reply.content, Payload)
            update: Update = reply.content.content
            factor = {2: float("nan"), 4: 1e9}.get(reply.client, 1.0)
            yield replace(reply, content=replace(reply.content, content=replace(update, delta=update.delta * factor)))


def test_who_fails_or_diverges_is_left_out_as_without_streaming() -> None:
    seats = toy.seats(strategy=plugins.build("strategies", plugins.PluginSpec("fedavg", {"max_weight": 1.0})))
    engine = Troubled(seats, toy.clients(SIZES))
    one, other = toy.state(seats), toy.state(seats)  # before the engine trains in the one model of this process
    a, b = plain(seats, engine, one), streamed(seats, engine, other)
    same(a, b, exact=False)
    assert set(b[1].failed) == {1, 2, 4} and b[1].failed[4].startswith("magnitude")
    assert not any("capped" in flag for flag in b[1].flags)


def test_a_cap_that_was_not_applied_again_is_said() -> None:
    seats = toy.seats()  # the weights are capped at 2/n, which is another cap when fewer reply
    sizes = (60, 5, 5, 5, 5, 5, 5)
    state = toy.state(seats)
    record = run_streamed(seats, state, dict(enumerate(sizes)), CTX, Troubled(seats, toy.clients(sizes)).stream)
    assert any("capped" in flag for flag in record.flags)
    assert sum(record.weights.values()) == pytest.approx(1)


def test_nobody_replies() -> None:
    seats = toy.seats()
    state = toy.state(seats)
    record = run_streamed(
        seats, state, {0: 1, 1: 1}, CTX, lambda turns: [Reply(t.client, None, failure="no") for t in turns]
    )
    assert set(record.failed) == {0, 1} and any("no safe aggregate" in flag for flag in record.flags)


@pytest.mark.parametrize("engine", [Serial, Processes])
def test_few_updates_are_alive_at_once(engine: Any) -> None:
    seats = toy.seats()
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    with engine(seats, toy.clients((5,) * 30)) as running:

        def counted(turns: Sequence[Turn]) -> Iterator[Reply]:
            nonlocal most
            for reply in running.stream(turns):
                assert isinstance(reply.content, Payload)
                alive.add(reply.content.content.delta)
                most = max(most, len(alive))
                yield reply
                del reply

        run_streamed(seats, toy.state(seats), dict.fromkeys(range(30), 5), CTX, counted)
    gc.collect()
    assert 0 < most <= 6


def test_replies_come_in_client_order_whoever_is_slow() -> None:
    seats = toy.seats()
    sizes = (60, 4, 4, 4, 4, 4, 4, 4)
    with Processes(seats, toy.clients(sizes), workers=2) as running:
        state = toy.state(seats)
        turns = [Turn(k, state.params, state.buffers, CTX.for_client(k)) for k in range(len(sizes))]
        assert [r.client for r in running.stream(turns)] == list(range(len(sizes)))


@dataclass(frozen=True)
class Looks(Defense):
    name: ClassVar[str] = "looks"
    protects: ClassVar[str] = "reads uploads"

    def on_receive(self, updates: Sequence[Update], ctx: RoundContext) -> Sequence[Update]:
        return updates


def test_only_where_nothing_has_to_see_two_updates() -> None:
    seats = toy.seats()
    assert streams(seats, 3, CTX, above=0) and not streams(seats, 3, CTX, above=10**9)
    rule = plugins.build("defenses", plugins.PluginSpec("median", {}))
    poisoning = plugins.build("attacks", plugins.PluginSpec("poisoning", {}))
    for changed in (
        replace(seats, aggregator=rule.aggregator()),
        replace(seats, malicious=frozenset({1})),
        replace(seats, attack=poisoning),
        replace(seats, defenses=(Looks(),)),
    ):
        assert not streams(changed, 3, CTX, above=0)


def test_many_clients_take_few_file_descriptors_and_no_second_copy() -> None:
    seats = toy.seats()
    data = toy.clients((3,) * 600)
    before = [x.clone() for x, _ in data]
    with Processes(seats, data, workers=1) as running:
        assert len({x.untyped_storage().data_ptr() for x, _ in data}) == 1
        assert all(torch.equal(a, x) for a, (x, _) in zip(before, data, strict=True))
        state = toy.state(seats)
        turns = [Turn(k, state.params, state.buffers, CTX.for_client(k)) for k in (0, 599)]
        assert [r.failure for r in running.stream(turns)] == [None, None]
