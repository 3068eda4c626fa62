"""How far does averaging over several local steps protect images? One image, and four in mini-batches of two.

    FEDSEC_DATA=... python experiments/benchmarks/fedavg.py --part one --rates 0.02,0.1 --steps 1,2,4,8
    FEDSEC_DATA=... python experiments/benchmarks/fedavg.py --part four --rates 0.002,0.02 --budget 60

The update is that of torch's SGD in an order that the attack is not told. Labels are given, so that the numbers are
about images. Beside each line what the public mean scores.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from fedsec.attacks.gradinversion.auto import reconstruct
from fedsec.attacks.gradinversion.observation import observe
from fedsec.attacks.gradinversion.settings import Settings
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from experiments.benchmarks import victims
from experiments.benchmarks.labels import FIRST_PRIVATE, local_update
from tests.attacks.gradinversion import cases


def decibels(images: Tensor, truth: Tensor) -> list[float]:
    """PSNR of each image after the best matching."""
    cost = ((images.flatten(1)[:, None] - truth.flatten(1)[None]) ** 2).mean(2)
    rows, columns = linear_sum_assignment(cost.numpy())
    return [round(cases.psnr(images[r], truth[c]), 1) for r, c in zip(rows, columns, strict=True)]


def attack(
    model: nn.Module, data: victims.XRays, rows: list[int], rate: float, epochs: int, size: int, budget: float
) -> str:
    """One line on one victim."""
    x, y, prior = data.images[rows], data.labels[rows], victims.prior_of(data)
    generator = torch.Generator().manual_seed(9)
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])
    recipe = cases.recipe(lr=rate, steps=None, epochs=epochs, batch_size=size)
    delta = local_update(model, x, y, order, recipe)
    plan = replace(recipe, steps=epochs * -(-len(rows) // size), epochs=None)
    observation = observe(cases.view_of(model, delta, len(rows), plan, oracle=y), model, prior, tuple(x.shape[1:]))
    began = time.process_time()
    found = reconstruct(observation, Settings(budget_s=budget), torch.Generator().manual_seed(1))
    spent, mean = time.process_time() - began, prior.mean.expand(len(rows), -1, -1, -1)
    own = None if found.est_psnr is None else round(found.est_psnr, 1)
    return (
        f"{found.method} {decibels(found.images, x)} dB, estimated {own}, certified {found.certified}, "
        f"residual {found.residual:.1e}, {spent:.1f} CPU s; public mean {decibels(mean, x)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("one", "four"), default="one")
    parser.add_argument("--rates", default="0.02,0.1")
    parser.add_argument("--steps", default="1,2,4,8", help="steps on one image, or epochs on four")
    parser.add_argument("--victims", type=int, default=3)
    parser.add_argument("--budget", type=float, default=20.0)
    parser.add_argument("--states", default="untrained,trained")
    parser.add_argument("--keep", type=Path, default=None, help="folder for trained networks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = victims.load("pneumoniamnist")
    draw = torch.randperm(len(data.images) - FIRST_PRIVATE, generator=torch.Generator().manual_seed(5)) + FIRST_PRIVATE
    for state in args.states.split(","):
        model = victims.build(victims.Case.parse("lenet-b1"), data, trained=state == "trained", keep=args.keep)
        for rate in map(float, args.rates.split(",")):
            for steps in map(int, args.steps.split(",")):
                for number in range(args.victims):
                    one = args.part == "one"
                    rows = [cases.E20[number]] if one else draw[4 * number : 4 * number + 4].tolist()
                    line = attack(model, data, rows, rate, steps, 1 if one else 2, args.budget)
                    print(f"{state} rate {rate:g} {'steps' if one else 'epochs'} {steps}: {line}", flush=True)


if __name__ == "__main__":
    main()
