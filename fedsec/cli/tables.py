"""How results are printed for people: one row a cell, what the numbers mean, and what to type next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedsec.metrics.limits import across_seeds
from fedsec.metrics.reconstruction import complete
from fedsec.plugins import PluginSpec
from fedsec.tradeoff import defense_label

Result = Mapping[str, Any]
WIDE = 150
"""Columns from which intervals are printed."""


def print_results(cells: Sequence[Result], folder: Path) -> None:
    """The results of a run, on standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe or a file has no edge to wrap at
        console.width = WIDE
    if not cells:
        console.print(f"{folder}: no finished cell")
        return
    console.print(results_table(cells, intervals=console.width >= WIDE))
    for line in (*meaning(cells), *over_seeds(cells), *origin(cells)):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"run folder: {folder}   next: fedsec plot {folder}", markup=False, soft_wrap=True)


def results_table(cells: Sequence[Result], intervals: bool = True) -> Table:
    """Columns that no cell fills are left out, and intervals where there is no room for them."""
    rows = [_row(cell, intervals) for cell in cells]
    if len({row["attack"] for row in rows}) == 1:
        rows = [{**row, "attack": ""} for row in rows]  # the title says it
    if len({row["topology"] for row in rows}) == 1 and rows[0]["topology"] == "federated":
        rows = [{**row, "topology": ""} for row in rows]
    titles = [t for t in rows[0] if any(row[t] for row in rows)]
    table = Table(title=f"{cells[0]['dataset']}, {cells[0]['model']}, {_attack(cells)}", title_justify="left")
    for title in titles:
        table.add_column(title, justify="left" if title in ("topology", "defense", "attack") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[t] for t in titles))
    return table


def _attack(cells: Sequence[Result]) -> str:
    names = {str(PluginSpec.from_table(c["attack"])) if c.get("attack") else "no attack" for c in cells}
    return names.pop() if len(names) == 1 else f"{len(names)} attacks"


def _row(cell: Result, intervals: bool) -> dict[str, str]:
    utility, leakage, privacy = (cell.get(key, {}) for key in ("utility", "leakage", "privacy"))
    leakage, robust = complete(leakage), cell.get("robustness", {})
    attacks = cell.get("attack")
    return {
        "topology": cell.get("topology", "federated"),
        "attack": attacks["name"] if attacks else "",
        "defense": defense_label(cell),
        "seed": str(cell["seed"]),
        "test AUC": interval(utility.get("auc"), 3, bare=not intervals),
        "worst client": interval(utility.get("worst_client_auc"), 3, bare=True),
        "sens@90": interval(utility.get("sensitivity_at_90_specificity"), 3, bare=True) if robust else "",
        "attack success": percent(robust.get("attack_success_rate")),
        "attackers' weight": weight_beside_fair(robust),
        "detection": interval(robust.get("detection_auroc"), 2, bare=True),
        "clients heard": interval(robust.get("effective_clients"), 1, bare=True),
        "PSNR dB": interval(leakage.get("psnr"), 1, bare=not intervals),
        "prior": interval(leakage.get("prior_psnr"), 1, bare=True),
        "matched": interval(leakage.get("matched_public_psnr"), 1, bare=True),
        "nearest": interval(leakage.get("nearest_public_psnr"), 1, bare=True),
        "bound": interval(leakage.get("bound_psnr"), 1, bare=True),
        "gap": interval(leakage.get("gap_db"), 1, bare=True),
        "adaptive gap": interval(leakage.get("adaptive_gap"), 1, bare=True),
        "proven": str(leakage.get("certified", "")),
        "re-id": percent(leakage.get("reid_rank1")),
        "member AUC": interval(_headline(leakage, "auc"), 3, bare=not intervals),
        "TPR@1 %": percent(_headline(leakage, "tpr_at_1pct_fpr"), 1),
        "ε": f"{privacy['epsilon']:.2f}" if privacy.get("epsilon") is not None else "",
        "s": f"{cell['cost']['seconds']:.0f}",
    }


def _headline(leakage: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """A measure of the strongest membership attack; None where it was not resolvable, or the comparison not valid."""
    table = leakage.get("membership", {})
    found: Mapping[str, Any] = table.get("headline", {}).get(key, {})
    return found if table.get("valid") and "value" in found else None


def interval(estimate: Mapping[str, Any] | None, digits: int, bare: bool = False) -> str:
    """`0.95 [0.93, 0.97]`."""
    if not estimate or estimate["value"] is None:
        return ""
    text = f"{estimate['value']:.{digits}f}"
    if bare or estimate["low"] is None:
        return text
    return f"{text} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def print_breakdown(series: Sequence[Result], folder: Path) -> None:
    """How many malicious clients broke each rule, a row an attack."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for item in series:
        groups.setdefault((item["data"], item["partition"], item["seed"], item["clients"]), []).append(item)
    for (data, partition, seed, clients), group in groups.items():
        rules = list(dict.fromkeys(defense_label(item) for item in group))
        title = f"{data}, {partition}, {clients} clients, seed {seed}: fewest malicious clients that break a rule"
        table = Table(title=title, title_justify="left")
        table.add_column("attack")
        for rule in rules:
            table.add_column(rule.replace(":", "\n"), justify="right")
        for attack in dict.fromkeys(str(PluginSpec.from_table(item["attack"])) for item in group):
            own = {defense_label(i): i for i in group if str(PluginSpec.from_table(i["attack"])) == attack}
            table.add_row(attack.partition("method=")[2] or attack, *(breaking(own.get(rule)) for rule in rules))
        console.print(table)
    console.print("> 4: not broken by 4 or fewer. *: more attackers did less harm, so every number was tried.")
    console.print(f"run folder: {folder}   next: fedsec plot {folder}", markup=False, soft_wrap=True)


def breaking(item: Result | None) -> str:
    """`3`, `> 4`, `…` while the search goes on, `failed`."""
    if item is None:
        return ""
    if item["reason"]:
        return "failed"
    if not item["finished"]:
        return "…"
    number = f"> {item['limit']}" if item["point"] is None else str(item["point"])
    return number + ("" if item["monotone"] else "*")


def weight_beside_fair(robust: Mapping[str, Any]) -> str:
    """The malicious clients' share of the aggregate, and what equal weights would have given them."""
    weight = interval(robust.get("attacker_weight"), 2, bare=True)
    return f"{weight} (fair {robust['fair_share']:.2f})" if weight else ""


def percent(estimate: Mapping[str, Any] | None, digits: int = 0) -> str:
    """A share as a percentage."""
    return f"{100 * estimate['value']:.{digits}f} %" if estimate and estimate["value"] is not None else ""


def meaning(cells: Sequence[Result]) -> list[str]:
    """What each attacked cell's numbers say, in sentences."""
    lines = []
    for cell in cells:
        leakage = cell.get("leakage", {})
        said = [leakage[p]["verdict"] for p in ("membership", "source", "inversion", "attributes") if p in leakage]
        if "dp_audit" in cell:
            said.append(cell["dp_audit"]["sentence"])
        lines += [f"{defense_label(cell)} (seed {cell['seed']}): {text}." for text in said]
        if "verdict" not in leakage:
            continue
        if cell.get("assumptions", {}).get("labels") == "oracle":
            who = f"{defense_label(cell)} (seed {cell['seed']})"
            lines.append(f"{who}: labels were told in advance, which no server knows: no verdict on what it can do.")
            continue
        chance, rank = leakage.get("reid_chance"), leakage.get("reid_rank1", {}).get("value")
        luck = f"chance {chance:.1%}" if chance is not None else ""
        if "reid_matched_rank1" in leakage:
            luck += f"; public images matched in the same way {leakage['reid_matched_rank1']:.0%}"
        found = f" {rank:.0%} of the patients are re-identified ({luck})." if rank is not None else ""
        lines.append(f"{defense_label(cell)} (seed {cell['seed']}): {leakage['verdict']}.{found}")
    return lines


def over_seeds(cells: Sequence[Result]) -> list[str]:
    """One line for each federation that was run with several seeds: the PSNR over the images of all of them."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for cell in cells:
        if cell.get("leakage", {}).get("images"):
            groups.setdefault((_attack([cell]), defense_label(cell)), []).append(cell)
    lines = []
    for (attack, defense), group in groups.items():
        if len(group) > 1:
            rows = [cell["leakage"]["images"] for cell in group]
            pooled = across_seeds(rows, generator=np.random.default_rng(0)).to_json()
            who = f"{defense}, {len(group)} seeds" if len({a for a, _ in groups}) == 1 else f"{defense}, {attack}"
            lines.append(f"{who}: PSNR {interval(pooled, 1)} dB, median over {sum(map(len, rows))} images.")
    return lines


def origin(cells: Sequence[Result]) -> list[str]:
    """Whose images these are, and what the numbers assume."""
    lines = []
    if cells[0]["dataset"].startswith("synthetic"):
        lines.append("Data: built-in synthetic images, no patient's. For real ones: fedsec data get pneumoniamnist")
    noisy = [a for c in cells for a in c.get("privacy", {}).get("assumptions", []) if "seed" in a]
    if noisy:
        lines.append(f"DP noise: {noisy[0]}.")
    said = {n for c in cells for n in c.get("notes", []) if _is_of_a_defense(n, c)}
    lines.extend(f"{note[0].upper()}{note[1:]}." for note in sorted(said))
    observed = next((c["assumptions"] for c in cells if c.get("leakage") and "membership" not in c["leakage"]), None)
    if observed:
        lines.append(
            f"Assumed: labels {observed.get('labels')}, victim batch {observed.get('victim_batch')}, "
            f"rounds observed {', '.join(map(str, observed.get('rounds_observed', [])))} (1 sees the untrained model); "
            "the worst round is shown, all are in the cells."
        )
    troubled = {who for c in cells for failed in c.get("failed_clients", {}).values() for who in failed}
    if troubled:
        lines.append(f"Clients that failed in some round (see failed_clients): {', '.join(sorted(troubled))}")
    return lines


def _is_of_a_defense(note: str, cell: Result) -> bool:
    """Warnings of the cell's own defenses, and the end of a privacy budget."""
    names = {table["name"] for table in cell["defense"]}
    return note.partition(":")[0] in names or note.startswith("privacy budget spent")
