"""What do BatchNorm's statistics give away? One victim in three modes, attacked with each kind of moments.

    OMP_NUM_THREADS=1 python -m experiments.benchmarks.batchnorm --batches 1,4,8 --budget 8

The victim computes in evaluation mode, in train mode with statistics that stay at home, or in train mode with
statistics that travel; its upload is made by the code of a federated round. Each is attacked with no moments, with the
broadcast running ones and with inferred ones; where that would not be honest the row says why it was refused. Images
are the first of L32 of the specification; labels are recovered. CPU seconds, one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from fedsec.attacks.gradinversion.auto import METHODS, reconstruct
from fedsec.attacks.gradinversion.batch_statistics import used_by
from fedsec.attacks.gradinversion.observation import observe
from fedsec.attacks.gradinversion.prior import Prior
from fedsec.attacks.gradinversion.settings import BatchStatistics, Method, Settings
from rich.console import Console
from rich.table import Table
from torch import nn

from fedsec import models
from fedsec.machine import prepare_for_small_networks
from tests.attacks.gradinversion import cases
from tests.attacks.gradinversion.clients import view_of_round

from . import victims
from .gradinversion import refuse_threads
from .tracing import batch_psnr

Mode = Literal["eval", "train", "train+shared"]
MODES: tuple[Mode, ...] = ("eval", "train", "train+shared")
TERMS: tuple[BatchStatistics, ...] = ("none", "running", "inferred")


@dataclass(frozen=True)
class Row:
    """One attack on one batch."""

    batch: int
    mode: Mode
    bn: str
    """Moments that were asked for."""
    used: str
    """Statistics that the attack ran on, as stamped."""
    method: str
    psnr: float | None
    """dB of the batch's mean squared error; None: refused."""
    prior_psnr: float
    labels_right: float
    """Share of the multiset of labels."""
    seconds: float
    refused: str = ""


def network(name: str, data: victims.XRays, steps: int) -> nn.Module:
    """The broadcast model: `steps` steps of Adam at 1e-3 on batches of 64, order from a generator seeded 0."""
    size = data.images.shape[-1]
    if name == "convnet":
        model: nn.Module = cases.convnet(data.images.shape[-1])
    else:
        model = models.build(name, num_classes=2, in_channels=1, image_size=size, seed=0, norm="batch")
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-3)
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    for rows in order[: 64 * steps].split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.images[rows]), data.labels[rows]).backward()
        optimizer.step()
    return model.eval()


def attack(
    model: nn.Module, data: victims.XRays, prior: Prior, batch: int, mode: Mode, bn: BatchStatistics, settings: Settings
) -> Row:
    """One row of the table."""
    rows = list(data.attacked[:batch])
    x, y = data.images[rows], data.labels[rows]
    computed: Literal["train", "eval"] = "eval" if mode == "eval" else "train"
    view = view_of_round(model, x, y, cases.recipe(lr=0.1, mode=computed), shared=mode != "train")
    shape = cast("tuple[int, int, int]", tuple(x.shape[1:]))
    found = reconstruct(observe(view, model, prior, shape), settings, torch.Generator().manual_seed(1))
    refused = found.not_applicable.get("bn_prior", "")
    wanted, offered = (torch.bincount(labels, minlength=2) for labels in (y, found.labels))
    return Row(
        batch=batch,
        mode=mode,
        bn=bn,
        used=used_by(view, model, computed, bn),
        method=found.method,
        psnr=None if refused and settings.method != "auto" else batch_psnr(found.images, x, prior.mean),
        prior_psnr=batch_psnr(prior.mean.expand_as(x), x, prior.mean),
        labels_right=float(torch.minimum(wanted, offered).sum()) / batch,
        seconds=found.seconds,
        refused=refused,
    )


def run(words: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    data = victims.load(words.data)
    prior, model = victims.prior_of(data), network(words.network, data, words.steps)
    for batch in (int(b) for b in words.batches.split(",")):
        for mode in MODES:
            for bn in TERMS:
                settings = Settings(
                    method=words.method, restarts=words.restarts, budget_s=words.budget, bn=bn, clock=words.clock
                )
                yield attack(model, data, prior, batch, mode, bn, settings)


def show(rows: Sequence[Row]) -> None:
    """The table, on standard output."""
    table = Table("B", "victim", "bn", "statistics used", "by", "PSNR dB", "public mean", "labels", "CPU s", "refused")
    for row in rows:
        psnr = "–" if row.psnr is None else f"{row.psnr:.1f}"
        cells = [str(row.batch), row.mode, row.bn, row.used, row.method, psnr, f"{row.prior_psnr:.1f}"]
        table.add_row(*cells, f"{row.labels_right:.0%}", f"{row.seconds:.1f}", row.refused)
    Console(width=170).print(table)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cnn", help="a network of fedsec with BatchNorm, or convnet")
    parser.add_argument("--data", default="pneumoniamnist", choices=("pneumoniamnist", "kermany_64"))
    parser.add_argument("--steps", type=int, default=30, help="training steps before the broadcast; 0: untrained")
    parser.add_argument("--batches", default="1,4,8")
    parser.add_argument("--method", default="bn_prior", choices=tuple(METHODS), type=lambda m: cast(Method, m))
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--budget", type=float, default=8.0, help="CPU seconds an attack")
    parser.add_argument("--clock", choices=("cpu", "work"), default="cpu", help="work: counted, for a busy machine")
    parser.add_argument("--json", action="store_true", help="the result alone, machine-readable")
    words = parser.parse_args(arguments)
    prepare_for_small_networks()
    refuse_threads()
    rows = list(run(words))
    result = {"asked": vars(words), "rows": [asdict(row) for row in rows]}
    if words.json:
        print(json.dumps(result, indent=1))
    else:
        show(rows)
    return result


if __name__ == "__main__":
    main()
