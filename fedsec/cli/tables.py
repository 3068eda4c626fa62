"""How results are printed for people: one row a cell, what the numbers mean, and what to type next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedsec.config import Cell
from fedsec.metrics.limits import across_seeds
from fedsec.metrics.reconstruction import complete
from fedsec.plugins import PluginSpec

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
    titles = [t for t in rows[0] if any(row[t] for row in rows)]
    table = Table(title=f"{cells[0]['dataset']}, {cells[0]['model']}, {_attack(cells)}", title_justify="left")
    for title in titles:
        table.add_column(title, justify="left" if title in ("defense", "attack") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[t] for t in titles))
    return table


def _attack(cells: Sequence[Result]) -> str:
    names = {str(PluginSpec.from_table(c["attack"])) if c.get("attack") else "no attack" for c in cells}
    return names.pop() if len(names) == 1 else f"{len(names)} attacks"


def _row(cell: Result, intervals: bool) -> dict[str, str]:
    utility, leakage, privacy = (cell.get(key, {}) for key in ("utility", "leakage", "privacy"))
    leakage = complete(leakage)
    attacks = cell.get("attack")
    return {
        "attack": attacks["name"] if attacks else "",
        "defense": defense_label(cell),
        "seed": str(cell["seed"]),
        "test AUC": interval(utility.get("auc"), 3, bare=not intervals),
        "worst client": interval(utility.get("worst_client_auc"), 3, bare=True),
        "PSNR dB": interval(leakage.get("psnr"), 1, bare=not intervals),
        "prior": interval(leakage.get("prior_psnr"), 1, bare=True),
        "nearest": interval(leakage.get("nearest_public_psnr"), 1, bare=True),
        "bound": interval(leakage.get("bound_psnr"), 1, bare=True),
        "gap": interval(leakage.get("gap_db"), 1, bare=True),
        "adaptive gap": interval(leakage.get("adaptive_gap"), 1, bare=True),
        "proven": str(leakage.get("certified", "")),
        "re-id": percent(leakage.get("reid_rank1")),
        "ε": f"{privacy['epsilon']:.2f}" if privacy.get("epsilon") is not None else "",
        "s": f"{cell['cost']['seconds']:.0f}",
    }


def defense_label(cell: Result) -> str:
    """The cell's defense as people write it."""
    return Cell(defense=tuple(PluginSpec.from_table(t) for t in cell.get("defense", []))).label()


def interval(estimate: Mapping[str, Any] | None, digits: int, bare: bool = False) -> str:
    """`0.95 [0.93, 0.97]`."""
    if not estimate or estimate["value"] is None:
        return ""
    text = f"{estimate['value']:.{digits}f}"
    if bare or estimate["low"] is None:
        return text
    return f"{text} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def percent(estimate: Mapping[str, Any] | None) -> str:
    """A share as a percentage."""
    return f"{100 * estimate['value']:.0f} %" if estimate and estimate["value"] is not None else ""


def meaning(cells: Sequence[Result]) -> list[str]:
    """What each attacked cell's numbers say, in sentences."""
    lines = []
    for cell in cells:
        leakage = cell.get("leakage", {})
        if "verdict" not in leakage:
            continue
        if cell.get("assumptions", {}).get("labels") == "oracle":
            who = f"{defense_label(cell)} (seed {cell['seed']})"
            lines.append(f"{who}: labels were told in advance, which no server knows: no verdict on what it can do.")
            continue
        chance, rank = leakage.get("reid_chance"), leakage.get("reid_rank1", {}).get("value")
        found = f" {rank:.0%} of the patients are re-identified (chance {chance:.1%})." if rank is not None else ""
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
    observed = next((c["assumptions"] for c in cells if c.get("leakage")), None)
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
