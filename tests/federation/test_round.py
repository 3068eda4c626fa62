"""One round, step by step: identities that must hold, and what clients may do wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fedsec.attack import Attack
from fedsec.defense import Defense
from fedsec.federation.desk import ServerState
from fedsec.federation.engines.processes import Processes
from fedsec.federation.engines.serial import Serial
from fedsec.federation.round import run_round
from fedsec.federation.seats import Seats
from fedsec.federation.strategy import FedSGD, Partial, Strategy
from fedsec.models.loss import task_loss
from fedsec.types import Peers, RoundContext, Seat, ServerView, Update

from . import toy


def train(table: Seats, data: Any, rounds: int = 2, seed: int = 0, **engine: Any) -> tuple[ServerState, list[Any]]:
    state = toy.state(table)
    records = []
    with Processes(table, data, **engine) if engine else Serial(table, data) as runner:
        for number in range(1, rounds + 1):
            ctx = RoundContext(seed, number, rounds)
            records.append(run_round(table, state, range(len(data)), ctx, runner.train))
    return state, records


def test_one_client_with_all_weight_is_local_training() -> None:
    table, data = toy.seats(), toy.clients((24,))
    state, _ = train(table, data, rounds=1)
    alone = toy.network()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05, momentum=0.9)
    generator = RoundContext(0, 1, 1, 0).generator("batches")
    x, y = data[0]
    for rows in torch.randperm(24, generator=generator).split(8):
        optimizer.zero_grad()
        task_loss("binary")(alone(x[rows]), y[rows]).backward()
        optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in alone.parameters()])
    torch.testing.assert_close(state.params, expected, rtol=0, atol=1e-6)


def test_fedsgd_of_equal_clients_is_one_centralised_step() -> None:
    data = toy.clients((16, 16, 16))
    table = toy.seats(strategy=FedSGD(), recipe=toy.recipe(batch_size=16))
    state, _ = train(table, data, rounds=1)
    model = toy.network()
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    task_loss("binary")(model(x), y).backward()
    expected = torch.cat([(p - 0.05 * p.grad).detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(state.params, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", [False, True])
def test_processes_equal_serial(norm: bool) -> None:
    data = toy.clients()
    serial, _ = train(toy.seats(toy.network(norm)), data)
    parallel, _ = train(toy.seats(toy.network(norm)), data, workers=2)
    torch.testing.assert_close(parallel.params, serial.params, rtol=0, atol=1e-6)
    torch.testing.assert_close(parallel.buffers, serial.buffers, rtol=0, atol=1e-6)
    assert not torch.equal(serial.params, toy.state(toy.seats(toy.network(norm))).params)


def test_batchnorm_statistics_are_averaged_with_the_clients_weights() -> None:
    data = toy.clients((16, 16))
    table = toy.seats(toy.network(norm=True), recipe=toy.recipe(batch_size=16, epochs=None, steps=1))
    state, _ = train(table, data, rounds=1)
    means = []
    for x, _ in data:
        model = toy.network(norm=True)
        model(x)
        means.append(model[1].running_mean)
    got = table.sharing.buffers.views(state.buffers)["1.running_mean"]
    torch.testing.assert_close(got, (means[0] + means[1]) / 2, rtol=0, atol=1e-6)


def test_local_tensors_stay_at_their_client() -> None:
    table, data = toy.seats(strategy=Partial(local="type:Linear")), toy.clients()
    state, _ = train(table, data)
    assert set(table.sharing.params.names) == {"0.weight", "0.bias"}
    assert set(state.local) == {0, 1, 2}
    assert not torch.equal(state.local[0], state.local[1])


def test_capped_weights() -> None:
    weights = Strategy().weights({0: 1, 1: 1, 2: 1, 3: 1, 4: 10**9})
    assert weights[4] == pytest.approx(2 / 5)
    assert sum(weights.values()) == pytest.approx(1)
    assert Strategy(max_weight=1.0).weights({0: 1, 1: 3}) == {0: 0.25, 1: 0.75}
    assert Strategy().weights({0: None, 1: None}) == {0: 0.5, 1: 0.5}
    assert Strategy().weights({0: 0, 1: 0}) == {0: 0.5, 1: 0.5}


@dataclass(frozen=True)
class Misbehave(Attack):
    """Client 1 sends whatever a test wants."""

    name: ClassVar[str] = "misbehave"
    seat: ClassVar[Seat] = "client"
    forge: Any = None

    def controls(self, num_clients: int) -> frozenset[int]:
        return frozenset({1})

    def on_upload(self, update: Update, peers: Peers, ctx: RoundContext) -> Update:
        assert {p.client for p in peers.honest} == {0, 2}
        assert {p.client for p in peers.own} == {1}
        assert peers.clients == 3
        return self.forge(update)


GARBAGE = {
    "non_finite: 1 values": lambda u: replace(u, delta=u.delta.index_fill(0, torch.tensor([3]), float("nan"))),
    "non_finite": lambda u: replace(u, delta=u.delta * float("inf")),
    "magnitude": lambda u: replace(u, delta=u.delta.sign() * 1e25),
    "shape": lambda u: replace(u, delta=u.delta[:-1]),
    "dtype": lambda u: replace(u, delta=u.delta.to(torch.complex64)),
}


@pytest.mark.parametrize("reason", GARBAGE)
def test_garbage_is_named_and_kept_out(reason: str) -> None:
    data = toy.clients()
    attack = Misbehave(GARBAGE[reason])
    state, records = train(toy.seats(attack=attack, malicious=frozenset({1})), data, rounds=1)
    assert torch.isfinite(state.params).all()
    assert list(records[0].failed) == [1]
    assert records[0].failed[1].startswith(reason)
    honest, _ = train(toy.seats(), data, rounds=1)
    assert not torch.equal(state.params, honest.params)


@pytest.mark.parametrize("claim", [10**12, -1, 0, True, 2.5, None, float("nan")])
def test_lies_about_the_sample_count_are_flagged(claim: Any) -> None:
    attack = Misbehave(lambda u: replace(u, num_samples=claim))
    state, records = train(toy.seats(attack=attack, malicious=frozenset({1})), toy.clients(), rounds=1)
    assert torch.isfinite(state.params).all()
    assert any("client 1: size_invalid" in flag for flag in records[0].flags)


@dataclass(frozen=True)
class Failing(Defense):
    """Fails, hangs or dies at client 2."""

    name: ClassVar[str] = "failing"
    protects: ClassVar[str] = "nothing"
    how: str = "raise"

    def on_upload(self, update: Update, ctx: RoundContext) -> Update:
        if update.client == 2:
            if self.how == "raise":
                raise ValueError("disk full")
            if self.how == "hang":
                import time

                time.sleep(600)
            import os

            os._exit(9)
        return update


@pytest.mark.parametrize(
    ("how", "engine", "reason"),
    [
        ("raise", {}, "ValueError: disk full"),
        ("raise", {"workers": 2}, "ValueError: disk full"),
        ("die", {"workers": 2}, "worker process died"),
        ("hang", {"workers": 2, "timeout": 20.0}, "timeout"),
    ],
)
def test_a_failing_client_is_named_and_the_round_goes_on(how: str, engine: dict[str, Any], reason: str) -> None:
    table = toy.seats(defenses=(Failing(how),))
    state, records = train(table, toy.clients(), rounds=1 if how == "hang" else 2, **engine)
    for record in records:
        assert list(record.failed) == [2]
        assert reason in record.failed[2]
    assert torch.isfinite(state.params).all()


def test_no_reply_leaves_the_model_as_it_was() -> None:
    @dataclass(frozen=True)
    class AllFail(Failing):
        def on_upload(self, update: Update, ctx: RoundContext) -> Update:
            raise ValueError("no")

    table = toy.seats(defenses=(AllFail(),))
    before = toy.state(table).params.clone()
    state, records = train(table, toy.clients(), rounds=1)
    assert torch.equal(state.params, before)
    assert len(records[0].failed) == 3
    assert "left as it was" in " ".join(records[0].flags)


def test_a_curious_server_sees_what_arrived_and_a_malicious_one_what_it_sent() -> None:
    seen: list[ServerView] = []

    @dataclass(frozen=True)
    class Watch(Attack):
        name: ClassVar[str] = "watch"
        seat: ClassVar[Seat] = "malicious-server"

        def on_broadcast(self, params: Tensor, client: int, ctx: RoundContext) -> Tensor:
            return params * (1 + client)

        def on_view(self, view: ServerView, ctx: RoundContext) -> None:
            seen.append(view)

    table = toy.seats(attack=Watch())
    start = toy.state(table).params
    train(table, toy.clients(), rounds=1)
    view = seen[0]
    assert [u.client for u in view.updates] == [0, 1, 2]
    assert torch.equal(view.params, start)
    assert view.local_steps == 4
    assert all(u.delta.shape == start.shape for u in view.updates)
