"""How the benchmark of gradient inversion is read: a table, the goals it is held against, and a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich import box
from rich.console import Console
from rich.table import Table

from fedsec.plotting import COLOURS, DASHES, MARKERS

Row = Mapping[str, Any]
WIDTH = 170
COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "victims": lambda r: f"{r['case']} {r['state']}",
    "contender": lambda r: r["contender"] + (f": {r['answered_by']}" if r["contender"] == "fedsec auto" else ""),
    "labels": lambda r: f"{r['labels']} {r['labels_right']:.0%}",
    "PSNR dB": lambda r: decibels(r["psnr"]),
    "lowest": lambda r: decibels(r["psnr_lowest"]),
    "SSIM": lambda r: f"{r['ssim']:.2f}",
    "proven": lambda r: f"{r['certified']}/{r['images']}" if r["contender"].startswith("fedsec") else "",
    "CPU s": lambda r: seconds(r["cpu_seconds"]),
    "20 dB at": lambda r: seconds(r["seconds_to"]["20"]),
    "30": lambda r: seconds(r["seconds_to"]["30"]),
    "40": lambda r: seconds(r["seconds_to"]["40"]),
    "mean": lambda r: decibels(r["prior_psnr"]),
    "nearest": lambda r: decibels(r["nearest_public_psnr"]),
}
"""Heading -> cell. `labels`: where from, and the share of batches in which all are right. The last two are what anybody
could hand in: the mean public image, and the public image most like the victim, chosen with the truth."""


def decibels(value: float) -> str:
    """One digit; 140 is the cap."""
    return "≥ 140" if value >= 139.95 else f"{value:.1f}"


def seconds(value: float | None) -> str:
    """Two digits that matter; a dash for never."""
    return "–" if value is None else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def line(row: Row) -> str:
    """One finished row, for the progress on standard error."""
    what = f"{row['case']} {row['state']}, {row['contender']}"
    return f"{what}: {decibels(row['psnr'])} dB in {seconds(row['cpu_seconds'])} s of {row['victims']} victims"


def show(rows: Sequence[Row]) -> None:
    """The table and the goals, on standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe or a file has no edge to wrap at
        console.width = WIDTH
    title = "gradient inversion: median over victims; CPU seconds, one thread"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in COLUMNS:
        words = heading in ("victims", "contender", "labels")
        table.add_column(heading, justify="left" if words else "right", overflow="fold")
    before: tuple[str, str] | None = None
    for row in rows:
        here = row["case"], row["state"]
        if before not in (None, here):
            table.add_section()
        table.add_row(*(cell(row) for cell in COLUMNS.values()))
        before = here
    console.print(table)
    for goal in goals(rows):
        console.print(goal, markup=False, soft_wrap=True)


def markdown(rows: Sequence[Row]) -> str:
    """The same table for docs/benchmarks.md."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row) for cell in COLUMNS.values()) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"* {goal}" for goal in goals(rows))]) + "\n"


@dataclass(frozen=True)
class Goal:
    """A threshold of the specification, section 6.3, on the row of `fedsec auto`."""

    name: str
    case: str
    states: tuple[str, ...]
    text: str
    met: Callable[[Row, Sequence[Row]], bool]
    measured: Callable[[Row, Sequence[Row]], str]
    """The numbers to print beside the verdict."""


def _share_within(row: Row, mark: int, limit: float) -> float:
    reached = [v["seconds_to"][str(mark)] for v in row["victim_rows"]]
    return sum(s is not None and s <= limit for s in reached) / len(reached)


def _best_peer(rivals: Sequence[Row]) -> float:
    return max((float(r["psnr_of_mean_mse"]) for r in rivals), default=math.nan)


def _exact(case: str, states: tuple[str, ...], limit: float) -> Goal:
    return Goal(
        "G1" if case == "lenet-b1" else "G2",
        case,
        states,
        f"every image proven and at least 60 dB, each in {limit} s",
        lambda r, _: r["certified"] == r["images"] and r["psnr_lowest"] >= 60 and r["cpu_seconds_slowest"] <= limit,
        lambda r, _: (
            f"{r['certified']} of {r['images']} proven, lowest {decibels(r['psnr_lowest'])} dB, "
            f"slowest {seconds(r['cpu_seconds_slowest'])} s"
        ),
    )


def _thirty(state: str, limit: float) -> Goal:
    return Goal(
        "G3",
        "lenet-b4",
        (state,),
        f"30 dB in {limit} s in 9 of 10 batches",
        lambda r, _: _share_within(r, 30, limit) >= 0.9,
        lambda r, _: f"{_share_within(r, 30, limit):.0%} of {r['victims']}, median {seconds(r['seconds_to']['30'])} s",
    )


GOALS = (
    _exact("lenet-b1", ("untrained", "trained"), 0.2),
    _exact("mlp-b8", ("untrained",), 0.1),
    _exact("mlp-b16", ("untrained",), 0.2),
    _exact("mlp-b32", ("untrained",), 0.5),
    Goal(
        "G2",
        "mlp-b8",
        ("trained",),
        "complete in 9 of 10 batches",
        lambda r, _: sum(v["certified"] == r["batch"] for v in r["victim_rows"]) >= 0.9 * r["victims"],
        lambda r, _: f"{sum(v['certified'] == r['batch'] for v in r['victim_rows'])} of {r['victims']} batches",
    ),
    Goal(
        "G2",
        "mlp-b16",
        ("trained",),
        "three quarters of the images",
        lambda r, _: r["certified"] >= 0.75 * r["images"],
        lambda r, _: f"{r['certified']} of {r['images']} images",
    ),
    _thirty("untrained", 2.6),
    _thirty("trained", 8.0),
    Goal(
        "G4",
        "lenet-b1@1",
        ("untrained", "trained"),
        "4 dB above the best of the peer under noise as large as the gradient",
        lambda r, peers: bool(r["psnr_of_mean_mse"] >= _best_peer(peers) + 4),
        lambda r, peers: f"{r['psnr_of_mean_mse']:.1f} against {_best_peer(peers):.1f} dB, of the mean squared error",
    ),
    Goal(
        "G5",
        "convnet-b1",
        ("untrained",),
        "22 dB in 60 s",
        lambda r, _: r["psnr"] >= 22 and r["cpu_seconds"] <= 60,
        lambda r, _: f"{r['psnr']:.1f} dB in {seconds(r['cpu_seconds'])} s",
    ),
)


def goals(rows: Sequence[Row]) -> list[str]:
    """A sentence for every goal that the rows can answer."""
    found = []
    for goal in GOALS:
        for state in goal.states:
            here = [r for r in rows if (r["case"], r["state"]) == (goal.case, state)]
            peers = [r for r in here if r["contender"].startswith("breaching")]
            auto = next((r for r in here if r["contender"] == "fedsec auto"), None)
            if auto is None or (goal.name == "G4" and not peers):
                continue
            verdict = "met" if goal.met(auto, peers) else "missed"
            found.append(f"{goal.name} {goal.case} {state}, {goal.text}: {verdict} ({goal.measured(auto, peers)})")
    return found


def plot(rows: Sequence[Row], path: Path) -> None:
    """PSNR of the best iterate so far against CPU seconds, one panel a case and state; legible without colours.

    Best is judged with the truth, for both sides alike; the large marker is what was handed in, chosen without it.
    """
    panels = list(dict.fromkeys((r["case"], r["state"]) for r in rows))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.9 * columns, 2.5 * lines + 0.9), facecolor="white", layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
    names = list(dict.fromkeys(r["contender"] for r in rows))
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _panel(axes, [r for r in rows if (r["case"], r["state"]) == panel], names)
        axes.set_title(" ".join(panel), fontsize=9, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("CPU seconds", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("PSNR, dB", fontsize=8)
    handles = [Line2D([], [], label=name, **_style(k)) for k, name in enumerate(names)]
    handles.append(Line2D([], [], label="mean public X-ray", color="#555555", linewidth=0.8))
    handles.append(Line2D([], [], label="nearest public X-ray", color="#555555", linewidth=0.8, linestyle=(0, (1, 2))))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7.5, frameon=False, handlelength=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=160)


def _panel(axes: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    for row in rows:
        style = _style(names.index(row["contender"]))
        times, values = median_curve([v["curve"] for v in row["victim_rows"]])
        end = max(row["cpu_seconds"], times[-1])
        axes.step([*times, end], [*values, values[-1]], where="post", markevery=0.3, **{**style, "markersize": 3})
        axes.plot([end], [row["psnr"]], **{**style, "markersize": 7, "markeredgecolor": "white"})
    axes.axhline(rows[0]["prior_psnr"], color="#555555", linewidth=0.8, zorder=0)
    axes.axhline(rows[0]["nearest_public_psnr"], color="#555555", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
    axes.set_xscale("log")
    axes.tick_params(labelsize=7, labelbottom=True)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _style(k: int) -> dict[str, Any]:
    """Colour, dashes and marker of the k-th contender."""
    return {
        "color": COLOURS[k % len(COLOURS)],
        "linestyle": DASHES[k % len(DASHES)],
        "marker": MARKERS[k % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.5,
    }


def median_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """The median over victims of the best that each attack had held by a time, from when all hold something."""
    steps = [(np.array([t for t, _ in c]), np.array([v for _, v in c])) for c in curves]
    times = np.unique(np.concatenate([t for t, _ in steps]))
    times = times[times >= max(t[0] for t, _ in steps)]
    held = [v[np.searchsorted(t, times, side="right") - 1] for t, v in steps]
    return times.tolist(), np.median(held, axis=0).tolist()
