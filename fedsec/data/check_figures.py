"""What a data set looks like: a sheet of images by class, and bars of the labels by part and site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsec.data.base import Dataset
from fedsec.data.digest import PARTS
from fedsec.data.report import class_counts
from fedsec.files import replacing

PER_CLASS = 8
CLASSES = 16
"""Rows of the sheet; a set with more classes shows the first ones and says so."""
COLOURS = {"train": "#1f5f8b", "val": "#e0a030", "test": "#8b2f5f", "": "#808080"}
THUMB = 0.9
"""Inches of one image on the sheet."""


def contact_sheet(dataset: Dataset, path: Path, seed: int = 0) -> None:
    """Up to eight images of each class, drawn at random, one row a class (PNG)."""
    plt = _pyplot()
    names = dataset.class_names[:CLASSES]
    rng = np.random.default_rng(seed)
    figure, axes = plt.subplots(
        len(names), PER_CLASS, figsize=(PER_CLASS * THUMB + 2, len(names) * THUMB + 0.5), squeeze=False
    )
    for row, name in zip(axes, names, strict=True):
        members = np.flatnonzero(_has(dataset, list(names).index(name)))
        chosen = np.sort(rng.choice(members, min(PER_CLASS, len(members)), replace=False))
        pixels = dataset.images.read(chosen)
        for i, axis in enumerate(row):
            axis.set_axis_off()
            if i < len(chosen):
                grey = pixels.shape[3] == 1
                axis.imshow(pixels[i, :, :, 0] if grey else pixels[i], cmap="gray" if grey else None, vmin=0, vmax=255)
        row[0].text(
            -0.1, 0.5, _label(name, len(members)), transform=row[0].transAxes, ha="right", va="center", fontsize=8
        )
    hidden = dataset.num_classes - len(names)
    more = f"; {hidden} more classes are not shown" if hidden else ""
    figure.suptitle(f"{dataset.name}, {dataset.variant}: images of patients, not to be passed on{more}", fontsize=8)
    figure.tight_layout(pad=0.3, rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    _save(figure, path)


def label_bars(dataset: Dataset, path: Path) -> None:
    """Images of each class in each part and, where sites are known, at each site (PNG)."""
    plt = _pyplot()
    parts = [part for part in (*PARTS, "") if np.any(dataset.split == part)]
    sites = sorted(set(dataset.meta["site"].tolist()) - {""}) if "site" in dataset.meta else []
    panels = 2 if len(sites) > 1 else 1
    height = max(2.2, 0.28 * dataset.num_classes + 1)
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, height), squeeze=False, sharey=True)
    by_part = [(part or "no part", dataset.split == part, COLOURS[part]) for part in parts]
    _bars(axes[0][0], dataset, by_part, "part")
    if panels == 2:
        colours = plt.get_cmap("tab10").colors
        by_site = [(s, dataset.meta["site"] == s, colours[i % 10]) for i, s in enumerate(sites)]
        _bars(axes[0][1], dataset, by_site, "site")
    figure.suptitle(f"{dataset.name}: {len(dataset):,} images, {dataset.task}", fontsize=9)
    figure.tight_layout()
    _save(figure, path)


def _bars(axis: Any, dataset: Dataset, pieces: list[tuple[str, npt.NDArray[np.bool_], Any]], title: str) -> None:
    """Stacked horizontal bars, the first class on top."""
    left = np.zeros(dataset.num_classes)
    at = np.arange(dataset.num_classes)
    for name, mask, colour in pieces:
        counts = class_counts(dataset.labels[mask], dataset.num_classes)
        axis.barh(at, counts, left=left, color=colour, label=f"{name} ({int(mask.sum()):,})")
        left = left + counts
    for y, total in zip(at, left, strict=True):
        axis.text(total, y, f" {int(total):,}", va="center", fontsize=7)
    axis.set_yticks(at, dataset.class_names, fontsize=7)
    if not axis.yaxis_inverted():
        axis.invert_yaxis()
    axis.set_xlim(0, max(1.0, float(left.max())) * 1.15)
    axis.set_xlabel("images" if dataset.task != "multilabel" else "images with the label", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.legend(title=title, fontsize=7, title_fontsize=7, loc="best")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _has(dataset: Dataset, label: int) -> npt.NDArray[np.bool_]:
    if dataset.task == "multilabel":
        return np.asarray(np.nan_to_num(dataset.labels[:, label]) >= 0.5)
    return np.asarray(dataset.labels == label)


def _label(name: str, count: int) -> str:
    short = name if len(name) <= 24 else f"{name[:23]}…"
    return f"{short}\n{count:,}"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    _pyplot().close(figure)
