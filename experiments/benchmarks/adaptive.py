"""What is a defense worth against an attacker who knows it, and what would an ignorant one have made us believe?

    OMP_NUM_THREADS=1 FEDSEC_DATA=… python -m experiments.benchmarks.adaptive --images 4

One image behind one step of SGD (four clients of one image each for the sum), on the LeNet of the specification,
untrained and trained. Every upload runs through the defense's own hooks and the code of a round. Both attackers use the
same method, labels, seed and budget; the naive one takes the update for a clean, dense gradient. `broken`: the adaptive
one's images are better than the public image most alike, chosen with the truth. `held` means no more than that this
attack, with this budget, obtained less.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from fedsec.attacks.gradinversion import GradInversion
from fedsec.defenses.representation import drawing
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fedsec import plugins
from fedsec.defense import Defense
from fedsec.findings import PublicData, Reconstruction
from fedsec.machine import prepare_for_small_networks
from fedsec.metrics.image import match, mse, nearest_public_psnr, to_psnr
from fedsec.types import RoundContext, Update
from tests.attacks.gradinversion import cases, defended

from . import victims

RECIPE = cases.recipe(batch_size=1)
TRAINING = cases.recipe(batch_size=32, epochs=3, steps=None)
"""What DP-SGD's budget is calibrated on: 10 rounds of 3 epochs at a hospital of 471 images."""
CLIENTS_IN_SUM = 4
AUTO = ("sum", "precode")
"""Rows that use `auto`: several images are too many for the explicit method, and one image in front of a bottleneck has
a closed form."""


@dataclass(frozen=True)
class HiddenLargest(Defense):
    """Selective encryption: the largest entries of an update travel encrypted, and the server sees zeros for them."""

    name: ClassVar[str] = "hidden-largest"
    protects: ClassVar[str] = "the largest entries"
    fraction: float = 0.1

    def on_upload(self, update: Update, ctx: RoundContext) -> Update:
        hidden = update.delta.abs().topk(round(self.fraction * update.delta.numel())).indices
        return replace(update, delta=update.delta.index_fill(0, hidden, 0.0))

    def public_knowledge(self, client: int) -> Mapping[str, Any]:
        return {"sparse": True}


def stacks(norm: float, size: int) -> dict[str, tuple[Defense, ...]]:
    """Row -> defenses.

    Args:
        norm: of a typical public image's gradient, which noise and clipping are measured in.
        size: of the gradient.
    """
    per_entry = norm / size**0.5
    words = {
        "none": "none",
        "clip only, 1/2 norm": f"gaussian:sigma=0,clip={norm / 2:g}",
        "gaussian, 0.1 norm": f"gaussian:sigma={0.1 * per_entry:g}",
        "gaussian, 1 norm": f"gaussian:sigma={per_entry:g}",
        "laplace, 0.1 norm": f"laplace:sigma={0.1 * per_entry:g}",
        "dp, epsilon 8": "dp:epsilon=8",
        "top-k 10 %": "topk:fraction=0.1",
        "top-k 1 %": "topk:fraction=0.01",
        "int8": "int8",
        "int8, stochastic": "int8:stochastic=true",
        "int4": "int8:bits=4",
        "soteria 40 %": "soteria",
        "precode": "precode",
        f"sum of {CLIENTS_IN_SUM} clients": "none",
    }
    found = {row: build(word) for row, word in words.items()}
    return found | {f"largest {f:.0%} hidden": (HiddenLargest(f),) for f in (0.1, 0.5)}


def build(word: str) -> tuple[Defense, ...]:
    """The defenses that a command line would name."""
    return tuple(plugins.build("defenses", spec) for spec in plugins.parse_stack(word))


def model_of(defenses: Sequence[Defense], data: victims.XRays, *, trained: bool) -> nn.Module:
    """The network as the defenses want it; what draws at random does so in its training as well."""
    model = defended.prepared(cases.lenet(), defenses)
    if trained:
        with drawing(model, torch.Generator().manual_seed(0)):
            cases.train(model, data.images, data.labels)  # type: ignore[arg-type]
    return model.eval()


def typical_norm(model: nn.Module, public: PublicData, count: int = 32) -> float:
    """Median norm of single public images' gradients."""
    norms = [victims.loss_and_norm(model, public.images[i : i + 1], public.labels[i : i + 1])[1] for i in range(count)]
    return float(torch.tensor(norms).median())


def measure(
    row: str,
    defenses: Sequence[Defense],
    model: nn.Module,
    data: victims.XRays,
    rows: Sequence[int],
    attack: GradInversion,
) -> dict[str, Any]:
    """Both attackers on every victim of one row of the table."""
    clients = CLIENTS_IN_SUM if row.startswith("sum") else 1
    table = defended.seats_of(model, defenses, RECIPE, training=TRAINING, clients=clients, hidden=clients > 1)
    groups = [list(rows[i : i + clients]) for i in range(0, max(1, len(rows) - clients + 1), clients)]
    views = []
    for number, group in enumerate(groups):
        batches = [(data.images[[i]], data.labels[[i]]) for i in group]
        views.append(defended.view_of(table, batches, seed=number))
    attack = replace(attack, method="auto") if row.startswith(AUTO) else attack
    started = time.process_time()
    found = attack.conclude(cases.target_of(model, tuple(views), data.public))
    truths = [data.images[group] for group in groups]
    known, naive = (score(items, truths) for items in (found.reconstructions, found.naive))
    truth = torch.cat(truths)
    nearest = float(to_psnr((10 ** (-nearest_public_psnr(truth, data.public.images) / 10)).mean()))
    return {
        "defense": row,
        "images": len(truth),
        "adaptive": known,
        "naive": naive,
        "gap": known - naive,
        "prior": float(to_psnr(mse(data.public.images.mean(0).expand_as(truth), truth).mean())),
        "nearest_public": nearest,
        "verdict": "broken" if known > nearest else "held",
        "certified": sum(item.certified for item in found.reconstructions),
        "methods": sorted({item.method for item in found.reconstructions}),
        "knowledge": found.assumptions["adaptive"],
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def rows_of(row: str, images: int) -> list[int]:
    """The X-rays that are attacked; at least one for each client of a sum."""
    return cases.N12[: max(images, CLIENTS_IN_SUM) if row.startswith("sum") else images]


def score(found: Sequence[Reconstruction], truths: Sequence[Tensor]) -> float:
    """PSNR in dB of the mean squared error over all images, each matched within its batch."""
    errors = []
    for item, truth in zip(found, truths, strict=True):
        order = match(item.images, truth)
        errors += [mse(item.images[k][None], x[None]) for k, x in zip(order, truth, strict=True) if k is not None]
    return float(to_psnr(torch.cat(errors).mean()))


HEADINGS = ("defense", "state", "images", "adaptive", "naive", "gap", "verdict", "proven", "by", "CPU s")


def show(results: Sequence[dict[str, Any]]) -> None:
    """The table, on standard output."""
    table = Table(*HEADINGS, title="PSNR in dB of the mean squared error")
    for r in results:
        numbers = (f"{r[key]:.1f}" for key in ("adaptive", "naive", "gap"))
        proven, by = f"{r['certified']}/{r['images']}", ", ".join(r["methods"])
        table.add_row(
            r["defense"], r["state"], str(r["images"]), *numbers, r["verdict"], proven, by, str(r["cpu_seconds"])
        )
    console = Console(width=150)
    console.print(table)
    first = results[0]
    console.print(f"public mean {first['prior']:.1f} dB, nearest public image {first['nearest_public']:.1f} dB")


def main(words: Sequence[str] | None = None) -> None:
    """Measure all rows, or those whose name contains a word of `--only`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=4, help="victims; 12 at most")
    parser.add_argument("--state", choices=["untrained", "trained", "both"], default="both")
    parser.add_argument("--only", default="", help="comma-separated parts of row names")
    parser.add_argument("--method", default="map_gauss_newton", help="of both attackers; auto for sums and precode")
    parser.add_argument("--budget", type=float, default=30.0, help="CPU seconds for each victim and attacker")
    parser.add_argument("--clock", choices=("cpu", "work"), default="cpu", help="work: counted, for a busy machine")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(words)
    prepare_for_small_networks()
    data = victims.load("pneumoniamnist")
    victims.check("lenet", data)
    attack = GradInversion(method=args.method, adaptive="both", budget_s=args.budget, clock=args.clock)
    wanted = [part for part in args.only.split(",") if part]
    results: list[dict[str, Any]] = []
    for state in ("untrained", "trained") if args.state == "both" else (args.state,):
        plain = model_of((), data, trained=state == "trained")
        size = sum(p.numel() for p in plain.parameters())
        for row, defenses in stacks(typical_norm(plain, data.public), size).items():
            if wanted and not any(part in row for part in wanted):
                continue
            model = defended.prepared(plain, defenses)
            if model.state_dict().keys() != plain.state_dict().keys():  # new layers are to be trained, too
                model = model_of(defenses, data, trained=state == "trained")
            results.append(measure(row, defenses, model, data, rows_of(row, args.images), attack) | {"state": state})
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    main()
