"""How do results become figures: a wall of reconstructions and training curves, as SVG, PNG and the numbers as CSV.

Figures are drawn without pyplot, so that nothing is left behind in a process that also trains.
"""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedsec.metrics.image import psnr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_COLUMNS = 8
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito (2008) without yellow, which white paper swallows."""
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
LABEL_WIDTH = 32
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REDACTED_CELLS = 4
"""A redacted image is this many grey or colour cells wide and high."""

_CELL, _GAP, _CAPTION, _TITLE, _NOTE = 1.05, 0.08, 0.2, 1.5, 0.28
MUTED = "#555555"


def reconstruction_wall(rows: Sequence[tuple[str, Tensor]], path: str | Path, *, redact: bool = False) -> list[Path]:
    """Attacked images and what was made of them, one row each, with the PSNR of every image below it.

    Args:
        rows: (title, (N, C, H, W) images in [0, 1], grey or RGB). The first row holds the originals; a row of one
            image, such as the public mean, is repeated. Beyond eight columns images are left out, and a note says so.
        path: where to write, without suffix; `.svg`, `.png` and `.csv` are written beside each other.
        redact: blur every image beyond recognition; the PSNR values stay those of the real images.

    Returns:
        The files written.
    """
    from matplotlib.figure import Figure

    if not rows or not len(rows[0][1]):
        raise ValueError("a wall needs at least one row, and its first row the original images")
    originals = rows[0][1].detach().cpu().float()
    total, shown = len(originals), min(len(originals), MAX_COLUMNS)
    walls = [(title, _fill(title, images, total)[:shown]) for title, images in rows]
    captions = [_decibels(images, originals[:shown]) for _, images in walls]

    height, width = originals.shape[-2:]
    tall = _CELL * height / width
    size = (_TITLE + shown * (_CELL + _GAP), len(rows) * (tall + _CAPTION + _GAP) - _CAPTION + _NOTE)
    figure = Figure(figsize=size, facecolor="white")
    for r, (title, images) in enumerate(walls):
        top = size[1] - r * (tall + _CAPTION + _GAP) + (_CAPTION if r else 0)
        label = wrapped(title, 19)
        figure.text(
            (_TITLE - 0.12) / size[0],
            (top - tall / 2) / size[1],
            label,
            ha="right",
            va="center",
            fontsize=min(8.5, 60 * tall / (label.count("\n") + 1)),
            fontweight="bold" if r == 0 else "normal",
        )
        for c, image in enumerate(images):
            left = _TITLE + c * (_CELL + _GAP)
            axes = figure.add_axes((left / size[0], (top - tall) / size[1], _CELL / size[0], tall / size[1]))
            _draw_image(axes, image, redact)
            if r:
                axes.set_xlabel(_caption(captions[r][c]), fontsize=8, labelpad=2.5)
    notes = ["PSNR against the top row"]
    notes += [f"first {shown} of {total} images"] if total > shown else []
    notes += ["blurred on purpose"] if redact else []
    figure.text(_TITLE / size[0], 0.08 / size[1], "; ".join(notes), fontsize=7, color=MUTED)

    table = [
        (title, c, f"{value:.4f}")
        for (title, _), row in zip(walls, captions, strict=True)
        for c, value in enumerate(row)
    ]
    return write_figure(figure, Path(path), ("row", "image", "psnr_db"), table)


def training_curve(
    curves: Mapping[str, Sequence[tuple[int, float]]], path: str | Path, *, ylabel: str = "test AUC"
) -> list[Path]:
    """A measure of the global model after each round, one line a cell, each labelled where it ends.

    Args:
        curves: name -> (round, value) in order; rounds without a finite value are gaps.
        path: where to write, without suffix; `.svg`, `.png` and `.csv` are written beside each other.
        ylabel: what the values are.

    Returns:
        The files written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawn = {name: np.array(points, dtype=float) for name, points in curves.items() if len(points)}
    drawn = {name: points for name, points in drawn.items() if np.isfinite(points[:, 1]).any()}
    if not drawn:
        raise ValueError("no curve has a value; give at least one (round, value) pair")
    figure = Figure(figsize=(6.4, 3.8), facecolor="white")
    axes = figure.add_axes((0.11, 0.14, 0.86, 0.8))
    for k, (name, points) in enumerate(drawn.items()):
        axes.plot(points[:, 0], points[:, 1], label=name, markevery=max(1, len(points) // 8), **line_style(k))
    everything = np.concatenate(list(drawn.values()))
    axes.set_xlim(*span(everything[:, 0], 0.5))
    axes.set_ylim(*span(everything[np.isfinite(everything[:, 1]), 1], 0.1))
    axes.set_xlabel("round", fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    label_ends(axes, drawn, figure.get_figheight() * 72 * axes.get_position().height)
    silent = [name for name in curves if name not in drawn]
    if silent:
        figure.text(0.11, 0.005, f"no value: {', '.join(silent)}", fontsize=7, color=MUTED)
    table = [(name, number, f"{value:.6f}") for name, points in curves.items() for number, value in points]
    return write_figure(figure, Path(path), ("curve", "round", ylabel), table)


def spread(places: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Ascending places of labels moved as little as possible, in squares, until labels of these sizes do not overlap.

    By pooling adjacent violators: places less the sizes stacked below them must not decrease. Labels that fit together
    between 0 and 1 stay there; those that do not fill it and leave it by as little as they must.
    """
    stacked = np.cumsum(sizes) - np.asarray(sizes) / 2
    pools: list[list[float]] = []
    for place in np.asarray(places, dtype=float) - stacked:
        pools.append([place])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    room = 1 - float(np.sum(sizes))
    if room < 0:
        pools = [[base for pool in pools for base in pool]]
    bases = np.clip([np.mean(pool) for pool in pools for _ in pool], min(0.0, room), max(0.0, room))
    return [float(place) for place in bases + stacked]


def label_ends(axes: Axes, curves: Mapping[str, NDArray[np.float64]], height: float) -> None:
    """Names right of the lines' ends, moved apart where lines end close together; `height` of the axes in points."""
    low, high = axes.get_ylim()
    ends = []
    for k, (name, points) in enumerate(curves.items()):
        x, y = points[np.isfinite(points[:, 1])][-1]
        ends.append(((y - low) / (high - low), x, wrapped(name, LABEL_WIDTH), line_style(k)))
    ends.sort(key=lambda end: end[0])
    places = spread([end[0] for end in ends], [(11 * end[2].count("\n") + 12.5) / height for end in ends])
    for (fraction, x, text, style), place in zip(ends, places, strict=True):
        axes.annotate(
            "",
            xy=(x, low + fraction * (high - low)),
            xytext=(1.03, place),
            textcoords="axes fraction",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": style["color"], "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        )
        axes.plot([1.04], [place], transform=axes.transAxes, clip_on=False, **style)
        axes.text(1.058, place, text, transform=axes.transAxes, va="center", fontsize=8.5, linespacing=1.1)


def wrapped(text: str, width: int) -> str:
    """Lines of at most `width` characters, broken at spaces and after commas."""
    spaced = ", ".join(part.strip() for part in text.split(","))
    return textwrap.fill(spaced, width, break_on_hyphens=False)


def line_style(k: int) -> dict[str, Any]:
    """Colour, dashes and marker of the k-th line; no two of the first 28 agree in dashes and marker."""
    return {
        "color": COLOURS[k % len(COLOURS)],
        "linestyle": DASHES[k % len(DASHES)],
        "linewidth": 1.6,
        "marker": MARKERS[k % len(MARKERS)],
        "markersize": 4.5,
    }


def span(values: NDArray[np.float64], least: float) -> tuple[float, float]:
    """Limits with a margin, at least `least` apart, so that noise does not fill the page."""
    low, high = float(values.min()), float(values.max())
    margin = max(0.07 * (high - low), (least - (high - low)) / 2)
    return low - margin, high + margin


def blurred(image: Tensor) -> Tensor:
    """A (C, H, W) image reduced to 4x4 cells and smoothed: shows that there was an image, and not of whom."""
    cells = F.adaptive_avg_pool2d(image[None], REDACTED_CELLS)
    return F.interpolate(cells, image.shape[-2:], mode="bilinear", align_corners=False)[0]


def _draw_image(axes: Axes, image: Tensor, redact: bool) -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(linewidth=0.5, color="#999999")
    if not torch.isfinite(image).all():
        axes.text(0.5, 0.5, "not finite", ha="center", va="center", fontsize=8, color=MUTED, transform=axes.transAxes)
        return
    image = image.clamp(0, 1)
    pixels = (blurred(image) if redact else image).permute(1, 2, 0).numpy()
    if pixels.shape[2] == 1:
        axes.imshow(pixels[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    else:
        axes.imshow(pixels, interpolation="nearest", aspect="auto")


def _fill(title: str, images: Tensor, columns: int) -> Tensor:
    images = images.detach().cpu().float()
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"row {title!r} has shape {tuple(images.shape)}; give (N, 1 or 3, H, W)")
    if len(images) not in (1, columns):
        raise ValueError(f"row {title!r} has {len(images)} images beside {columns} originals; give 1 or {columns}")
    return images.expand(columns, *images.shape[1:])


def _decibels(images: Tensor, originals: Tensor) -> list[float]:
    finite = torch.isfinite(images).flatten(1).all(1)
    return torch.where(finite, psnr(torch.nan_to_num(images), originals), torch.nan).tolist()


def _caption(value: float) -> str:
    if value != value:
        return "–"
    return "≥ 140 dB" if value >= 140 else f"{value:.1f} dB"


def write_figure(figure: Figure, path: Path, header: Sequence[str], table: Iterable[Sequence[Any]]) -> list[Path]:
    """Write a figure as SVG and PNG, and the numbers in it as CSV, beside each other."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stem = path.with_suffix("") if path.suffix in {".svg", ".png", ".csv"} else path
    svg, png, numbers = (stem.with_name(stem.name + suffix) for suffix in (".svg", ".png", ".csv"))
    stem.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    # A fixed salt and no date: the same results give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "fedsec"}):
        figure.savefig(svg, bbox_inches="tight", pad_inches=0.08, metadata={"Date": None})
    figure.savefig(png, dpi=200, bbox_inches="tight", pad_inches=0.08)
    with numbers.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *table])
    return [svg, png, numbers]
