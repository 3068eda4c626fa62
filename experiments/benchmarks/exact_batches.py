"""How many images of a batch does `peel`, then `spear`, prove exact in front of a fully connected layer with ReLU?

    FEDSEC_DATA=... OMP_NUM_THREADS=1 python -m experiments.benchmarks.exact_batches --draws 20 --json batches.json

Goal G2 of the specification of gradient inversion. The network is the specification's MLP on PneumoniaMNIST, untrained
and after 3 epochs of Adam; draw k takes B training images with a generator seeded 1000 + k, whatever their class. The
gradient is the one that torch computes (`exact`), or comes from a real step of SGD at a rate, whose stored parameters
round it. CPU seconds of one thread after a warm-up, from the observation to the proof; PSNR is capped at 140 dB.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from fedsec.attacks.gradinversion.candidate import NotApplicable
from fedsec.attacks.gradinversion.clock import Clock
from fedsec.attacks.gradinversion.deflation import Proof
from fedsec.attacks.gradinversion.observation import Observation, observe
from fedsec.attacks.gradinversion.peel import peel
from fedsec.attacks.gradinversion.prior import Prior
from fedsec.attacks.gradinversion.relu_layer import find_relu_layer
from fedsec.attacks.gradinversion.spear import spear
from fedsec.attacks.gradinversion.trace import trace
from torch import Tensor, nn

from tests.attacks.gradinversion import batches, cases

CHECK = (0.644686, 3.762896)
"""Loss and gradient norm of the untrained network on image 872: specification, section 6.1."""
SIZES = {"untrained": (8, 16, 32), "trained": (8, 16)}
EXACT_DB = 50.0


@dataclass(frozen=True)
class Row:
    """All draws of one victim, batch size and rate."""

    state: str
    rate: str
    batch: int
    draws: int
    whole: int
    """Draws in which every image is proven."""
    proven: float
    """Share of all images."""
    exact: float
    """Share of all images at 50 dB or more, proven or not."""
    lowest: float
    """PSNR of the worst proven image."""
    overestimate: float
    """Estimated less true PSNR of the proven images, at most."""
    seconds: float
    seconds_most: float


def attack(observation: Observation, seconds: float) -> Proof:
    """Peel, then spear for what is left."""
    layer = find_relu_layer(observation, trace(observation.simulation.model, observation.prior.mean[None].clone()))
    proof = peel(layer, Clock(seconds))
    if proof.known.complete and bool(proof.proven.all()):
        return proof
    public = observation.prior.images.double().flatten(1) * layer.gain + layer.shift
    try:
        return spear(proof, Clock(seconds), torch.Generator().manual_seed(0), public)
    except NotApplicable:
        return proof


def observed(model: nn.Module, x: Tensor, y: Tensor, prior: Prior, rate: str) -> Observation:
    """What the server makes of one gradient or one step."""
    if rate == "exact":
        return batches.observed(model, x, y, prior)
    plan = cases.recipe(lr=float(rate))
    view = cases.view_of(model, cases.upload(model, x, y, plan), len(x), plan)
    return observe(view, model, prior, tuple(x.shape[1:]))


def measure(
    state: str, model: nn.Module, data: tuple[Tensor, Tensor], prior: Prior, rate: str, batch: int, draws: int
) -> Row:
    """Attack all draws."""
    counts, good, values, over, times = [], 0, [140.0], [0.0], []
    for draw in range(-1, draws):  # the first is a warm-up
        rows = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(1000 + draw))[:batch]
        x, y = data[0][rows], data[1][rows]
        observation = observed(model, x, y, prior, rate)
        start = time.process_time()
        proof = attack(observation, 2.0)
        if draw < 0:
            continue
        times.append(time.process_time() - start)
        value, which = batches.scores(proof, x)
        sure = proof.proven
        counts.append(len(set(which[sure].tolist())))
        good += len(set(which[value >= EXACT_DB].tolist()))
        values += value[sure].tolist()
        over += (proof.decibel[sure].clamp(max=140) - value[sure]).tolist()
    images = draws * batch
    whole = sum(c == batch for c in counts)
    seconds = statistics.median(times), max(times)
    return Row(state, rate, batch, draws, whole, sum(counts) / images, good / images, min(values), max(over), *seconds)


def show(rows: Sequence[Row]) -> None:
    """One line a row."""
    print("victim     rate     B  draws  whole  proven  >=50 dB  lowest dB  overestimate  CPU s  most")
    for r in rows:
        print(
            f"{r.state:<10} {r.rate:<6} {r.batch:>3} {r.draws:>6} {r.whole:>6} {r.proven:>7.1%} {r.exact:>8.1%}"
            f" {r.lowest:>10.0f} {r.overestimate:>13.0f} {r.seconds:>6.2f} {r.seconds_most:>5.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--rates", default="exact,1,0.02", help="exact, or rates of one step of SGD (%(default)s)")
    parser.add_argument("--states", default="untrained,trained")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = cases.load(Path(os.environ["FEDSEC_DATA"]))
    prior = cases.prior_of(cases.public_of(*data))
    untrained = cases.mlp().eval()
    row = cases.L32[:1]
    loss = float(nn.functional.cross_entropy(untrained(data[0][row]), data[1][row]).detach())
    norm = float(batches.gradient(untrained, data[0][row], data[1][row]).norm())
    print(f"image 872: loss {loss:.6f}, gradient norm {norm:.6f}; the specification has {CHECK[0]} and {CHECK[1]}")
    models = {"untrained": untrained, "trained": cases.train(cases.mlp(), *data)}
    rows = [
        measure(state, models[state], data, prior, rate, batch, arguments.draws)
        for state in arguments.states.split(",")
        for rate in arguments.rates.split(",")
        for batch in SIZES[state]
    ]
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))


if __name__ == "__main__":
    main()
