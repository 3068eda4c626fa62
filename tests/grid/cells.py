"""Made-up cells, for what reads cells: figures and the report. Their numbers are computed here and mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedsec.config import Cell, DataConfig, FederationConfig
from fedsec.federation.assemble import resolve
from fedsec.plugins import PluginSpec, parse_stack
from fedsec.store import RunFolder

DEFENSES = ("none", "dp:epsilon=1", "dp:epsilon=8", "gaussian:sigma=0.001", "gaussian:sigma=0.01", "topk:fraction=0.1")


def estimate(value: float, width: float = 0.02, n: int = 100) -> dict[str, Any]:
    return {"value": value, "low": value - width, "high": value + width, "n": n}


def cells(seeds: int = 3, defenses: tuple[str, ...] = DEFENSES) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each defense under a curious server and under malicious clients, over seeds."""
    for seed in range(seeds):
        for k, defense in enumerate(defenses):
            for attack in ("gradinversion:images=20", "poisoning:fraction=0.3"):
                yield made_up(attack, defense, seed, k)


def made_up(attack: str, defense: str, seed: int, k: int) -> tuple[Cell, dict[str, Any]]:
    stack = parse_stack(defense)
    cell = resolve(
        Cell(
            data=DataConfig(name="synthetic-cxr"),
            federation=FederationConfig(clients=4, rounds=2, local_steps=1, engine="serial", device="cpu"),
            attack=PluginSpec.parse(attack),
            defense=stack,
            seed=seed,
        )
    )
    spec = cell.attack
    assert spec is not None
    clean = 0.9 - 0.03 * k + 0.004 * seed
    poisoned = spec.name == "poisoning"
    result: dict[str, Any] = {
        "id": cell.key(),
        "attack": spec.to_table(),
        "defense": [item.to_table() for item in stack],
        "dataset": "synthetic-cxr",
        "model": "cnn",
        "strategy": "fedavg",
        "seed": seed,
        "utility": {"auc": estimate(clean - (0.2 if poisoned else 0.0))},
        "cost": {"seconds": 1.0 + k, "upload_bytes_per_client": 4000.0 / (k + 1)},
        "training": f"train-{cell.key(without_attack=not poisoned)}",
        "assumptions": {"labels": "recovered", "rounds_observed": [1, 2]},
    }
    if not poisoned:
        rows = [{"victim": i, "psnr": 30.0 - 2 * k + 0.1 * i, "prior_psnr": 17.0} for i in range(20)]
        result["leakage"] = {
            "psnr": estimate(30.95 - 2 * k, 1.0, 20),
            "prior_psnr": estimate(17.0, 0.5, 20),
            "verdict": "Leakage measured <b>&",
            "images": rows,
        }
    if defense.startswith("dp:"):
        epsilon = float(defense.rpartition("=")[2])
        result["privacy"] = {
            "epsilon": epsilon,
            "delta": 1e-5,
            "unit": "sample",
            "accountant": "prv",
            "assumptions": [],
        }
    return cell, result


def run_folder(path: Path, seeds: int = 3, defenses: tuple[str, ...] = DEFENSES) -> RunFolder:
    folder = RunFolder(path)
    made = list(cells(seeds, defenses))
    folder.begin({}, [cell for cell, _ in made], "cpu")
    for cell, result in made:
        folder.finish(cell.key(), result, rebuild=False)
    folder.rebuild()
    return folder
