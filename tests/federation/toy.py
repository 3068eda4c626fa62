"""A federation small enough for tests: random images whose class is their brightness, a tiny network, plain seats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedsec.federation.desk import ServerState
from fedsec.federation.engines.base import ClientData
from fedsec.federation.seats import Seats
from fedsec.federation.strategy import FedAvg
from fedsec.types import LocalRecipe


def recipe(**changes: Any) -> LocalRecipe:
    settings: dict[str, Any] = {
        "task": "binary",
        "num_classes": 2,
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "batch_size": 8,
        "epochs": 1,
        "steps": None,
    }
    return LocalRecipe(**{**settings, **changes})


def images(count: int, seed: int, side: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (count,), generator=generator)
    x = torch.rand(count, 1, side, side, generator=generator) * 0.5 + 0.4 * y.view(-1, 1, 1, 1)
    return x, y


def clients(sizes: tuple[int, ...] = (24, 17, 32)) -> ClientData:
    return tuple(images(n, seed) for seed, n in enumerate(sizes))


def network(norm: bool = False, seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 2)]
    if norm:
        layers.insert(1, nn.BatchNorm2d(4))
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def seats(model: nn.Module | None = None, **changes: Any) -> Seats:
    model = model or network()
    strategy = changes.pop("strategy", FedAvg())
    settings = changes.pop("recipe", recipe())
    return Seats(model, strategy.recipe(settings), strategy, strategy.sharing(model), **changes)


def state(table: Seats) -> ServerState:
    tensors = dict(table.model.state_dict(keep_vars=True))
    return ServerState(table.sharing.params.flatten(tensors), table.sharing.buffers.flatten(tensors))
