"""The figures and pictures of a report, made for one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsec.embed import png, uri
from fedsec.store import RunFolder
from fedsec.tradeoff import Point, attack_label, defense_label

if TYPE_CHECKING:
    from torch import Tensor

PICTURES = 12
"""Pairs of original and reconstruction that are shown, the worst leaks first, one a defended federation."""


def drawings(found: Sequence[Point]) -> list[tuple[str, str]]:
    """(title, data URI) of the trade-off figures and heat maps."""
    import tempfile

    from fedsec import charts
    from fedsec.figures import lesser_shares

    groups: dict[tuple[str, str, str], list[Point]] = {}
    weaker = lesser_shares([p.attack for p in found])
    for p in found:
        if p.attack not in weaker:
            groups.setdefault((p.dataset, p.model, p.attack), []).append(p)
    made = []
    with tempfile.TemporaryDirectory() as name:
        for k, ((dataset, model, attack), own) in enumerate(groups.items()):
            if len(own) > 1 and own[0].undisturbed and k < PICTURES:
                svg = charts.tradeoff_front(own, Path(name) / f"front-{k}")[0]
                made.append((f"Trade-off on {dataset} with {model}: {attack}", uri(svg.read_bytes(), "svg+xml")))
        for k, pair in enumerate(dict.fromkeys((p.dataset, p.model) for p in found)):
            own = [p for p in found if (p.dataset, p.model) == pair]
            if len({p.attack for p in own}) > 1:
                svg = charts.heat_map(own, Path(name) / f"heat-{k}")[0]
                made.append((f"Attacks and defenses on {pair[0]} with {pair[1]}", uri(svg.read_bytes(), "svg+xml")))
    return made


def pictures(cells: Sequence[tuple[RunFolder, Mapping[str, Any]]], redact: bool) -> list[dict[str, Any]]:
    """The best reconstruction of each attacked, defended federation: the worst leak first."""
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for folder, cell in cells:
        rows = cell.get("leakage", {}).get("images")
        path = folder.artifacts(cell["id"]) / "reconstructions.safetensors"
        if not rows or not path.is_file():
            continue
        top = max((r["psnr"] for r in rows if r["psnr"] is not None), default=None)
        key = (str(cell["dataset"]), attack_label(cell), defense_label(cell))
        if top is not None and (key not in best or top > best[key]["psnr"]):
            best[key] = {"cell": cell, "path": path, "psnr": top}
    shown = []
    for (dataset, attack, defense), item in sorted(best.items(), key=lambda pair: -pair[1]["psnr"])[:PICTURES]:
        original, recovered, value = _best_pair(item["path"], item["cell"]["leakage"]["round"])
        shown.append(
            {
                "title": f"{defense}, seed {item['cell']['seed']}",
                "attack": f"{attack} on {dataset}",
                "psnr": value,
                "original": _png(original, redact),
                "recovered": _png(recovered, redact),
            }
        )
    return shown


def _best_pair(path: Path, number: int) -> tuple[Tensor, Tensor, float]:
    """Original and reconstruction of the image that was recovered best in one round, and its PSNR."""
    import torch

    from fedsec.figures import paired
    from fedsec.metrics.image import psnr

    originals, recovered, _ = paired(path, number)
    values = psnr(torch.nan_to_num(recovered), originals)
    k = int(values.argmax())
    return originals[k], torch.nan_to_num(recovered[k]), float(values[k])


def _png(image: Tensor, redact: bool) -> str:
    from fedsec.plotting import blurred

    return png((blurred(image) if redact else image).permute(1, 2, 0).numpy())
