"""Nothing a client sends crashes a rule or puts a NaN into the model, and the sender is named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from fedsec.attack import Attack
from fedsec.federation.engines.serial import Serial
from fedsec.federation.round import run_round
from fedsec.types import Peers, RoundContext, Seat, Update
from tests.federation import toy
from tests.robust.test_rules import RULES

SIZES = (24, 17, 32, 20, 28, 16, 30, 18, 22, 26, 21)


@dataclass(frozen=True)
class Garbage(Attack):
    """Client 4 sends it."""

    name: ClassVar[str] = "garbage"
    seat: ClassVar[Seat] = "client"
    forge: Any = None

    def on_upload(self, update: Update, peers: Peers, ctx: RoundContext) -> Update:
        return self.forge(update)


def row(change: Any) -> Any:
    return lambda u: replace(u, delta=change(u.delta))


KINDS: dict[str, tuple[Any, str]] = {
    "nan row": (row(lambda d: torch.full_like(d, float("nan"))), "non_finite"),
    "one nan": (row(lambda d: d.index_fill(0, torch.tensor([3]), float("nan"))), "non_finite"),
    "inf row": (row(lambda d: torch.full_like(d, float("inf"))), "non_finite"),
    "one inf": (row(lambda d: d.index_fill(0, torch.tensor([3]), -float("inf"))), "non_finite"),
    "3e38": (row(lambda d: torch.full_like(d, 3e38)), "magnitude"),
    "float64 beyond float32": (row(lambda d: d.double() * 1e300), ""),
    "wrong shape": (row(lambda d: d[:-1]), "shape"),
    "two dimensions": (row(lambda d: d[None]), "shape"),
    "empty": (row(lambda d: d[:0]), "shape"),
    "integers": (row(lambda d: d.to(torch.int64)), "dtype"),
    "complex": (row(lambda d: d.to(torch.complex64)), "dtype"),
    "None": (row(lambda _: None), "type"),
    "size 1e12": (lambda u: replace(u, num_samples=10**12), "size_invalid"),
    "size -1": (lambda u: replace(u, num_samples=-1), "size_invalid"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_garbage(name: str, kind: str) -> None:
    forge, reason = KINDS[kind]
    table = toy.seats(
        aggregator=RULES[name].aggregator(),
        attack=Garbage(forge),
        malicious=frozenset({4}),
        recipe=toy.recipe(steps=1, epochs=None),
    )
    state = toy.state(table)
    before = state.params.clone()
    with Serial(table, toy.clients(SIZES)) as engine:
        record = run_round(table, state, range(len(SIZES)), RoundContext(0, 1, 1), engine.train)
    assert torch.isfinite(state.params).all()
    assert not torch.equal(state.params, before)
    if reason == "size_invalid":
        assert any("client 4: size_invalid" in flag for flag in record.flags)
    else:
        assert list(record.failed) == [4]
        assert reason in record.failed[4]


def test_garbage_from_most_clients_stops_nothing() -> None:
    """Three attackers must not be able to stop the training by sending NaN: rules then reckon with fewer."""
    table = toy.seats(
        aggregator=RULES["krum"].aggregator(),
        attack=Garbage(row(lambda d: d * float("nan"))),
        malicious=frozenset({1, 2, 3, 4, 5}),
    )
    state = toy.state(table)
    before = state.params.clone()
    with Serial(table, toy.clients(SIZES)) as engine:
        record = run_round(table, state, range(len(SIZES)), RoundContext(0, 1, 1), engine.train)
    assert len(record.failed) == 5
    assert not torch.equal(state.params, before)
