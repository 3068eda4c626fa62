"""A federation small enough for tests of strategies: registered networks, random images whose class is brightness."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsec import models
from fedsec.federation.desk import ServerState, Setting
from fedsec.federation.engines.base import ClientData
from fedsec.federation.engines.serial import Serial
from fedsec.federation.round import RoundRecord, Seats, run_round
from fedsec.federation.strategy import Strategy
from fedsec.types import RoundContext

from ..federation import toy

SIDE = 16


def clients(sizes: Sequence[int] = (24, 17, 32)) -> ClientData:
    """Every fifth label is wrong, so that no loss and no update vanishes."""
    drawn = [toy.images(n, seed, SIDE) for seed, n in enumerate(sizes)]
    return tuple((x, torch.where(torch.arange(len(y)) % 5 == 0, 1 - y, y)) for x, y in drawn)


def network(norm: str = "group", seed: int = 0, name: str = "cnn") -> nn.Module:
    return models.build(name, num_classes=2, in_channels=1, image_size=SIDE, norm=norm, seed=seed)


def federation(
    strategy: Strategy, norm: str = "group", model: nn.Module | None = None, count: int = 3, **changes: Any
) -> tuple[Seats, ServerState]:
    recipe = strategy.recipe(changes.pop("recipe", toy.recipe(batch_size=16, lr=0.02)))
    setting = Setting((1, SIDE, SIDE), recipe, count, RoundContext(0, 0, 2))
    model = strategy.prepare_model(model or network(norm), setting)
    sharing = strategy.sharing(model)
    seats = Seats(model, recipe, strategy, sharing, **changes)
    tensors = dict(model.state_dict(keep_vars=True))
    local = {}
    if sharing.local.size:
        local = {k: sharing.local.flatten(tensors) for k in range(count)}
    state = ServerState(sharing.params.flatten(tensors), sharing.buffers.flatten(tensors), local)
    state.side = strategy.initial_side(model, setting)
    return seats, state


def rounds(
    table: Seats,
    state: ServerState,
    data: ClientData,
    train: Callable[..., Any],
    number: int,
    total: int | None = None,
    watch: Callable[..., None] | None = None,
    present: Callable[[int], Sequence[int]] | None = None,
) -> list[RoundRecord]:
    records = []
    for t in range(1, number + 1):
        who = range(len(data)) if present is None else present(t)
        ctx = RoundContext(0, t, total or number)
        records.append(run_round(table, state, who, ctx, train, watch=watch))
    return records


def trained(
    strategy: Strategy, number: int = 2, norm: str = "group", data: ClientData | None = None, **changes: Any
) -> tuple[Seats, ServerState, list[RoundRecord]]:
    data = data or clients()
    table, state = federation(strategy, norm=norm, count=len(data), **changes)
    records = rounds(table, state, data, Serial(table, data).train, number)
    assert not any(r.failed for r in records), [r.failed for r in records]
    return table, state, records


def twin(table: Seats) -> nn.Module:
    return copy.deepcopy(table.model)


def assert_same(a: ServerState, b: ServerState, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a.params, b.params, rtol=0, atol=atol)
    torch.testing.assert_close(a.buffers, b.buffers, rtol=0, atol=atol)
    for left, right in ((a.local, b.local), (a.sent, b.sent), (a.side, b.side)):
        assert left.keys() == right.keys()
        for key in left:
            torch.testing.assert_close(left[key], right[key], rtol=0, atol=1e-5, msg=f"{key}")
    assert a.own.keys() == b.own.keys()
    for client in a.own:
        assert a.own[client].keys() == b.own[client].keys()
        for key, tensor in a.own[client].items():
            torch.testing.assert_close(tensor, b.own[client][key], rtol=0, atol=1e-5, msg=f"{client}/{key}")


def equal(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a, b))
