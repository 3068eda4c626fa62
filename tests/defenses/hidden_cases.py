"""A federation of four small clients under a rule that hides them, with BatchNorm statistics to share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedsec import plugins
from fedsec.defense import Defense
from fedsec.federation.desk import ServerState
from fedsec.federation.engines.processes import Processes
from fedsec.federation.engines.serial import Serial
from fedsec.federation.hidden import HiddenSum
from fedsec.federation.round import run_round
from fedsec.federation.seats import RoundRecord, Seats
from fedsec.plugins import PluginSpec
from fedsec.types import FederationPlan, RoundContext
from tests.federation import toy

SIZES = (24, 17, 32, 90)
"""The last holds more than half of all images: the strategy caps its weight."""


def defense(name: str, sizes: tuple[int, ...] = SIZES, norm: bool = True, **params: Any) -> Defense:
    """Calibrated on a federation of these sizes."""
    table = toy.seats(toy.network(norm))
    weights = tuple(table.strategy.weights(dict(enumerate(sizes))).values())
    plan = FederationPlan(table.recipe, 2, sizes, layout=table.sharing.params, weights=weights)
    return plugins.build("defenses", PluginSpec(name, params)).calibrate(plan)


def rule(name: str, sizes: tuple[int, ...] = SIZES, norm: bool = True, **params: Any) -> HiddenSum:
    """The server's rule of such a defense."""
    made = defense(name, sizes, norm, **params).aggregator()
    assert isinstance(made, HiddenSum)
    return made


def seats(name: str | None, sizes: tuple[int, ...] = SIZES, norm: bool = True, **params: Any) -> Seats:
    """Seats around the toy network; the plain weighted mean where no name is given."""
    table = toy.seats(toy.network(norm))
    if name is None:
        return table
    made = defense(name, sizes, norm, **params)
    aggregator = made.aggregator()
    assert aggregator is not None
    return replace(table, defenses=(made,), aggregator=aggregator)


def train(
    table: Seats,
    sizes: tuple[int, ...] = SIZES,
    rounds: int = 2,
    present: tuple[int, ...] | None = None,
    workers: int = 0,
) -> tuple[ServerState, list[RoundRecord]]:
    """Some rounds; `workers`: in processes."""
    data, state, records = toy.clients(sizes), toy.state(table), []
    with Processes(table, data, workers=workers) if workers else Serial(table, data) as engine:
        for number in range(1, rounds + 1):
            ctx = RoundContext(0, number, rounds)
            records.append(run_round(table, state, present or range(len(sizes)), ctx, engine.train))
    return state, records
