"""The table of a sweep over strategies: utility, fairness, bytes, and what the attack `extras` read, over the seeds.

python experiments/strategies_table.py runs/strategies_cxr
python experiments/strategies_table.py runs/strategies_attacks --attacks    # a column an attack, instead
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from fedsec.config import Cell
from fedsec.tradeoff import MEASURES, Result, estimate, over_seeds, pooled

COLUMNS = ("AUC", "mean of hospitals", "worst", "spread", "balanced", "bytes", "source lift", "membership AUC", "read")


def interval(values: Sequence[float]) -> str:
    """Mean and the half width of its 95 % interval over the seeds (Student)."""
    found = [v for v in values if v is not None and v == v]
    if not found:
        return "–"
    if len(found) == 1:
        return f"{found[0]:.3f}"
    half = t.ppf(0.975, len(found) - 1) * np.std(found, ddof=1) / np.sqrt(len(found))
    return f"{np.mean(found):.3f} ± {half:.3f}"


def value(table: Mapping[str, Any], *path: str) -> Any:
    """The number at the end of a path, None where it ends early."""
    found: Any = table
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found.get("value") if isinstance(found, Mapping) else found


def best_auc(leak: Mapping[str, Any]) -> float:
    """The largest membership AUC of the readings, NaN where there is none."""
    attacks = leak.get("membership", {}).get("attacks", {})
    return max((value(a, "auc") for a in attacks.values()), default=float("nan"))


def honest(cell: Mapping[str, Any]) -> list[float]:
    """Test AUC of every hospital that is not the adversary's: a liar's own model says nothing about the strategy."""
    liars = {f"client {k}" for k in cell.get("robustness", {}).get("malicious_clients", ())}
    each: dict[str, float] = {
        name: value(cell["utility"], "client_auc", name) for name in cell["utility"]["client_auc"]
    }
    return [auc for name, auc in each.items() if name not in liars and auc is not None] or [float("nan")]


def row_of(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line of the table."""
    utility = [c["utility"] for c in cells]
    leaks = [c.get("leakage", {}) for c in cells]
    kinds = sorted({method for leak in leaks for method in leak.get("source", {}).get("methods", {})})
    notes = sorted({note.partition(":")[0] for c in cells for note in c.get("notes", []) if "leaves" in note})
    return [
        interval([value(u, "auc") for u in utility]),
        interval([float(np.mean(honest(c))) for c in cells]),
        interval([min(honest(c)) for c in cells]),
        interval([u.get("client_auc_spread") for u in utility]),
        interval([value(u, "balanced_accuracy") for u in utility]),
        f"{np.mean([c['cost']['upload_bytes_per_client'] for c in cells]):,.0f}",
        interval([value(leak, "source", "lift") for leak in leaks]),
        interval([best_auc(leak) for leak in leaks]),
        "+".join(kinds) or ("nothing" if notes else "–"),
    ]


def table(cells: Iterable[Mapping[str, Any]], dealt: Mapping[str, str]) -> str:
    """Markdown, a line for each data set, way of dealing, topology, strategy and attack.

    Args:
        dealt: id of a cell -> how the images were dealt.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for cell in cells:
        attack = (cell.get("attack") or {}).get("name", "none")
        topology = str(cell.get("topology", "federated"))
        groups[(cell["dataset"], dealt[cell["id"]], topology, cell["strategy"], attack)].append(cell)
    head = ["data", "dealt", "topology", "strategy", "attack", "n", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key, group in sorted(groups.items()):
        lines.append("| " + " | ".join([*key, str(len(group)), *row_of(group)]) + " |")
    return "\n".join(lines)


def shown(found: Mapping[str, Any] | None, digits: int) -> str:
    """A value with its interval."""
    if found is None:
        return "–"
    limits = "" if found["low"] is None else f" [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
    return f"{found['value']:.{digits}f}{limits}"


def readings(cells: Sequence[Result], *path: str) -> list[str]:
    """Names of what was compared there, in every seed's cell."""
    tables: list[Any] = []
    for cell in cells:
        found: Any = cell
        for key in path:
            found = found.get(key, {})
        tables.append(found)
    return sorted(set.intersection(*(set(t) for t in tables))) if tables else []


def strongest(cells: Sequence[Result], path: tuple[str, ...], measure: str, digits: int) -> str:
    """Of several readings the one with the largest mean over the seeds, with its name."""
    found = {name: over_seeds(cells, ".".join((*path, name, measure))) for name in readings(cells, *path)}
    known = {name: e for name, e in found.items() if e is not None}
    if not known:
        return "–"
    best = max(known, key=lambda name: float(known[name]["value"]))
    return f"{shown(known[best], digits)} {best}"


def leaks(cells: Iterable[Result]) -> str:
    """Markdown, a line for each strategy, a column for each attack.

    PSNR is the median over the images of all seeds, drawing seeds first and then images; everything else the mean of
    the seeds, with the lowest lower and the highest upper limit of their intervals.
    """
    groups: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        groups[str(cell["strategy"])][(cell.get("attack") or {"name": "none"})["name"]].append(cell)
    psnr = MEASURES[0]
    lines = [
        "| strategy | images rebuilt: PSNR, dB | members told: AUC | source of an image, by what was sent | "
        "members told by what was sent: AUC | test AUC |",
        "|" + "---|" * 6,
    ]
    for name, group in groups.items():
        rebuilt, members, extras = (group.get(a, []) for a in ("gradinversion", "membership", "extras"))
        cells_of = [
            shown(pooled(rebuilt, psnr), 1) if rebuilt else "–",
            strongest(members, ("leakage", "membership", "attacks"), "auc", 3),
            strongest(extras, ("leakage", "source", "methods"), "accuracy", 3),
            strongest(extras, ("leakage", "membership", "attacks"), "auc", 3),
            shown(over_seeds(rebuilt or extras or members, "utility.auc"), 3),
        ]
        lines.append("| " + " | ".join([f"`{name}`", *cells_of]) + " |")
    baselines = [
        e for g in groups.values() for c in g.get("gradinversion", []) if (e := estimate(c, "leakage.prior_psnr"))
    ]
    if baselines:
        lines.append(f"\nThe public mean image: {np.median([e['value'] for e in baselines]):.1f} dB.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--attacks", action="store_true", help="a column for each attack")
    options = parser.parse_args()
    folder = options.run
    if options.attacks:
        print(leaks(json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()))
        return
    asked = [Cell.from_json(c) for c in json.loads((folder / "resolved.json").read_text())["cells"]]
    dealt = {cell.key(): cell.data.partition for cell in asked}
    print(table([json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*.json"))], dealt))


if __name__ == "__main__":
    main()
