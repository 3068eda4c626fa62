"""One self-contained HTML page over finished runs: verdicts, an explorer, pictures, the ledger, and what was not shown.

Everything in it is read from run folders; nothing is computed again, and the page asks no server for anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedsec import __version__
from fedsec.errors import ConfigError
from fedsec.files import write_text
from fedsec.inlined import drawings, pictures
from fedsec.store import RunFolder
from fedsec.tradeoff import (
    MEASURES,
    UTILITY,
    Point,
    attack_label,
    command_of,
    defense_label,
    estimate,
    measure_of,
    over_seeds,
    points,
    pooled,
)

FailOn = Literal["lower", "point", "upper"]
SHORT = {measure.path.rpartition(".")[2]: measure.path for measure in reversed(MEASURES)}
SHORT |= {"epsilon": "privacy.epsilon", "auc": "leakage.membership.headline.auc"}


@dataclass(frozen=True)
class Threshold:
    """A limit that no defended federation may exceed."""

    key: str
    path: str
    limit: float

    @classmethod
    def parse(cls, word: str) -> Threshold:
        """Read `psnr=25`, `reid_rank1=0.1`, `epsilon=8` or any dotted path of a cell.

        Raises:
            ConfigError: not of that form.
        """
        key, equals, text = word.partition("=")
        try:
            limit = float(text)
        except ValueError:
            limit = float("nan")
        if not equals or not key.strip() or limit != limit:
            raise ConfigError(f"--fail-above {word}: write KEY=NUMBER, such as psnr=25 or epsilon=8")
        return cls(key.strip(), SHORT.get(key.strip(), key.strip()), limit)


@dataclass(frozen=True)
class Check:
    """One threshold on one defended federation."""

    key: str
    limit: float
    compared: float | None
    state: Literal["under", "above", "undecided"]

    @property
    def glyph(self) -> str:
        """Not by colour alone."""
        return {"under": "✓", "above": "✗", "undecided": "?"}[self.state]


def check(group: Sequence[Mapping[str, Any]], thresholds: Iterable[Threshold], fail_on: FailOn) -> list[Check]:
    """Compare the cells of one point, over their seeds, with the thresholds that apply to them.

    Args:
        group: cells of one attack on one defense. thresholds: limits.
        fail_on: which limit of the 95 % interval is compared; `lower` never fails a build because of noise.
    """
    found = []
    for threshold in thresholds:
        measure = next((m for m in MEASURES if m.path == threshold.path), None)
        value = pooled(group, measure) if measure else over_seeds(group, threshold.path)
        if value is None:
            continue
        exact = value["n"] == 0  # a plain number has no interval
        side = {"lower": "low", "point": "value", "upper": "high"}[fail_on]
        compared = value["value"] if exact else value[side]
        state: Literal["under", "above", "undecided"] = "undecided"
        if compared is not None:
            state = "above" if compared > threshold.limit else "under"
        found.append(Check(threshold.key, threshold.limit, compared, state))
    return found


@dataclass(frozen=True)
class Report:
    """What was written, and whether a threshold was exceeded."""

    path: Path
    exceeded: tuple[str, ...]
    undecided: tuple[str, ...]


def write_report(
    runs: Sequence[Path],
    out: Path | None = None,
    *,
    fail_above: Sequence[str] = (),
    fail_on: FailOn = "lower",
    redact: bool = False,
    figures: bool = True,
) -> Report:
    """Write the page.

    Args:
        runs: run folders. out: by default `report.html` in the only run folder.
        fail_above: thresholds as `KEY=NUMBER`; they apply to defended federations.
        fail_on: which limit of an interval is compared.
        redact: blur all images beyond recognition.
        figures: draw the trade-off figures into the page.

    Raises:
        ConfigError: not a run folder, nothing finished, or a threshold on something that no cell measured.
    """
    if out is None and len(runs) > 1:
        raise ConfigError("a report over several runs needs --out FILE.html")
    folders = [RunFolder.open(run) for run in runs]
    cells = [(folder, cell) for folder in folders for cell in folder.results()]
    if not cells:
        raise ConfigError(f"{runs[0]}: no finished cell to report on; fedsec show says what is missing")
    thresholds = [Threshold.parse(word) for word in fail_above]
    for threshold in thresholds:
        if all(estimate(cell, threshold.path) is None for _, cell in cells):
            raise ConfigError(f"--fail-above {threshold.key}: no cell has {threshold.path}")
    page = content(folders, cells, thresholds, fail_on, redact, figures)
    path = out or folders[0].path / "report.html"
    write_text(path, render(page))
    states = [(row, c) for row in page["verdicts"] for c in row["checks"]]
    name = "{0[attack]} on {0[defense]}: {1.key} above {1.limit:g}".format
    return Report(
        path,
        tuple(name(row, c) for row, c in states if c.state == "above"),
        tuple(name(row, c) for row, c in states if c.state == "undecided"),
    )


def render(page: Mapping[str, Any]) -> str:
    """Fill the template; everything that comes from files is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fedsec"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    environment.filters["interval"] = interval
    return environment.get_template("report.html").render(page)


def content(
    folders: Sequence[RunFolder],
    cells: Sequence[tuple[RunFolder, dict[str, Any]]],
    thresholds: Sequence[Threshold],
    fail_on: FailOn,
    redact: bool,
    figures: bool,
) -> dict[str, Any]:
    """Everything that the template shows."""
    results = [cell for _, cell in cells]
    found = points(results)
    by_id = {cell["id"]: cell for cell in results}
    verdicts = []
    for p in found:
        group = [by_id[key] for key in p.cells]
        checks = check(group, thresholds, fail_on) if p.defense != "none" else []
        verdicts.append(
            {
                **vars(p),
                "checks": checks,
                "sentence": sentence(p, group),
                "heading": f"{p.attack} on {p.dataset}, {p.model}",
            }
        )
    rows = [row(folder, cell, found) for folder, cell in cells]
    data = json.dumps({"cells": rows}, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    images = pictures(cells, redact)
    return {
        "version": __version__,
        "runs": [run_row(folder) for folder in folders],
        "count": len(cells),
        "verdicts": verdicts,
        "thresholds": thresholds,
        "fail_on": fail_on,
        "data": data,
        "pictures": images,
        "synthetic": all(str(c["dataset"]).startswith("synthetic") for c in results),
        "redacted": redact,
        "figures": drawings(found) if figures else [],
        "ledger": ledger(results),
        "assumptions": assumptions(results),
        "failed": [record for folder in folders for record in folder.failed()],
        "missing": sum(max(0, len(folder.resolved()) - len(list(folder.results()))) for folder in folders),
        "seeds": sorted({c["seed"] for c in results}),
    }


def sentence(p: Point, group: Sequence[Mapping[str, Any]]) -> str:
    """What the measured leakage means, in the words of its measure's own verdict; of the seed that leaks most."""
    told = [c for c in group if c.get("assumptions", {}).get("labels") == "oracle"]
    if told:
        return "labels were told in advance, which no server knows: no verdict"
    worst = max(group, key=lambda c: (estimate(c, p.measure.path) or {"value": float("-inf")})["value"])
    leakage = worst.get("leakage", {})
    said = leakage.get("verdict") or leakage.get("membership", {}).get("verdict")
    if said or p.measure.path != UTILITY or not p.undisturbed:
        return str(said or "")
    lost = p.utility["value"] - p.leakage["value"]
    return (
        f"The attack costs {lost:.3f} of {p.utility['value']:.3f} test AUC" if lost > 0 else "The attack costs nothing"
    )


def row(folder: RunFolder, cell: Mapping[str, Any], found: Sequence[Point]) -> dict[str, Any]:
    """One cell as the explorer needs it."""
    measure = measure_of(cell)
    leakage = estimate(cell, measure.path) if measure else None
    commands = _commands(folder)
    return {
        "id": cell["id"],
        "run": folder.path.name,
        "dataset": cell["dataset"],
        "model": cell["model"],
        "attack": attack_label(cell),
        "defense": defense_label(cell),
        "seed": cell["seed"],
        "utility": _limits(estimate(cell, "utility.auc")),
        "worst": _limits(estimate(cell, "utility.worst_client_auc")),
        "measure": measure.title if measure else "",
        "leakage": _limits(leakage),
        "baselines": [[name, e["value"]] for path, name in (measure.baselines if measure else ())
                      if (e := estimate(cell, path)) is not None],
        "epsilon": cell.get("privacy", {}).get("epsilon"),
        "seconds": cell["cost"]["seconds"],
        "command": commands.get(cell["id"], ""),
    }  # fmt: skip


def _limits(value: Mapping[str, Any] | None) -> list[float | None] | None:
    return None if value is None else [value["value"], value.get("low"), value.get("high")]


def _commands(folder: RunFolder) -> dict[str, str]:
    """Cell id -> the command that computes it; made once a run."""
    known: dict[str, str] | None = getattr(folder, "_commands", None)
    if known is None:
        known = {item["id"]: command_of(item, str(folder.path)) for item in folder.resolved()}
        folder._commands = known  # type: ignore[attr-defined]
    return known


def run_row(folder: RunFolder) -> dict[str, Any]:
    """Where a run lies, how it was started, and with what."""
    path = folder.path / "env.json"
    env = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    words = [Path(word).name if k == 0 else word for k, word in enumerate(env.get("command", []))]
    return {
        "path": str(folder.path),
        "command": " ".join(words),
        "machine": f"Python {env.get('python', '?')}, {env.get('platform', '?')}, device {env.get('device', '?')}",
        "packages": ", ".join(f"{name} {version}" for name, version in env.get("packages", {}).items()),
    }


def ledger(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line for each defense with a privacy claim, with the largest budget of its seeds."""
    lines: dict[str, dict[str, Any]] = {}
    for cell in cells:
        privacy = cell.get("privacy")
        if privacy:
            name = defense_label(cell)
            if name not in lines or privacy["epsilon"] > lines[name]["epsilon"]:
                lines[name] = {"defense": name, **privacy}
    return list(lines.values())


def assumptions(cells: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Attack -> what its numbers take for granted; values that differ between cells stand side by side."""
    tables: dict[str, dict[str, list[str]]] = {}
    for cell in cells:
        own = tables.setdefault(attack_label(cell), {})
        for key, value in cell.get("assumptions", {}).items():
            if key == "model_state":
                continue
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            seen = own.setdefault(key, [])
            if text not in seen:
                seen.append(text)
    return [
        (attack, [(key, " | ".join(values[:3]) + (" | …" if len(values) > 3 else "")) for key, values in own.items()])
        for attack, own in tables.items()
    ]


def number(value: float | None, percent: bool = False) -> str:
    """Three decimals below 2, such as an AUC; one above, such as decibels; a share as a percentage."""
    if value is None:
        return "–"
    if percent:
        return f"{100 * value:.1f} %"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 2 else f"{value:.3f}"


def interval(value: Mapping[str, Any], percent: bool = False) -> str:
    """`0.91 [0.89, 0.93]`."""
    text = number(value["value"], percent)
    if value.get("low") is None or value.get("high") is None:
        return text
    return f"{text} [{number(value['low'], percent)}, {number(value['high'], percent)}]"
