"""Cells of several seeds become points: what a defense costs in utility and leaves of the leakage, with intervals.

Every figure and the report stand on these points; nothing here draws.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsec.config import Cell, content_hash, expand
from fedsec.errors import ConfigError
from fedsec.plugins import PluginSpec

Result = Mapping[str, Any]
UTILITY = "utility.auc"
MEMBERSHIP = "leakage.membership.headline"


@dataclass(frozen=True)
class Measure:
    """A number of a cell that says how much was leaked or broken."""

    path: str
    """Where it stands in a cell, such as `leakage.psnr`."""
    title: str
    baselines: tuple[tuple[str, str], ...] = ()
    """(path or number, name) of what an adversary has without attacking."""
    percent: bool = False
    images_key: str = ""
    """Column of `leakage.images` whose rows are pooled over seeds."""
    higher_is_worse: bool = True
    least: float = 0.02
    """Differences below this are nothing to speak of; a heat map does not colour them."""


MEASURES = (
    Measure(
        "leakage.psnr",
        "reconstruction PSNR, dB",
        (("leakage.prior_psnr", "public mean image"),),
        images_key="psnr",
        least=1.0,
    ),
    Measure("leakage.reid_rank1", "patients re-identified", (("leakage.reid_chance", "chance"),), True),
    Measure(f"{MEMBERSHIP}.tpr_at_1pct_fpr", "members found at 1 % false alarms", (("0.01", "chance"),), True),
    Measure(f"{MEMBERSHIP}.auc", "membership AUC", (("0.5", "chance"),)),
    Measure(
        "robustness.attack_success_rate", "backdoor success", (("robustness.untriggered_rate", "untriggered"),), True
    ),
    Measure("utility.auc", "test AUC under attack", (("0.5", "guessing"),), higher_is_worse=False),
)
"""In the order in which a cell's headline is chosen; the last is for attacks on the model's quality."""


def at(cell: Result, path: str) -> Any:
    """The value at a dotted path, which may be a number itself; None where there is none."""
    try:
        return float(path)
    except ValueError:
        pass
    value: Any = cell
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def estimate(cell: Result, path: str) -> dict[str, Any] | None:
    """An estimate in its JSON form, a bare number as one without interval; None where there is no value."""
    value = at(cell, path)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"value": float(value), "low": None, "high": None, "n": 0}
    if not isinstance(value, Mapping) or value.get("value") is None:
        return None
    return dict(value)


def measure_of(cell: Result) -> Measure | None:
    """What a cell's attack is judged by: the first measure that it has; None without an attack."""
    if not cell.get("attack"):
        return None
    return next((m for m in MEASURES if estimate(cell, m.path) is not None), None)


def attack_label(cell: Result) -> str:
    """The attack as people write it; `none` without one."""
    return str(PluginSpec.from_table(cell["attack"])) if cell.get("attack") else "none"


def defense_label(cell: Result) -> str:
    """The cell's defense as people write it."""
    return Cell(defense=tuple(PluginSpec.from_table(t) for t in cell.get("defense", []))).label()


@dataclass(frozen=True)
class Point:
    """One attack on one defended federation, over its seeds."""

    dataset: str
    model: str
    attack: str
    defense: str
    measure: Measure
    utility: Mapping[str, Any]
    """Test AUC; of an attack on the model's quality that of the undisturbed federation, where it was computed."""
    leakage: Mapping[str, Any]
    baselines: tuple[tuple[str, float], ...]
    epsilon: float | None
    seconds: float
    upload_bytes: float
    seeds: tuple[int, ...]
    cells: tuple[str, ...]
    """Their ids."""
    undisturbed: bool = True
    """False: `utility` is that under the attack itself, which `leakage` says as well."""

    @property
    def family(self) -> str:
        """The defense without its parameters."""
        return "+".join(part.split(":")[0] for part in self.defense.split("+"))


def over_seeds(cells: Sequence[Result], path: str) -> dict[str, Any] | None:
    """The mean over seeds, and the widest of their 95 % intervals.

    From the smallest lower to the largest upper limit: no assumption about how seeds are distributed, which three of
    them could not support, and never narrower than that of the seed with the least data. A limit that one seed lacks
    is missing here, too.
    """
    found = [e for cell in cells if (e := estimate(cell, path)) is not None]
    if not found:
        return None
    lows, highs = [e["low"] for e in found], [e["high"] for e in found]
    return {
        "value": sum(e["value"] for e in found) / len(found),
        "low": None if None in lows else min(lows),
        "high": None if None in highs else max(highs),
        "n": sum(e["n"] for e in found),
    }


def pooled(cells: Sequence[Result], measure: Measure) -> dict[str, Any] | None:
    """A measure over seeds: where there are rows of images, over all of them; else the mean of the seeds."""
    rows = [cell["leakage"]["images"] for cell in cells if cell.get("leakage", {}).get("images")]
    if not measure.images_key or len(rows) < 2:
        return over_seeds(cells, measure.path)
    import numpy as np

    from fedsec.metrics.limits import across_seeds

    result: dict[str, Any] = across_seeds(rows, measure.images_key, generator=np.random.default_rng(0)).to_json()
    return result


def points(cells: Iterable[Result]) -> list[Point]:
    """One point for each attack on each defense, in the order of the cells; cells without an attack have none."""
    cells = list(cells)
    groups: dict[tuple[str, ...], list[Result]] = {}
    clean: dict[tuple[str, str], dict[str, Result]] = {}
    for cell in cells:
        if not changes_training(cell):
            clean.setdefault((setting(cell), defense_label(cell)), {})[cell["training"]] = cell
        if (measure := measure_of(cell)) is not None:
            settings = setting(cell)
            groups.setdefault((settings, attack_label(cell), defense_label(cell), measure.path), []).append(cell)
    found = []
    for (where, attack, defense, path), group in groups.items():
        measure = next(m for m in MEASURES if m.path == path)
        undisturbed = list(clean.get((where, defense), {}).values()) if path == UTILITY else group
        leakage, utility = pooled(group, measure), over_seeds(undisturbed or group, UTILITY)
        if leakage is None or utility is None:
            continue
        lines = [(name, over_seeds(group, baseline)) for baseline, name in measure.baselines]
        found.append(
            Point(
                dataset=group[0]["dataset"],
                model=group[0]["model"],
                attack=attack,
                defense=defense,
                measure=measure,
                utility=utility,
                leakage=leakage,
                baselines=tuple((name, e["value"]) for name, e in lines if e is not None),
                epsilon=group[0].get("privacy", {}).get("epsilon"),
                seconds=sum(c["cost"]["seconds"] for c in group) / len(group),
                upload_bytes=sum(c["cost"]["upload_bytes_per_client"] for c in group) / len(group),
                seeds=tuple(sorted(c["seed"] for c in group)),
                cells=tuple(c["id"] for c in group),
                undisturbed=bool(undisturbed),
            )
        )
    return found


SIGNS = {"epsilon": "ε", "sigma": "σ", "delta": "δ"}


def short(label: str) -> str:
    """A plugin or stack as a figure has room for it: `dp:epsilon=3+dos` becomes `dp ε=3 + dos`."""
    parts = []
    for word in label.split("+"):
        name, _, params = word.partition(":")
        values = [item.partition("=") for item in params.split(",") if item]
        parts.append(" ".join([name, *(f"{SIGNS.get(k, k)}={v}" for k, _, v in values)]))
    return " + ".join(parts)


def changes_training(cell: Result) -> bool:
    """Whether the cell's attack is part of its training: a malicious client's is."""
    return bool(cell.get("attack")) and cell["training"] == f"train-{cell['id']}"


def setting(cell: Result) -> str:
    """What has to be the same for two cells to be compared, beside attack, defense and seed."""
    parts = [str(cell.get(key, "")) for key in ("dataset", "model", "strategy")]
    return " · ".join([*parts, *([cell["topology"]] if cell.get("topology", "federated") != "federated" else [])])


def pareto(front: Sequence[Point]) -> list[Point]:
    """Those that no other point beats in utility without losing in leakage, or the reverse; by utility."""

    def beats(a: Point, b: Point) -> bool:
        sign = 1 if a.measure.higher_is_worse else -1
        more, less = a.utility["value"] - b.utility["value"], sign * (b.leakage["value"] - a.leakage["value"])
        return bool(more >= 0 and less >= 0 and (more > 0 or less > 0))

    kept = [p for p in front if not any(beats(other, p) for other in front)]
    return sorted(kept, key=lambda p: p.utility["value"])


def command_of(resolved: Mapping[str, Any], run: str) -> str:
    """The command line that computes one cell again.

    Args:
        resolved: the cell as `resolved.json` holds it. run: its run folder, for cells that words cannot express.
    """
    cell = Cell.from_json({k: v for k, v in resolved.items() if k != "id"})
    words = ["fedsec", "run", "--no-baseline", "--seed", str(cell.seed)]
    words += ["--attack", str_of(cell.attack)] if cell.attack else []
    words += ["--defense", "+".join(map(str_of, cell.defense))] if cell.defense else []
    tables: dict[str, Any] = {"seed": cell.seed, "baseline": False}
    tables |= {"attack": [str_of(cell.attack)]} if cell.attack else {}
    tables |= {"defense": ["+".join(map(str_of, cell.defense))]} if cell.defense else {}
    default = Cell().to_json()
    for table in ("data", "model", "federation"):
        for key, value in cell.to_json()[table].items():
            if value != default[table][key]:
                tables.setdefault(table, {})[key] = value
                words += ["--set", f"{table}.{key}={toml(value)}"]
    if same(tables, cell):
        return shlex.join(words)
    return shlex.join(["fedsec", "run", "--config", f"{run}/resolved.json"])


def str_of(spec: PluginSpec) -> str:
    """A plugin as a command-line word, with every digit of its numbers."""
    values = ",".join(f"{key}={'none' if value is None else value}" for key, value in spec.params.items())
    return f"{spec.name}:{values}" if values else spec.name


def toml(value: Any) -> str:
    """A value as `--set` reads it."""
    return (
        json.dumps(value)
        if not isinstance(value, Mapping)
        else "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}"
    )


def same(tables: Mapping[str, Any], cell: Cell) -> bool:
    """Whether these tables lead to exactly this cell."""
    from fedsec.federation.assemble import resolve

    try:
        (again,) = expand(tables)
        return content_hash(resolve(again).to_json()) == cell.key()
    except (ConfigError, ValueError):
        return False
