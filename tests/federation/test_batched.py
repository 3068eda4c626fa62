"""Clients stacked into one batch end where clients one after the other end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedsec import models, plugins
from fedsec.federation.engines.base import Engine
from fedsec.federation.engines.batched import Batched, stackable
from fedsec.federation.engines.serial import Serial
from fedsec.federation.round import run_round
from fedsec.federation.seats import Seats
from fedsec.plugins import PluginSpec
from fedsec.types import RoundContext

from . import toy

SIZES = (24, 17, 32, 8, 5)


def trained(seats: Seats, engine: Engine, clients: int = len(SIZES)) -> tuple[torch.Tensor, Any]:
    state = toy.state(toy.seats(seats.model, strategy=seats.strategy))
    for number in (1, 2):
        ctx = RoundContext(0, number, 2)
        record = run_round(seats, state, range(clients), ctx, engine.train)
    return state.params, record


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"momentum": 0.0},
        {"weight_decay": 0.1},
        {"epochs": 2, "batch_size": 7},
        {"epochs": None, "steps": 3},
        {"mode": "eval"},
    ],
)
@pytest.mark.parametrize("together", [2, 32])
def test_stacked_equals_serial(changes: dict[str, Any], together: int) -> None:
    data = toy.clients(SIZES)
    one, other = (toy.seats(toy.network(), recipe=toy.recipe(**changes)) for _ in range(2))
    expected, plain = trained(one, Serial(one, data))
    found, record = trained(other, Batched(other, data, together))
    assert float((found - expected).abs().max()) <= 1e-6
    assert record.loss == pytest.approx(plain.loss, rel=1e-5) and record.failed == plain.failed == {}


@pytest.mark.parametrize("name", ["lenet", "cnn"])
def test_stacked_equals_serial_on_the_real_networks(name: str) -> None:
    data = tuple(toy.images(n, seed, side=28) for seed, n in enumerate((12, 9, 12)))
    found = []
    for engine in (Serial, Batched):
        network = models.build(name, num_classes=2, in_channels=1, image_size=28, norm="group", seed=0)
        seats = toy.seats(network)
        assert stackable(seats)
        found.append(trained(seats, engine(seats, data), 3)[0])
    assert float((found[0] - found[1]).abs().max()) <= 1e-5


def test_what_cannot_be_stacked_is_trained_one_by_one() -> None:
    dropout = nn.Sequential(*toy.network(), nn.Dropout(0.5))
    assert not stackable(toy.seats(dropout)) and not stackable(toy.seats(toy.network(norm=True)))
    dp, topk = (plugins.build("defenses", PluginSpec(name, {})) for name in ("dp", "topk"))
    assert not stackable(toy.seats(defenses=(dp,))), "it wraps the step"
    assert stackable(toy.seats(defenses=(topk,))), "it changes the update alone"
    assert not stackable(toy.seats(recipe=toy.recipe(optimizer="adamw"))), "SGD alone is stacked"
    data = toy.clients(SIZES)
    one, other = toy.seats(toy.network(norm=True)), toy.seats(toy.network(norm=True))
    assert torch.equal(trained(one, Serial(one, data))[0], trained(other, Batched(other, data))[0])


def test_a_malicious_client_is_not_stacked_and_the_rest_is() -> None:
    attack = plugins.build("attacks", PluginSpec("poisoning", {"method": "sign_flip"}))
    data = toy.clients(SIZES)
    found = []
    for engine in (Serial, Batched):
        seats = toy.seats(toy.network(), attack=attack, malicious=frozenset({1}))
        found.append(trained(seats, engine(seats, data))[0])
    assert float((found[0] - found[1]).abs().max()) <= 1e-5


def test_nothing_shorter_than_float32_on_a_gpu() -> None:
    from fedsec.machine import full_precision

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        full_precision()
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_a_failing_upload_costs_its_client() -> None:
    defense = plugins.build("defenses", PluginSpec("topk", {}))

    class Breaks(type(defense)):  # type: ignore[misc]
        def on_upload(self, update: Any, ctx: Any) -> Any:
            if update.client == 2:
                raise ValueError("no disk")
            return update

    seats = toy.seats(toy.network(), defenses=(Breaks(),))
    _, record = trained(seats, Batched(seats, toy.clients(SIZES)))
    assert record.failed == {2: "ValueError: no disk"}
