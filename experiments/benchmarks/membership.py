"""Membership inference on the recipe of the specification, target by target, beside ART's black-box attack.

PneumoniaMNIST, official training and validation images; a net of 105,346 parameters; SGD 0.05, momentum 0.9, batch 64,
30 epochs; every model on 1,872 images. Each of 34 models is target once, at most; its shadows are pairs of the others.

    python experiments/benchmarks/membership.py --targets 8
    python experiments/benchmarks/membership.py --targets 8 --art     (needs adversarial-robustness-toolbox)

Prints, for each attack, the mean over targets of AUC and TPR at 1 % FPR with a bootstrap interval over targets, the TPR
at 0.1 % FPR pooled over targets, and CPU seconds.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsec import data
from fedsec.federation.local import PlainStep, train_locally
from fedsec.federation.shadows import halves
from fedsec.machine import prepare_for_small_networks
from fedsec.metrics.classification import auc_binary
from fedsec.metrics.membership import threshold_at
from fedsec.metrics.signals import logits_of, signals
from fedsec.types import LocalRecipe, RoundContext

scores = importlib.import_module("fedsec.attacks.membership.scores")
MEMBERS, POPULATION = 1872, 624
RECIPE = LocalRecipe("binary", 2, lr=0.05, momentum=0.9, weight_decay=0.0, batch_size=64, epochs=30, steps=None)


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 2),
        )  # fmt: skip


def trained(x: Tensor, y: Tensor, rows: np.ndarray, seed: int, keep: Path | None) -> nn.Module:
    model = net(seed)
    path = keep / f"{seed}.pt" if keep else None
    if path and path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    step = PlainStep(model, RECIPE)
    train_locally(step, x[rows], y[rows], RECIPE, RoundContext(seed, 1, 1, 0))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model


def images() -> tuple[Tensor, Tensor]:
    """Training and validation images once each, in [-0.5, 0.5]: pool first, then the population."""
    dataset = data.load("pneumoniamnist")
    rows = np.concatenate([dataset.rows(split="train"), dataset.rows(split="val")])
    x, y = dataset.batch(rows)
    _, first = np.unique(x.flatten(1).numpy(), axis=0, return_index=True)
    order = np.random.default_rng(0).permutation(np.sort(first))[: 2 * MEMBERS + POPULATION]
    return x[order] - 0.5, y[order]


def art_scores(model: nn.Module, x: Tensor, y: Tensor, member: np.ndarray) -> np.ndarray:
    """ART's black-box attack with its own network, fitted on half of the true memberships, as it asks for."""
    from art.attacks.inference.membership_inference import MembershipInferenceBlackBox
    from art.estimators.classification import PyTorchClassifier

    victim = PyTorchClassifier(model, nn.CrossEntropyLoss(), x.shape[1:], 2)
    attack = MembershipInferenceBlackBox(victim, attack_model_type="nn")
    draw = np.random.default_rng(0).permutation(len(x))
    fit, test = np.array_split(draw, 2)
    inside, outside = (fit[member[fit] == side] for side in (True, False))
    a, b = x.numpy().astype(np.float32), y.numpy()
    attack.fit(a[inside], b[inside], a[outside], b[outside])
    found = np.full(len(x), np.nan)
    found[test] = np.asarray(attack.infer(a[test], b[test], probabilities=True)).reshape(len(test), -1)[:, -1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--shadows", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="folder for trained models")
    parser.add_argument("--art", action="store_true")
    args = parser.parse_args()
    prepare_for_small_networks()
    x, y = images()
    pool, z = slice(0, 2 * MEMBERS), slice(2 * MEMBERS, None)
    count = args.targets + args.targets % 2 + args.shadows
    contains = halves(np.arange(2 * MEMBERS).astype(str), count, seed=0)
    start = time.process_time()
    answers = []
    for number in range(count):
        model = trained(x, y, np.flatnonzero(contains[number]), number, args.keep)
        answers.append((model, signals(logits_of(model, x), y.numpy(), "binary")))
    print(f"{count} models: {time.process_time() - start:.1f} CPU s")
    rows: dict[str, list[tuple[float, float]]] = {}
    pooled: dict[str, list[int]] = {}
    for target in range(args.targets):
        # Shadows: the next complete pairs that do not hold the target or its complement.
        pairs = [p for p in range(count // 2) if p != target // 2]
        chosen = [2 * p + side for p in pairs[: args.shadows // 2] for side in (0, 1)]
        own, member = answers[target][1], contains[target]
        phi, log_p = (np.stack([getattr(answers[k][1], key) for k in chosen]) for key in ("phi", "log_p"))
        mask = contains[chosen]
        ratios: Any = (own.log_p[pool], log_p[:, pool], own.log_p[z], log_p[:, z], mask)
        begun = time.process_time()
        found = {
            "loss": scores.loss(own.log_p[pool]),
            "lira": scores.lira(own.phi[pool], phi[:, pool], mask),
            "lira_offline": scores.lira_offline(own.phi[pool], phi[:, pool], mask),
            "rmia": scores.rmia(*ratios),
            "rmia_offline": scores.rmia_offline(*ratios),
        }
        spent = time.process_time() - begun
        if args.art:
            found["ART black box"] = art_scores(answers[target][0], x[pool], y[pool], member)
        for name, score in found.items():
            ok = ~np.isnan(score)
            inside, outside = score[ok & member], score[ok & ~member]
            tpr = float((inside > threshold_at(outside, 0.01)).mean())
            rows.setdefault(name, []).append((float(auc_binary(score[ok], member[ok])), tpr))
            pooled.setdefault(name, []).append(int((inside > threshold_at(outside, 0.001)).sum()))
        print(f"target {target}: rmia TPR@1% {rows['rmia'][-1][1]:.4f}, scoring {1000 * spent:.0f} CPU ms", flush=True)
    draw = np.random.default_rng(1)
    print(f"{args.targets} targets, {args.shadows} shadows, {MEMBERS} members each")
    for name, values in rows.items():
        table = np.array(values)
        means = table[draw.integers(len(table), size=(4000, len(table)))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975], axis=0)
        rare = sum(pooled[name]) / (len(table) * MEMBERS)
        print(
            f"{name:14s} AUC {table[:, 0].mean():.4f} [{low[0]:.4f}, {high[0]:.4f}]  "
            f"TPR@1% {100 * table[:, 1].mean():.2f} [{100 * low[1]:.2f}, {100 * high[1]:.2f}] %  "
            f"TPR@0.1% pooled {100 * rare:.2f} %"
        )
    print(f"all: {time.process_time() - start:.1f} CPU s")


if __name__ == "__main__":
    main()
