"""How many diagnoses of a batch does its update give away? Counts by `mean` and by `posterior`, and the 95 % set.

    FEDSEC_DATA=... python experiments/benchmarks/labels.py --batches 100
    FEDSEC_DATA=... python experiments/benchmarks/labels.py --sizes 8,10 --local-batch 4 --epochs 2 --lr 0.02

Batches follow the class mix of PneumoniaMNIST's training images that are not public; the update is that of torch's SGD.
Beside each line the shares that the specification gives for exactly right counts, where it has the setting.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fedsec.attacks.gradinversion.label_counts import COVERAGE
from fedsec.attacks.gradinversion.label_evidence import bias_evidence
from fedsec.attacks.gradinversion.labels import credible_set, find_head, mean_counts
from fedsec.attacks.gradinversion.observation import observe
from torch import nn

from experiments.benchmarks import victims
from fedsec.types import LocalRecipe
from tests.attacks.gradinversion import cases

SPECIFIED = {
    ("lenet", False): {4: 1.00, 8: 1.00, 16: 0.98, 32: 0.91},
    ("mlp", False): {4: 1.00, 8: 1.00, 16: 1.00, 32: 1.00},
    ("lenet", True): {4: 0.46, 8: 0.36, 16: 0.27, 32: 0.24},
    ("mlp", True): {4: 0.48, 8: 0.17, 16: 0.18, 32: 0.18},
}
"""Specification of gradient inversion, section 2.1: share of exactly right counts."""
FIRST_PRIVATE = 2100
"""Rows from here on are not public."""


def measure(
    model: nn.Module, data: victims.XRays, size: int, recipe: LocalRecipe, batches: int, seed: int
) -> dict[str, Any]:
    """Exact-count rates, coverage and size of the 95 % set, and CPU seconds a batch."""
    generator, prior = torch.Generator().manual_seed(seed), victims.prior_of(data)
    mean = first = covered = members = 0
    seconds = 0.0
    for _ in range(batches):
        rows = torch.randperm(len(data.images) - FIRST_PRIVATE, generator=generator)[:size] + FIRST_PRIVATE
        x, y = data.images[rows], data.labels[rows]
        order = torch.cat([torch.randperm(size, generator=generator) for _ in range(recipe.epochs or 1)])
        delta = local_update(model, x, y, order, recipe)
        steps = (recipe.epochs or 1) * -(-size // recipe.batch_size)
        view = cases.view_of(model, delta, size, replace(recipe, steps=steps, epochs=None))
        began = time.process_time()
        observation = observe(view, model, prior, tuple(x.shape[1:]))
        bias = find_head(observation).bias
        assert bias is not None
        evidence = bias_evidence(observation, bias)
        chosen = credible_set(observation, evidence, bias, generator)
        truth = torch.bincount(y, minlength=len(evidence.total)).tolist()
        mean += mean_counts(observation, evidence) == truth
        seconds += time.process_time() - began
        first += chosen[0][1] == truth
        covered += truth in [counts for _, counts in chosen]
        members += len(chosen)
    share = {"mean": mean, "posterior": first, "covered": covered, "set_size": members, "cpu_seconds": seconds}
    return {key: round(value / batches, 3) for key, value in share.items()}


def local_update(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, order: torch.Tensor, recipe: LocalRecipe
) -> torch.Tensor:
    """The update of a client that walks through its images in this order, epoch after epoch."""
    client = copy.deepcopy(model)
    optimizer = torch.optim.SGD(client.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    for epoch in order.split(len(x)):
        for rows in epoch.split(recipe.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(client(x[rows]), y[rows]).backward()
            optimizer.step()
    pairs = zip(client.parameters(), model.parameters(), strict=True)
    return torch.cat([(a.detach() - b.detach()).reshape(-1) for a, b in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="lenet,mlp")
    parser.add_argument("--sizes", default="4,8,16,32", help="images in a batch")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--local-batch", type=int, default=None, help="images in a local step; all of them by default")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=None, help="folder for trained networks")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, lines = victims.load("pneumoniamnist"), []
    for network in args.networks.split(","):
        for trained in (False, True):
            model = victims.build(victims.Case.parse(f"{network}-b4"), data, trained=trained, keep=args.keep)
            for size in map(int, args.sizes.split(",")):
                recipe = cases.recipe(
                    lr=args.lr,
                    momentum=args.momentum,
                    steps=None,
                    epochs=args.epochs,
                    batch_size=min(args.local_batch or size, size),
                )
                found = measure(model, data, size, recipe, args.batches, args.seed)
                single = recipe.batch_size == size and args.epochs == 1
                wanted = SPECIFIED[network, trained].get(size) if single else None
                line = {"network": network, "trained": trained, "batch": size, **found, "specified": wanted}
                lines.append(line)
                print("  ".join(f"{k} {v}" for k, v in line.items()), flush=True)
    print(f"covered: share of {args.batches} batches whose true counts are in the set of {COVERAGE:.0%}")
    if args.json:
        args.json.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "lines": lines}))


if __name__ == "__main__":
    main()
