"""How does a federation's cost grow? Clients, parameters, engines, and 200 hospitals on paper.

    OMP_NUM_THREADS=1 python experiments/benchmarks/scale.py clients --clients 10 100 1000 --model lenet
    OMP_NUM_THREADS=1 python experiments/benchmarks/scale.py clients --clients 1000 --model resnet18 --images 4
    OMP_NUM_THREADS=1 python experiments/benchmarks/scale.py engines --clients 10 100
    OMP_NUM_THREADS=1 python experiments/benchmarks/scale.py hospitals

`clients` runs every size in a process of its own and reads its peak memory (children included, shared pages counted
once), fits seconds = a + b * clients * images by least squares, and compares a streamed round with one that keeps all
updates. `engines` interleaves rounds on `processes` and on Flower's simulation, and takes paired ratios. `hospitals`
encodes updates of two lengths under each aggregator, aggregates 200 of them, and continues the straight line to
DenseNet-121: what is continued and what is measured is in the output.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsec import models, plugins
from fedsec.federation.aggregate import WeightedMean
from fedsec.federation.desk import ServerState
from fedsec.federation.engines.base import ClientData, Engine
from fedsec.federation.engines.processes import Processes
from fedsec.federation.engines.serial import Serial
from fedsec.federation.round import run_round
from fedsec.federation.seats import Seats
from fedsec.federation.strategy import FedAvg
from fedsec.federation.streaming import run_streamed
from fedsec.machine import prepare_for_small_networks
from fedsec.plugins import PluginSpec
from fedsec.types import FederationPlan, Layout, LocalRecipe, RoundContext, Update

RECIPE = LocalRecipe("binary", 2, lr=0.02, momentum=0.9, weight_decay=0.0, batch_size=32, epochs=1, steps=None)
HOSPITALS = 200
CTX = RoundContext(0, 1, 1)
RULES = ("median", "krum", "dos")
HIDING: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("", {}),
    "int8": ("int8", {}),
    "topk 1 %": ("topk", {"fraction": 0.01}),
    "secagg": ("secagg", {}),
    "he, seal": ("he", {"backend": "seal", "workers": 1}),
}


def federation(model: str, clients: int, images: int, side: int = 28) -> tuple[Seats, ClientData]:
    generator = torch.Generator().manual_seed(0)
    data = tuple(
        (torch.rand(images, 1, side, side, generator=generator), torch.arange(images) % 2) for _ in range(clients)
    )
    fast = tuple((x.to(memory_format=torch.channels_last), y) for x, y in data)
    network = models.build(model, num_classes=2, in_channels=1, image_size=side, norm="group", seed=0)
    network = network.to(memory_format=torch.channels_last)
    return Seats(network, RECIPE, FedAvg(), FedAvg().sharing(network)), fast


def first_state(seats: Seats) -> ServerState:
    tensors = {k: v.detach().clone() for k, v in seats.model.state_dict().items()}
    return ServerState(seats.sharing.params.flatten(tensors), seats.sharing.buffers.flatten(tensors))


# --- clients ----------------------------------------------------------------------------------------------------------


class Memory(threading.Thread):
    """The largest memory of this process and its children, each shared page counted once (proportional set size)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.done = threading.Event()

    def run(self) -> None:
        over = False
        while not over:  # once at least, however short the rounds are
            self.peak = max(self.peak, sum(map(pss, family(os.getpid()))))
            over = self.done.wait(0.05)


def family(pid: int) -> list[int]:
    found = [pid]
    for own in found:
        for task in Path(f"/proc/{own}/task").glob("*/children"):
            try:
                found += [int(word) for word in task.read_text().split()]
            except OSError:
                continue
    return found


def pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 0


def one_size(arguments: argparse.Namespace, clients: int) -> dict[str, Any]:
    """One federation in this process."""
    prepare_for_small_networks()
    seats, data = federation(arguments.model, clients, arguments.images, arguments.side)
    engine: Engine = Serial(seats, data) if arguments.workers == 1 else Processes(seats, data, arguments.workers)
    sizes = dict.fromkeys(range(clients), arguments.images)
    state = first_state(seats)
    seconds, cpu = [], 0.0
    with engine:
        for number in range(arguments.rounds + 1):  # the first is a warm-up: imports and memory that is kept
            ctx = RoundContext(0, number + 1, arguments.rounds + 1)
            if number == 1:
                memory = Memory()
                memory.start()
                cpu = time.process_time()
            if arguments.together:
                record = run_round(seats, state, range(clients), ctx, engine.train)
            else:
                record = run_streamed(seats, state, sizes, ctx, engine.stream)
            assert not record.failed
            seconds.append(record.seconds)
        memory.done.set()
        memory.join()
    return {
        "clients": clients,
        "parameters": seats.sharing.params.size,
        "images_each": arguments.images,
        "updates_mb": round(4e-6 * clients * seats.sharing.params.size, 1),
        "peak_mb": round(memory.peak / 1e6, 1),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1),
        "seconds_a_round": round(statistics.median(seconds[1:]), 3),
        "server_cpu_seconds_a_round": round((time.process_time() - cpu) / arguments.rounds, 3),
        "kept": "all updates" if arguments.together else "streamed",
    }


def clients(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for count in arguments.clients:
        for together in (False, True) if not arguments.stream_only else (False,):
            words = ["one", "--clients", str(count), "--model", arguments.model, "--images", str(arguments.images)]
            words += ["--rounds", str(arguments.rounds), "--workers", str(arguments.workers)]
            words += ["--side", str(arguments.side), *(["--together"] if together else [])]
            done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            rows.append(json.loads(done.stdout))
            print(json.dumps(rows[-1]), file=sys.stderr)
    return {"rows": rows, "fits": {kept: fit(rows, kept) for kept in ("streamed", "all updates")}}


def fit(rows: list[dict[str, Any]], kept: str) -> dict[str, float]:
    """Least squares of seconds on clients, weighted so that every size counts alike in relative terms."""
    own = [r for r in rows if r["kept"] == kept]
    if len(own) < 2:
        return {}
    n, s, m = (np.array([r[key] for r in own], dtype=float) for key in ("clients", "seconds_a_round", "peak_mb"))
    design = np.stack([np.ones_like(n), n], axis=1)
    a, b = np.linalg.lstsq(design / s[:, None], np.ones_like(s), rcond=None)[0]
    c, d = np.linalg.lstsq(design / m[:, None], np.ones_like(m), rcond=None)[0]
    error = float(np.abs(design @ np.array([a, b]) / s - 1).max())
    return {
        "seconds_fixed": round(float(a), 4),
        "seconds_a_client": round(float(b), 6),
        "largest_relative_error": round(error, 3),
        "mb_fixed": round(float(c), 1),
        "mb_a_client": round(float(d), 4),
    }


# --- engines ----------------------------------------------------------------------------------------------------------


def engines(arguments: argparse.Namespace) -> dict[str, Any]:
    from fedsec.federation.engines.flower import simulate

    prepare_for_small_networks()
    rows = []
    for count in arguments.clients:
        seats, data = federation(arguments.model, count, arguments.images)
        seconds: dict[str, list[float]] = {"processes": [], "flower": []}
        start = time.perf_counter()
        with simulate(seats, data, None) as flower, Processes(seats, data, arguments.workers) as processes:
            started = time.perf_counter() - start
            states = {"processes": first_state(seats), "flower": first_state(seats)}
            for number in range(1, arguments.rounds + 2):
                ctx = RoundContext(0, number, arguments.rounds + 1)
                for name, engine in (("processes", processes), ("flower", flower)):
                    record = run_round(seats, states[name], range(count), ctx, engine.train)
                    assert not record.failed
                    if number > 1:
                        seconds[name].append(record.seconds)
        ratios = sorted(f / p for f, p in zip(seconds["flower"], seconds["processes"], strict=True))
        difference = float((states["flower"].params - states["processes"].params).abs().max())
        rows.append(
            {
                "clients": count,
                "parameters": seats.sharing.params.size,
                "processes_seconds": round(statistics.median(seconds["processes"]), 4),
                "flower_seconds": round(statistics.median(seconds["flower"]), 4),
                "ratio": {
                    "median": round(statistics.median(ratios), 2),
                    "range": [round(r, 2) for r in ratios[:: max(1, len(ratios) - 1)]],
                },
                "start_seconds": round(started, 1),
                "largest_difference": difference,
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr)
    return {"rows": rows}


# --- hospitals --------------------------------------------------------------------------------------------------------


def densenet() -> int:
    model = models.build("densenet121", num_classes=2, in_channels=1, image_size=64, norm="group", seed=0)
    return sum(p.numel() for p in model.parameters())


def encoded(name: str, options: dict[str, Any], size: int) -> tuple[int, float]:
    """Bytes on the wire and the client's CPU seconds for one update of so many parameters."""
    layout = Layout(("w",), ((size,),))
    plan = FederationPlan(RECIPE, 1, (100,) * HOSPITALS, layout=layout)
    update = Update(0, torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.01, 100)
    ctx = CTX.for_client(0)
    rule = WeightedMean()
    if name:
        defense = plugins.build("defenses", PluginSpec(name, options)).calibrate(plan)
        rule = defense.aggregator() or rule
        start = time.process_time()
        update = defense.on_upload(update, ctx)
    else:
        start = time.process_time()
    if hasattr(rule, "keys"):
        _ = rule.keys  # made once a run
        start = time.process_time()
    payload = rule.encode(update, ctx)
    return payload.num_bytes, time.process_time() - start


def aggregated(name: str, size: int, count: int) -> float:
    """CPU seconds to combine `count` updates of so many parameters."""
    generator = torch.Generator().manual_seed(0)
    updates = [Update(k, torch.randn(size, generator=generator) * 0.01, 100) for k in range(count)]
    rule = plugins.build("defenses", PluginSpec(name, {})).aggregator() if name else WeightedMean()
    payloads = [rule.encode(u, CTX) for u in updates]
    start = time.process_time()
    rule.begin(dict.fromkeys(range(count), 1 / count), CTX)
    for payload in payloads:
        rule.accumulate(payload, CTX)
    rule.finish(CTX)
    return time.process_time() - start


def line(sizes: list[int], values: list[float], at: int) -> float:
    slope = (values[-1] - values[0]) / (sizes[-1] - sizes[0])
    return values[0] + slope * (at - sizes[0])


def hospitals(arguments: argparse.Namespace) -> dict[str, Any]:
    prepare_for_small_networks()
    d = densenet()
    sizes = arguments.sizes
    up = {}
    for label, (name, options) in HIDING.items():
        encoded(name, options, sizes[0])  # imports
        found = [encoded(name, options, size) for size in sizes]
        up[label] = {
            "upload_mb": round(line(sizes, [float(f[0]) for f in found], d) / 1e6, 2),
            "client_cpu_seconds": round(line(sizes, [f[1] for f in found], d), 2),
        }
    rules = {}
    for name in ("", *RULES):
        aggregated(name, 1000, 10)
        found = [aggregated(name, size, HOSPITALS) for size in sizes]
        rules[name or "mean"] = {
            "server_cpu_seconds": round(line(sizes, found, d), 1),
            "memory_gb": round((4e-9 * d) * (1 if not name else HOSPITALS), 2),
        }
    return {
        "parameters": d,
        "hospitals": HOSPITALS,
        "measured_at": sizes,
        "client": up,
        "server": rules,
        "seconds_an_image": arguments.side and per_image(arguments.side),
        "side": arguments.side,
    }


def per_image(side: int) -> float:
    """CPU seconds for one image in one step of DenseNet-121."""
    model = models.build("densenet121", num_classes=2, in_channels=1, image_size=side, norm="group", seed=0)
    x, y = torch.rand(4, 1, side, side), torch.tensor([0, 1, 0, 1])
    for _ in range(2):  # the first is a warm-up
        start = time.process_time()
        torch.nn.functional.cross_entropy(model(x), y).backward()
    return round((time.process_time() - start) / len(x), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("clients", "engines", "hospitals", "one"))
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--images", type=int, default=32, help="images of each client")
    parser.add_argument("--side", type=int, default=28, help="of an image; `hospitals`: 0 leaves out the training time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--together", action="store_true", help="keep all updates, as rules that compare them must")
    parser.add_argument("--stream-only", action="store_true", help="leave out the rounds that keep all updates")
    parser.add_argument("--sizes", type=int, nargs=2, default=[100_000, 400_000], help="parameters measured at")
    arguments = parser.parse_args()
    if arguments.what == "one":
        print(json.dumps(one_size(arguments, arguments.clients[0])))
        return
    result = {"clients": clients, "engines": engines, "hospitals": hospitals}[arguments.what](arguments)
    print(json.dumps({**result, "torch": torch.__version__, "cores": os.cpu_count()}, indent=1))


if __name__ == "__main__":
    main()
