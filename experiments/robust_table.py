"""AUC of every rule under every attack, over seeds, as a table for the documentation.

    python experiments/robust_table.py runs/robust_cxr

A cell is the mean test AUC over the seeds, with the interval of a bootstrap over seeds and, in each, over what the
test images say (its own 95 % interval, taken as normal); in brackets the attackers' mean weight where a rule gives
weights. The row without attack is followed by what the rule costs: AUC and worst client against the first rule, paired
by seed, and the effective number of clients.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsec.plugins import PluginSpec

Cell = Mapping[str, Any]
DRAWS = 4000


def over_seeds(cells: Sequence[Cell], key: str) -> tuple[float, float, float]:
    """Mean over seeds, and a 95 % interval: seeds are drawn with replacement, and each one's value with its error."""
    rng = np.random.default_rng(0)
    found = [c["utility"][key] for c in cells]
    values = np.array([e["value"] for e in found])
    errors = np.array([(e["high"] - e["low"]) / (2 * 1.96) for e in found])
    rows = rng.integers(len(values), size=(DRAWS, len(values)))
    # All seeds share one test set: its error does not average out.
    drawn = values[rows].mean(1) + errors.mean() * rng.standard_normal(DRAWS)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def words(table: Mapping[str, Any] | None) -> str:
    """An attack in a row's title."""
    if table is None:
        return "none"
    return ", ".join([table["method"], *(f"{k} {v}" for k, v in table.items() if k in ("factor", "jitter") and v)])


def label(cell: Cell) -> str:
    """A rule in a column's title."""
    spec = PluginSpec.from_table(cell["defense"][0])
    return "no defense" if spec.name == "fedavg" and spec.params.get("kappa") == "inf" else spec.name


def entry(cells: Sequence[Cell]) -> str:
    """AUC with interval, and the attackers' weight."""
    if not cells:
        return ""
    value, low, high = over_seeds(cells, "auc")
    text = f"{value:.3f} [{low:.3f}, {high:.3f}]"
    held = [c.get("robustness", {}).get("attacker_weight") for c in cells]
    weights = [w["value"] for w in held if w]
    return f"{text} ({np.mean(weights):.2f})" if weights else text


def cost_rows(cells: Sequence[Cell], rules: Sequence[str]) -> list[list[str]]:
    """What each rule costs without an attack, against the first one."""
    calm = {(label(c), c["seed"]): c for c in cells if c["attack"] is None}
    seeds = sorted({seed for _, seed in calm})
    rows = []
    for title, key in (("cost, AUC", "auc"), ("cost, worst client", "worst_client_auc")):
        row = [title]
        for rule in rules:
            both = [(calm[rules[0], s]["utility"][key]["value"], calm[rule, s]["utility"][key]["value"]) for s in seeds]
            differences = [before - after for before, after in both]
            row.append(f"{np.mean(differences):+.3f} ({min(differences):+.3f} … {max(differences):+.3f})")
        rows.append(row)
    heard = ["clients heard"]
    for rule in rules:
        counts = [calm[rule, s].get("robustness", {}).get("effective_clients", {}).get("value") for s in seeds]
        heard.append(f"{np.mean(counts):.1f}" if None not in counts else "–")
    return [*rows, heard]


def print_table(title: str, cells: Sequence[Cell]) -> None:
    """One split of the data."""
    rules = list(dict.fromkeys(label(c) for c in cells))
    attacks = list(dict.fromkeys(words(c["attack"]) for c in cells))
    print(f"\n{title}, seeds {', '.join(map(str, sorted({c['seed'] for c in cells})))}\n")
    print("| attack | " + " | ".join(rules) + " |")
    print("|---|" + "---|" * len(rules))
    for attack in attacks:
        own = [c for c in cells if words(c["attack"]) == attack]
        print(f"| {attack} | " + " | ".join(entry([c for c in own if label(c) == rule]) for rule in rules) + " |")
        if attack == "none":
            for row in cost_rows(cells, rules):
                print("| " + " | ".join(row) + " |")


def main() -> None:
    folder = Path(sys.argv[1])
    resolved = {c["id"]: c for c in json.loads((folder / "resolved.json").read_text(encoding="utf-8"))["cells"]}
    cells = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    splits = dict.fromkeys(resolved[c["id"]]["data"]["partition"] for c in cells)
    for split in splits:
        print_table(split, [c for c in cells if resolved[c["id"]]["data"]["partition"] == split])


if __name__ == "__main__":
    main()
