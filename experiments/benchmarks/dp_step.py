"""What does one private step cost beside a plain one? Our engines and Opacus' modes, CPU time and memory.

    OMP_NUM_THREADS=1 python -m experiments.benchmarks.dp_step --cases cnn-28-32,resnet18-64-64 --repeats 5

Every contender gets a process of its own, which takes plain and private steps by turns: the ratio is that of the two
medians of CPU seconds, noise, clipping and optimiser included. Memory is the peak of the first step above what the
process held before it. Ours work in channels_last memory as the federation does, Opacus in contiguous memory, since its
convolution rule is wrong for the other; plain steps are the faster of the two, which is channels_last.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fedsec.defenses.dp_step import ENGINES, PrivateStep, Schedule
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec import models
from fedsec.federation.local import PlainStep
from fedsec.machine import prepare_for_small_networks
from fedsec.types import LocalRecipe, RoundContext

OPACUS = ("opacus-hooks", "opacus-functorch", "opacus-ew", "opacus-ghost")
Step = Callable[[Tensor, Tensor], Any]


def recipe(batch: int) -> LocalRecipe:
    return LocalRecipe("multiclass", 2, 0.01, momentum=0.9, weight_decay=0.0, batch_size=batch, epochs=1, steps=None)


def ours(name: str, model: nn.Module, batch: int) -> Step:
    schedule = Schedule(1000, 1.0, batch / 1000, 10, 1)
    return PrivateStep(PlainStep(model, recipe(batch)), schedule, 1.0, RoundContext(0, 1, 1, 0), name)


def opacus(mode: str, model: nn.Module, batch: int) -> Step:
    """One of Opacus' modes, as its own engine puts it together."""
    from opacus import PrivacyEngine

    model = model.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1000, 1)), batch_size=batch)
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "poisson_sampling": False}
    engine = PrivacyEngine()
    if mode == "ghost":
        made = engine.make_private(
            module=model,
            optimizer=optimizer,
            criterion=nn.CrossEntropyLoss(),
            data_loader=data,
            grad_sample_mode="ghost",
            **options,
        )
    else:
        made = engine.make_private(
            module=model, optimizer=optimizer, data_loader=data, grad_sample_mode=mode, **options
        )
    wrapped, private = made[0], made[1]
    criterion: Any = made[2] if mode == "ghost" else F.cross_entropy
    private.expected_batch_size = batch

    def step(x: Tensor, y: Tensor) -> None:
        private.zero_grad()
        criterion(wrapped(x), y).backward()
        private.step()

    return step


def contender(name: str, model: nn.Module, batch: int) -> Step:
    if name == "plain":
        return PlainStep(model, recipe(batch))
    if name.startswith("opacus-"):
        return opacus(name.removeprefix("opacus-"), model, batch)
    return ours(name, model, batch)


def memory(field: str) -> int:
    """kB, from the kernel: VmRSS is what this process holds, VmHWM the most that it held."""
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(field)))


def measure(name: str, case: str, repeats: int, pipe: Any) -> None:
    try:
        pipe.send(compare(name, case, repeats))
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})


def compare(name: str, case: str, repeats: int) -> dict[str, float]:
    network, side, batch = case.split("-")
    prepare_for_small_networks()
    torch.manual_seed(0)
    channels = 1 if network == "cnn" else 3
    model = models.build(network, num_classes=2, in_channels=channels, image_size=int(side)).train()
    model = model.to(memory_format=torch.channels_last)
    x, y = torch.rand(int(batch), channels, int(side), int(side)), torch.randint(0, 2, (int(batch),))
    near = x.to(memory_format=torch.channels_last)
    images = x if name.startswith("opacus-") else near
    step, plain = contender(name, copy.deepcopy(model), int(batch)), PlainStep(model, recipe(int(batch)))
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    step(images, y)
    extra = memory("VmHWM") - before
    plain(near, y)
    taken: dict[str, list[float]] = {"step": [], "plain": []}
    for _ in range(repeats):
        for key, run, batch_ in (("plain", plain, near), ("step", step, images)):
            start = time.process_time()
            run(batch_, y)
            taken[key].append(time.process_time() - start)
    own, base = statistics.median(taken["step"]), statistics.median(taken["plain"])
    best = min(taken["step"]) / min(taken["plain"])
    return {
        "ms": 1e3 * own,
        "plain_ms": 1e3 * base,
        "ratio": own / base,
        "ratio_of_minima": best,
        "extra_mb": extra / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", default="cnn-28-32,cnn-28-64,resnet18-64-64", help="model-side-batch, comma-separated"
    )
    parser.add_argument("--contenders", default=",".join(("plain", *ENGINES, *OPACUS)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    table: dict[str, dict[str, Any]] = {}
    for case in args.cases.split(","):
        print(f"\n{case}\n| step | CPU ms | x plain | x plain (minima) | extra MB |\n|---|---|---|---|---|", flush=True)
        for name in args.contenders.split(","):
            ours_end, theirs = context.Pipe()
            process = context.Process(target=measure, args=(name, case, args.repeats, theirs))
            process.start()
            theirs.close()
            try:
                row = ours_end.recv()
            except EOFError:
                row = {"error": "its process died"}
            process.join()
            table.setdefault(case, {})[name] = row
            if "error" in row:
                print(f"| {name} | {row['error']} | | | |", flush=True)
                continue
            cells = f"{row['ms']:.1f} | {row['ratio']:.2f} | {row['ratio_of_minima']:.2f} | {row['extra_mb']:.0f}"
            print(f"| {name} | {cells} |", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
