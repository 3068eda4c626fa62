"""How fast are the engines? Ratios to a lean plain-torch loop that does the same training, in one run.

    python experiments/benchmarks/engines.py --clients 10 --rounds 6 --repeats 5

The lean loop has no hooks, no screening and no records: for each client, copy the global model, train it with
torch.optim.SGD on shuffled tensor slices, and average. Wall seconds, the median of interleaved repeats; the
machine is shared, so only ratios within one run mean something. `hooks` is the serial engine with a defense and a
server-side attack whose hooks do nothing, against the serial engine without any.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedsec import models
from fedsec.attack import Attack
from fedsec.defense import Defense
from fedsec.federation.desk import ServerState
from fedsec.federation.engines.base import ClientData, Engine
from fedsec.federation.engines.processes import Processes
from fedsec.federation.engines.serial import Serial
from fedsec.federation.round import run_round
from fedsec.federation.seats import Seats
from fedsec.federation.strategy import FedAvg
from fedsec.machine import prepare_for_small_networks
from fedsec.types import LocalRecipe, RoundContext, Seat

RECIPE = LocalRecipe("binary", 2, lr=0.02, momentum=0.9, weight_decay=0.0, batch_size=32, epochs=1, steps=None)


@dataclass(frozen=True)
class IdleDefense(Defense):
    name: ClassVar[str] = "idle"
    protects: ClassVar[str] = "nothing: every hook is called and does nothing"


@dataclass(frozen=True)
class IdleAttack(Attack):
    name: ClassVar[str] = "idle"
    seat: ClassVar[Seat] = "malicious-server"
    goal: ClassVar[str] = "nothing"


def build(name: str) -> torch.nn.Module:
    return models.build(name, num_classes=2, in_channels=1, image_size=28, seed=0)


def lean_loop(name: str, data: ClientData, rounds: int) -> Callable[[], Tensor]:
    """The same training written as plainly as torch allows."""
    model = build(name)
    start = {k: v.clone() for k, v in model.state_dict().items()}

    def run() -> Tensor:
        current = {k: v.clone() for k, v in start.items()}
        generator = torch.Generator().manual_seed(0)
        for _ in range(rounds):
            total = {k: torch.zeros_like(v) for k, v in current.items()}
            for x, y in data:
                model.load_state_dict(current)
                optimizer = torch.optim.SGD(model.parameters(), lr=RECIPE.lr, momentum=RECIPE.momentum)
                for rows in torch.randperm(len(x), generator=generator).split(RECIPE.batch_size):
                    optimizer.zero_grad()
                    torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                    optimizer.step()
                for key, value in model.state_dict().items():
                    total[key] += value / len(data)
            current = total
        return torch.cat([v.flatten() for v in current.values()])

    return run


def federated(seats: Seats, engine: Engine, clients: int, rounds: int) -> Callable[[], Tensor]:
    """The product's own rounds."""
    tensors = {k: v.detach().clone() for k, v in seats.model.state_dict().items()}
    params, buffers = seats.sharing.params.flatten(tensors), seats.sharing.buffers.flatten(tensors)

    def run() -> Tensor:
        state = ServerState(params.clone(), buffers.clone())
        for number in range(1, rounds + 1):
            run_round(seats, state, range(clients), RoundContext(0, number, rounds), engine.train)
        return state.params

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--images", type=int, default=470, help="images of each client")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    prepare_for_small_networks()  # the lean loop, in the same process, has the benefit of it too
    generator = torch.Generator().manual_seed(0)
    data = tuple(
        (torch.rand(arguments.images, 1, 28, 28, generator=generator), torch.arange(arguments.images) % 2)
        for _ in range(arguments.clients)
    )
    fast = tuple((x.to(memory_format=torch.channels_last), y) for x, y in data)
    model = build(arguments.model).to(memory_format=torch.channels_last)
    seats = Seats(model, RECIPE, FedAvg(), FedAvg().sharing(model))
    hooked = replace(seats, defenses=(IdleDefense(), IdleDefense()), attack=IdleAttack())
    with Processes(seats, fast, workers=arguments.workers) as processes:
        size = (arguments.clients, arguments.rounds)
        contenders = {
            "lean loop": lean_loop(arguments.model, data, arguments.rounds),
            "serial": federated(seats, Serial(seats, fast), *size),
            "serial, idle hooks": federated(hooked, Serial(hooked, fast), *size),
            "processes": federated(seats, processes, *size),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for repeat in range(arguments.repeats + 1):  # the first is a warm-up
            for name, run in contenders.items():
                start = time.perf_counter()
                run()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
    lean = seconds["lean loop"]

    def ratio(over: list[float], under: list[float]) -> dict[str, float]:
        """Median of the paired ratios, with their quartiles."""
        pairs = sorted(a / b for a, b in zip(over, under, strict=True))
        low, middle, high = statistics.quantiles(pairs, n=4)
        return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}

    result = {
        "seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "speed of serial over the lean loop": ratio(lean, seconds["serial"]),
        "speed of processes over the lean loop": ratio(lean, seconds["processes"]),
        "cost of idle hooks": ratio(seconds["serial, idle hooks"], seconds["serial"]),
        "torch": torch.__version__,
        **vars(arguments),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
