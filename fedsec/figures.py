"""The figures of a finished run, drawn from what its folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsec import checkpoint, plotting
from fedsec.config import Cell
from fedsec.plugins import PluginSpec
from fedsec.store import RunFolder

SHOWN = 8
"""Images in a row of the reconstruction wall."""


def draw(run: Path, redact: bool = False) -> list[Path]:
    """Draw all figures that the run's cells have data for; returns the files written."""
    folder = RunFolder.open(run)
    cells = list(folder.results())
    figures = folder.path / "figures"
    written: list[Path] = []
    for seed in sorted({c["seed"] for c in cells}):
        chosen = [c for c in cells if c["seed"] == seed]
        for number in sorted({int(r) for c in chosen for r in c.get("leakage", {}).get("by_round", {})}):
            rows = wall(folder, chosen, number)
            if rows:
                path = figures / f"reconstructions-round-{number}-seed-{seed}"
                written += plotting.reconstruction_wall(rows, path, redact=redact)
    curves = {title(c, cells): curve(folder, c) for c in cells}
    curves = {name: points for name, points in curves.items() if points}
    if curves:
        written += plotting.training_curve(curves, figures / "training", ylabel="validation AUC")
    return written


def wall(folder: RunFolder, cells: Sequence[Mapping[str, Any]], number: int) -> list[tuple[str, Tensor]]:
    """Rows of one observed round: the originals, what each cell's attack recovered, and the public mean image."""
    rows: list[tuple[str, Tensor]] = []
    mean: Tensor | None = None
    for cell in cells:
        path = folder.artifacts(cell["id"]) / "reconstructions.safetensors"
        if not path.is_file():
            continue
        tensors, _ = checkpoint.load(path)
        mean = tensors["public_mean"]
        keys = sorted(k for k in tensors if f"/round-{number}/" in k)
        originals, recovered = (
            [image for k in keys if k.endswith(kind) for image in tensors[k]][:SHOWN]
            for kind in ("original", "recovered")
        )
        if not rows:
            rows.append(("original", _stack(originals)))
        rows.append((f"recovered, {defense(cell)}", _stack(recovered)))
    if mean is not None:
        rows.append(("public mean image", mean.expand_as(rows[0][1])))
    return rows


def curve(folder: RunFolder, cell: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(round, validation AUC) of a cell's training."""
    path = folder.artifacts(cell["training"]) / "training.json"
    if not path.is_file():
        return []
    history = json.loads(path.read_text(encoding="utf-8"))["history"]
    return [(r["round"], r["validation_auc"]) for r in history if r["validation_auc"] is not None]


def defense(cell: Mapping[str, Any]) -> str:
    """`no defense`, or the stack as people write it."""
    stack = tuple(PluginSpec.from_table(table) for table in cell.get("defense", []))
    return Cell(defense=stack).label() if stack else "no defense"


def title(cell: Mapping[str, Any], cells: list[dict[str, Any]]) -> str:
    """The defense, and the seed where there are several."""
    return defense(cell) + (f", seed {cell['seed']}" if len({c["seed"] for c in cells}) > 1 else "")


def _stack(images: list[Tensor]) -> Tensor:
    import torch

    return torch.stack(images)
