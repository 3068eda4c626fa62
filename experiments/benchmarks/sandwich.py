"""How far from the bound does an attack on a noisy upload end? Measured PSNR beside the Bayesian Cramér–Rao indicator.

    OMP_NUM_THREADS=1 python -m experiments.benchmarks.sandwich --images 20 --budget 8

LeNet, one image, Gaussian noise of a share of the gradient's norm. The gap is that of the mean squared errors over all
images; single images may beat the indicator, so the share within 4 dB of their own stands beside it.
Goal G4 of the specification: gap at most 2 dB, 80 % of the images within 4 dB.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from fedsec.attacks.gradinversion.auto import reconstruct
from fedsec.attacks.gradinversion.bound import bound
from fedsec.attacks.gradinversion.observation import observe
from fedsec.attacks.gradinversion.settings import Settings
from rich.console import Console
from rich.table import Table

from fedsec.machine import prepare_for_small_networks

from . import victims
from .gradinversion import refuse_threads


@dataclass(frozen=True)
class Row:
    """All images at one noise level."""

    state: str
    noise: float
    labels: str
    psnr: float
    """Of the mean squared error, dB."""
    bound: float
    gap: float
    within: float
    """Share of images at most 4 dB below their own bound."""
    prior: float
    labels_right: float
    cpu_seconds: float
    """Mean of an image."""


def decibel(mse: float) -> float:
    """PSNR of pixels in [0, 1]."""
    return -10 * math.log10(max(mse, 1e-14))


def measure(state: str, noise: float, told: bool, words: argparse.Namespace, data: victims.XRays) -> Row:
    """One row."""
    case = victims.Case.parse(f"lenet-b1@{noise:g}")
    prior = victims.prior_of(data)
    model = victims.build(case, data, trained=state == "trained", keep=words.keep)
    errors, bounds, means, right, seconds = [], [], [], 0, 0.0
    for number, rows in enumerate(victims.rows_of(case, data, words.images)):
        victim = victims.victim(case, model, data, rows, number, told=told)
        shape = (1, *victim.images.shape[2:])
        observation = observe(victim.view, model, prior, shape)
        settings = Settings(budget_s=words.budget, clock=words.clock)
        done = reconstruct(observation, settings, torch.Generator().manual_seed(1))
        found = bound(observation, victim.images, victim.labels)
        assert found is not None  # the case has noise
        errors.append(float((done.images - victim.images).square().mean()))
        bounds.append(found.mse)
        means.append(float((prior.mean - victim.images).square().mean()))
        right += int(bool((done.labels == victim.labels).all()))
        seconds += done.seconds
    count = len(errors)
    psnr, limit = decibel(sum(errors) / count), decibel(sum(bounds) / count)
    within = sum(decibel(e) >= decibel(b) - 4 for e, b in zip(errors, bounds, strict=True)) / count
    kind = "told" if told else "recovered"
    prior_psnr = decibel(sum(means) / count)
    return Row(state, noise, kind, psnr, limit, limit - psnr, within, prior_psnr, right / count, seconds / count)


def show(rows: Sequence[Row]) -> None:
    """The table, on standard output."""
    table = Table(
        "victim", "noise / norm", "labels", "PSNR dB", "bound", "gap", "within 4 dB", "mean", "right", "CPU s"
    )
    for r in rows:
        numbers = [f"{v:.1f}" for v in (r.psnr, r.bound, r.gap)]
        table.add_row(r.state, f"{r.noise:g}", r.labels, *numbers, f"{r.within:.0%}", f"{r.prior:.1f}",
                      f"{r.labels_right:.0%}", f"{r.cpu_seconds:.1f}")  # fmt: skip
    Console(width=140).print(table)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--noise", default="0.01,0.1,0.3,1", help="shares of the gradient's norm (%(default)s)")
    parser.add_argument("--states", default="untrained,trained")
    parser.add_argument("--labels", default="recovered", help="recovered, told, or both joined by a comma")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds for each image")
    parser.add_argument("--clock", choices=("cpu", "work"), default="cpu", help="work: counted, for a busy machine")
    parser.add_argument("--keep", type=Path, default=Path("runs/benchmark"), help="folder for the trained victim")
    parser.add_argument("--json", type=Path, dest="json_file")
    words = parser.parse_args(arguments)
    prepare_for_small_networks()
    refuse_threads()
    data = victims.load("pneumoniamnist")
    victims.check("lenet", data)
    rows = []
    for state in words.states.split(","):
        for noise in map(float, words.noise.split(",")):
            for kind in words.labels.split(","):
                rows.append(measure(state, noise, kind == "told", words, data))
                print(json.dumps(asdict(rows[-1])), flush=True)
    show(rows)
    if words.json_file:
        words.json_file.write_text(json.dumps([asdict(r) for r in rows], indent=1))
    return rows


if __name__ == "__main__":
    main()
