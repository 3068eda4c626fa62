"""The figures of a finished run, drawn from what its folder holds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsec import charts, checkpoint, plotting
from fedsec.plugins import PluginSpec
from fedsec.store import BREAKDOWN, RunFolder
from fedsec.tradeoff import UTILITY, Point, attack_label, changes_training, defense_label, points, setting, short

SHOWN = 8
"""Images in a row of the reconstruction wall."""


def draw(run: Path, redact: bool = False) -> list[Path]:
    """Draw all figures that the run's cells have data for; returns the files written."""
    folder = RunFolder.open(run)
    cells = list(folder.results())
    settings: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        settings.setdefault(setting(cell), []).append(cell)
    written: list[Path] = []
    if (folder.path / BREAKDOWN).is_file():
        return draw_breakdown(folder, cells)
    for name, chosen in settings.items():
        figures = folder.path / "figures" / (slug(name) if len(settings) > 1 else "")
        written += draw_setting(folder, chosen, figures, redact)
    return written


def draw_breakdown(folder: RunFolder, cells: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Of a search for breakdown points: the map of each setting and seed, and the curve of each attack."""
    content = json.loads((folder.path / BREAKDOWN).read_text(encoding="utf-8"))["series"]
    maps: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for item in content:
        maps.setdefault((item["data"], item["partition"], item["seed"]), []).append(item)
    written: list[Path] = []
    for (data, partition, seed), series in maps.items():
        stem = f"breakdown-{slug(data)}-{partition}-{seed}" if len(maps) > 1 else "breakdown"
        written += charts.breakdown_map(series, folder.path / "figures" / stem)
    for attack, shares in breakdowns(points(cells), cells).items():
        written += charts.breakdown_curve(shares, folder.path / "figures" / f"curve-{slug(attack)}", attack)
    return written


def draw_setting(folder: RunFolder, cells: list[dict[str, Any]], figures: Path, redact: bool) -> list[Path]:
    """The figures of one data set, model and strategy."""
    written: list[Path] = []
    found = points(cells)
    by_attack: dict[str, list[Point]] = {}
    for point in found:
        by_attack.setdefault(point.attack, []).append(point)
    names = slugs(list(by_attack))
    weaker = lesser_shares(list(by_attack))
    for attack, own in by_attack.items():
        if len(own) > 1 and own[0].undisturbed and attack not in weaker:
            written += charts.tradeoff_front(own, figures / f"tradeoff-{names[attack]}")
    if len(by_attack) > 1 and len({p.defense for p in found}) > 1:
        written += charts.heat_map(found, figures / "heatmap")
    written += walls(folder, cells, figures, redact)
    for attack, curves in rocs(cells).items():
        written += charts.roc_curves(curves, figures / f"roc-{slugs(list(rocs(cells)))[attack]}")
    for attack, shares in breakdowns(found, cells).items():
        written += charts.breakdown_curve(shares, figures / f"breakdown-{slug(attack)}", attack)
    costs = {p.defense: (p.seconds, p.upload_bytes) for p in reversed(found)}
    if len(costs) > 1:
        written += charts.cost_bars(dict(reversed(costs.items())), figures / "cost")
    for attack, lines in trainings(folder, cells).items():
        if attack in weaker:
            continue
        stem = f"training-{slug(attack)}" if attack else "training"
        written += plotting.training_curve(lines, figures / stem, ylabel="validation AUC")
    return written


def slug(text: str) -> str:
    """Letters and digits, for file names."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def slugs(labels: Sequence[str]) -> dict[str, str]:
    """A file name for each attack: the plugin's name alone where that tells them apart."""
    names = [label.partition(":")[0] for label in labels]
    return {label: slug(label if names.count(name) > 1 else name) for label, name in zip(labels, names, strict=True)}


def walls(folder: RunFolder, cells: list[dict[str, Any]], figures: Path, redact: bool) -> list[Path]:
    """Reconstructions beside the originals, one wall for each attack, seed and observed round."""
    written: list[Path] = []
    attacked = [c for c in cells if (folder.artifacts(c["id"]) / "reconstructions.safetensors").is_file()]
    names = slugs(list(dict.fromkeys(attack_label(c) for c in attacked)))
    for attack, name in names.items():
        for seed in sorted({c["seed"] for c in attacked}):
            chosen = [c for c in attacked if c["seed"] == seed and attack_label(c) == attack]
            for number in sorted({int(r) for c in chosen for r in c.get("leakage", {}).get("by_round", {})}):
                rows = wall(folder, chosen, number)
                if rows:
                    more = f"-{name}" if len(names) > 1 else ""
                    path = figures / f"reconstructions{more}-round-{number}-seed-{seed}"
                    written += plotting.reconstruction_wall(rows, path, redact=redact)
    return written


def rocs(cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Attack -> defense -> (false-positive, true-positive rate) of its headline method, of the first seed."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    first = min((c["seed"] for c in cells), default=0)
    for cell in cells:
        table = cell.get("leakage", {}).get("membership", {})
        method = table.get("headline", {}).get("method")
        curve = table.get("attacks", {}).get(method, {}).get("roc")
        if curve and cell["seed"] == first:
            own = found.setdefault(attack_label(cell), {})
            own[f"{short(defense(cell))}, {method}"] = [(float(x), float(y)) for x, y in curve]
            if blind := table.get("blind", {}).get("roc"):
                own.setdefault("without the model", [(float(x), float(y)) for x, y in blind])
    return found


def without_share(attack: str) -> tuple[str, float | None]:
    """An attack without its share of malicious clients, and that share."""
    spec = PluginSpec.parse(attack)
    share = spec.params.get("fraction")
    rest = PluginSpec(spec.name, {k: v for k, v in spec.params.items() if k != "fraction"})
    return str(rest), None if share is None else float(share)


def lesser_shares(attacks: Sequence[str]) -> set[str]:
    """Attacks that also stand there with a larger share: the breakdown curve shows all, and no figure of their own."""
    split = {attack: without_share(attack) for attack in attacks}
    largest: dict[str, float] = {}
    for rest, share in split.values():
        if share is not None:
            largest[rest] = max(share, largest.get(rest, share))
    return {attack for attack, (rest, share) in split.items() if share is not None and share < largest[rest]}


def breakdowns(
    found: Sequence[Point], cells: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, list[tuple[float, Mapping[str, Any]]]]]:
    """Attack without its share -> defense -> (share of malicious clients, test AUC), from 0 where that was computed."""
    clean = {p.defense: p.utility for p in found if p.measure.higher_is_worse or p.undisturbed}
    curves: dict[str, dict[str, list[tuple[float, Mapping[str, Any]]]]] = {}
    for point in found:
        rest, share = without_share(point.attack)
        if share is None or point.measure.path != UTILITY:
            continue
        own = curves.setdefault(rest, {}).setdefault(short(point.defense), [])
        if not own and point.defense in clean and point.undisturbed:
            own.append((0.0, clean[point.defense]))
        own.append((share, point.leakage))
    return {
        attack: {name: sorted(own, key=lambda item: item[0]) for name, own in rows.items()}
        for attack, rows in curves.items()
        if max(sum(share > 0 for share, _ in own) for own in rows.values()) > 1
    }


def trainings(folder: RunFolder, cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Attack that is part of the training (else empty) -> defense -> (round, mean over seeds of the validation AUC)."""
    runs: dict[str, dict[str, dict[str, list[tuple[int, float]]]]] = {}
    for cell in cells:
        if points_of := curve(folder, cell):
            attack = attack_label(cell) if changes_training(cell) else ""
            runs.setdefault(attack, {}).setdefault(short(defense(cell)), {})[cell["training"]] = points_of
    return {
        attack: {name: mean_curve(list(seeds.values())) for name, seeds in rows.items()}
        for attack, rows in runs.items()
    }


def mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean of several curves, in the rounds that all of them have."""
    tables = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    return [(number, sum(table[number] for table in tables) / len(tables)) for number in shared]


def wall(folder: RunFolder, cells: Sequence[Mapping[str, Any]], number: int) -> list[tuple[str, Tensor]]:
    """Rows of one observed round: the originals, what each cell's attack recovered, and the public mean image."""
    rows: list[tuple[str, Tensor]] = []
    mean: Tensor | None = None
    for cell in cells:
        path = folder.artifacts(cell["id"]) / "reconstructions.safetensors"
        if not path.is_file():
            continue
        originals, recovered, mean = paired(path, number)
        if not rows:
            rows.append(("original", originals[:SHOWN]))
        rows.append((f"recovered, {short(defense(cell))}", recovered[:SHOWN]))
    if mean is not None:
        rows.append(("public mean image", mean.expand_as(rows[0][1])))
    return rows


def paired(path: Path, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Originals (N, C, H, W) of one round, what was recovered of each, and the public mean image (C, H, W).

    Matched batch by batch as they are scored: batches come back in any order, and a sum of clients gives more images
    than the victim sent. The mean image stands where nothing was recovered.
    """
    import torch

    from fedsec.metrics.image import match

    tensors, _ = checkpoint.load(path)
    mean = tensors["public_mean"]
    originals, recovered = [], []
    for key in sorted(k for k in tensors if f"/round-{number}/" in k and k.endswith("/original")):
        truths, images = tensors[key].float(), tensors[key.removesuffix("original") + "recovered"].float()
        assigned = match(torch.nan_to_num(images), truths)
        originals.append(truths)
        recovered.append(torch.stack([mean if k is None else images[k] for k in assigned]))
    return torch.cat(originals), torch.cat(recovered), mean


def curve(folder: RunFolder, cell: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(round, validation AUC) of a cell's training."""
    path = folder.artifacts(cell["training"]) / "training.json"
    if not path.is_file():
        return []
    history = json.loads(path.read_text(encoding="utf-8"))["history"]
    return [(r["round"], r["validation_auc"]) for r in history if r["validation_auc"] is not None]


def defense(cell: Mapping[str, Any]) -> str:
    """`no defense`, or the stack as people write it."""
    return defense_label(cell) if cell.get("defense") else "no defense"
