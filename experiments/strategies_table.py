"""The table of a sweep over strategies: utility, fairness, bytes, and what the attack `extras` read, over the seeds.

python experiments/strategies_table.py runs/strategies_cxr
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

COLUMNS = ("AUC", "worst", "spread", "balanced", "bytes", "source lift", "membership AUC", "read")


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


def row_of(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line of the table."""
    utility = [c["utility"] for c in cells]
    leaks = [c.get("leakage", {}) for c in cells]
    kinds = sorted({method for leak in leaks for method in leak.get("source", {}).get("methods", {})})
    notes = sorted({note.partition(":")[0] for c in cells for note in c.get("notes", []) if "leaves" in note})
    return [
        interval([value(u, "auc") for u in utility]),
        interval([value(u, "worst_client_auc") for u in utility]),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    folder = parser.parse_args().run
    asked = [Cell.from_json(c) for c in json.loads((folder / "resolved.json").read_text())["cells"]]
    dealt = {cell.key(): cell.data.partition for cell in asked}
    print(table([json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*.json"))], dealt))


if __name__ == "__main__":
    main()
