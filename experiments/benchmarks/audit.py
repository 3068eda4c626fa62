"""The audit on the recipe of its specification: how long it takes, what it proves of claims, where it finds nothing.

PneumoniaMNIST, a net of 105,346 parameters, SGD 0.05, momentum 0.9, batch 64. Means over
targets: `membership.py`.

    python experiments/benchmarks/audit.py whole        target, 8 shadows, all attacks of `fedsec audit`, HTML and JSON
    python experiments/benchmarks/audit.py other        the same model asked about images that it never saw
    python experiments/benchmarks/audit.py canaries     epsilon 3 with its noise, and with the noise switched off

Prints what was found, and CPU seconds of this process (everything runs in it, on one thread).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import fedsec
from fedsec.audit.run import Wanted, audit
from fedsec.audit.subjects import Said
from fedsec.config import Cell, read_resolved
from fedsec.experiment import training_key_of
from fedsec.federation.assemble import assemble

NET = "audit:net"
RECIPE: dict[str, Any] = {
    "clients": 1, "rounds": 1, "local_epochs": 30, "batch_size": 64, "lr": 0.05, "momentum": 0.9,
    "engine": "serial", "device": "cpu",
}  # fmt: skip
CLAIM = 3.0


def net(num_classes: int) -> nn.Module:
    """The net of the specification, section 8.1."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, num_classes),
    )  # fmt: skip


def train(folder: Path, canaries: int = 0, kind: str = "mislabelled", defense: str | None = None, **more: Any) -> Path:
    """A run of one hospital; without canaries on 1,872 images, as the specification has it."""
    tables: dict[str, Any] = {"data": {"name": "pneumoniamnist"}, "model": {"name": NET}}
    tables["data"] |= {"canaries": canaries, "canary": kind} if canaries else {"max_train": 1872}
    fedsec.run(tables, out=folder, defense=defense or "none", baseline=False, **{**RECIPE, **more})
    return folder


def line(name: str, value: Any) -> str:
    if "value" not in value:
        return f"{name} {value['not_resolvable']}"
    return f"{name} {value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"


def whole(folder: Path, seed: int) -> None:
    """An auditor's usual call, timed from the trained model to the written report."""
    run = train(folder / "run", seed=seed)
    start, wall = time.process_time(), time.perf_counter()
    wanted = Wanted(shadows=8, report=folder / "audit.html", json=folder / "audit.json")
    found = audit(run, Said(model=NET, seed=seed), wanted)
    spent = time.process_time() - start, time.perf_counter() - wall
    for name, row in found["membership"]["attacks"].items():
        print(f"{name}: {line('AUC', row['auc'])}, {line('TPR at 1 % FPR', row['tpr_at_1pct_fpr'])}")
    print(found["outcome"]["title"])
    print(f"audit with 8 shadows: {spent[0]:.1f} CPU s on one thread, {spent[1]:.1f} s of wall time; {folder}")


def other(folder: Path, seed: int) -> None:
    """Members and others: two halves of the training images that this model was never given. Nothing may be found."""
    run = train(folder / "run", seed=seed)
    cell = Cell.from_json(read_resolved(run / "resolved.json")[0])
    federation = assemble(cell)
    unused = np.setdiff1d(federation.dataset.rows(split="train"), np.concatenate(federation.rows))
    sides = np.array_split(np.random.default_rng(seed).permutation(unused), 2)
    for name, rows in zip(("members", "others"), sides, strict=True):
        (folder / f"{name}.txt").write_text("\n".join(map(str, rows)))
    said = Said(
        data="pneumoniamnist", members=str(folder / "members.txt"), nonmembers=str(folder / "others.txt"),
        recipe=run / "config.toml", model=NET, seed=seed,
    )  # fmt: skip
    model = run / "artifacts" / training_key_of(cell) / "model.safetensors"
    found = audit(
        model, said, Wanted(attacks=("membership:methods=loss+lira+rmia",), shadows=8), cache=folder / "cache"
    )
    for name, row in found["membership"]["attacks"].items():
        print(f"{name}: {line('AUC', row['auc'])}, {line('TPR at 1 % FPR', row['tpr_at_1pct_fpr'])}")
    print(found["outcome"]["title"])


def canaries(folder: Path, seed: int, count: int) -> None:
    """One hospital, all 4,708 images. ε = 3 claimed: with the noise that this takes, and with none."""
    for kind in ("dirac", "mislabelled"):
        for defense in (f"dp:epsilon={CLAIM:g}", "dp:noise_multiplier=1e-6"):
            start = time.process_time()
            run = train(folder / f"{kind}-{defense[3:6]}", count, kind, defense, seed=seed, local_epochs=10)
            wanted = Wanted(attacks=("membership:methods=loss",), shadows=0)
            found = audit(run, Said(model=NET, epsilon=CLAIM, delta=1e-5), wanted)
            dp = found["dp_audit"]
            values = (b if (b := row["epsilon"]) is None else round(b, 2) for row in dp["bounds"])
            rows = ", ".join(f"{row['name']} {value}" for row, value in zip(dp["bounds"], values, strict=True))
            print(
                f"{kind}, {defense}, {count} canaries: proven {dp['proven']:.2f} ({rows}), "
                f"ceiling {dp['ceiling']:.2f}; {dp['verdict']}, exit {found['exit_code']}; "
                f"{time.process_time() - start:.0f} CPU s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("whole", "other", "canaries"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--canaries", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="where runs and reports are kept (default: a temporary folder)")
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if args.part == "canaries":
        canaries(folder, args.seed, args.canaries)
    else:
        {"whole": whole, "other": other}[args.part](folder, args.seed)


if __name__ == "__main__":
    main()
