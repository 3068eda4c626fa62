"""The price of privacy in pictures: trade-off front, heat map, ROC, breakdown curve and cost, as SVG, PNG and CSV.

Each chart takes numbers and draws them; `fedsec.figures` finds the numbers in run folders. Colours differ in lightness
as well, and markers or dashes in shape, so that a grey print tells them apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsec.plotting import (
    COLOURS,
    LABEL_WIDTH,
    MARKERS,
    MUTED,
    label_ends,
    line_style,
    span,
    spread,
    wrapped,
    write_figure,
)
from fedsec.tradeoff import Measure, Point, attack_label, defense_label, pareto, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Number = float | None
COLUMNS = "attack defense epsilon utility utility_low utility_high leakage leakage_low leakage_high seeds on_front"


def tradeoff_front(points: Sequence[Point], path: Path) -> list[Path]:
    """What each defense leaves of the model and of the leakage, one point a defense, for one attack.

    Args:
        points: of one data set, model and attack.
        path: where to write, without suffix.
    """
    import numpy as np
    from matplotlib.figure import Figure

    measure = points[0].measure
    labels = [_point_label(p) for p in points]
    height = max(3.9, 0.9 + 0.21 * sum(1 + label.count("\n") for label in labels))
    figure = Figure(figsize=(6.4, height), facecolor="white")
    axes = figure.add_axes((0.11, 0.62 / height, 0.86, 1 - 1.1 / height))
    families = list(dict.fromkeys(p.family for p in points))
    front = pareto(points)
    for p in points:
        style = _marker(families.index(p.family), p.family)
        axes.errorbar(
            p.leakage["value"], p.utility["value"], xerr=_error(p.leakage), yerr=_error(p.utility), capsize=2,
            elinewidth=0.8, ecolor="#999999", markersize=6.5, markeredgecolor="white", markeredgewidth=0.6,
            linestyle="none", zorder=3, **style,
        )  # fmt: skip
    axes.plot(
        [p.leakage["value"] for p in front],
        [p.utility["value"] for p in front],
        color="#000000",
        linewidth=0.9,
        linestyle=(0, (5, 2)),
        zorder=2,
    )
    undefended = next((p for p in points if p.defense == "none"), None)
    lines = [(name, value, ":") for name, value in points[0].baselines]
    if undefended is not None:
        axes.axhline(undefended.utility["value"], color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
        lines.append(("no defense", undefended.leakage["value"], "-."))
    x = [p.leakage["value"] for p in points] + [value for _, value, _ in lines]
    ends = [p.utility[k] for p in points for k in ("value", "low", "high") if p.utility.get(k) is not None]
    axes.set_xlim(*span(np.array(x), 5 * measure.least))
    axes.set_ylim(*span(np.array(ends), 0.1))
    low, high = axes.get_xlim()
    if measure.percent:
        axes.set_xlim(max(low, 0.0), min(high, 1.0))
    near = len(lines) > 1 and abs(lines[0][1] - lines[-1][1]) < 0.17 * (high - low)
    for name, value, dashes in lines:
        axes.axvline(value, color=MUTED, linewidth=0.9, linestyle=dashes, zorder=1)
        left = value == min(v for _, v, _ in lines)
        side = ("right" if left else "left") if near else "center"
        axes.text(
            value, 1.01, name, transform=axes.get_xaxis_transform(), fontsize=7, ha=side, va="bottom", color=MUTED
        )
    _axes(axes, _unit(measure), "test AUC")
    if measure.percent:
        _percent(axes.xaxis)
    _label_points(axes, points, labels, families, height * 72 * axes.get_position().height)
    title = f"{points[0].dataset}, {points[0].model}: {short(points[0].attack)}"
    figure.text(0.11, 1 - 0.16 / height, wrapped(title, 95), fontsize=8.5, va="center")
    better = "up and left" if measure.higher_is_worse else "up and right"
    note = f"better: {better}; dashed: Pareto front; bars: 95 % intervals; seeds: {_seeds(points)}"
    figure.text(0.11, 0.1 / height, note, fontsize=7, color=MUTED)
    rows = [
        (p.attack, p.defense, p.epsilon if p.epsilon is not None else "", *_three(p.utility), *_three(p.leakage),
         " ".join(map(str, p.seeds)), int(p in front))
        for p in points
    ]  # fmt: skip
    return write_figure(figure, path, COLUMNS.split(), rows)


def heat_map(points: Sequence[Point], path: Path) -> list[Path]:
    """What each attack achieves against each defense; dark is much, from its baseline to the undefended model.

    Args:
        points: of one data set and model. path: where to write, without suffix.
    """
    attacks = list(dict.fromkeys(p.attack for p in points))
    defenses = list(dict.fromkeys(p.defense for p in points))
    at = {(p.attack, p.defense): p for p in points}
    shares = {key: _share(p, at.get((p.attack, "none")), points) for key, p in at.items()}
    values = {key: _value(p.measure, p.leakage["value"]) for key, p in at.items()}
    figure = _grid(
        [[(shares.get((a, d)), values.get((a, d), "–")) for a in attacks] for d in defenses],
        [f"{wrapped(short(a), 20)}\n({_what(at, a, defenses)})" for a in attacks],
        [wrapped(short(d), LABEL_WIDTH) for d in defenses],
        "dark: as much as without a defense; white: no more than without an attack",
    )
    header = ("attack", "defense", "measure", "value", "low", "high", "share_of_undefended")
    rows = [
        (p.attack, p.defense, p.measure.path, *_three(p.leakage), "" if shares[key] is None else f"{shares[key]:.4f}")
        for key, p in at.items()
    ]
    return write_figure(figure, path, header, rows)


def breakdown_map(series: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """Fewest malicious clients that break each rule; dark is early, white is never.

    Args:
        series: entries of `breakdown.json` of one data set and seed. path: where to write, without suffix.
    """
    attacks = list(dict.fromkeys(attack_label(s) for s in series))
    rules = list(dict.fromkeys(defense_label(s) for s in series))
    at = {(attack_label(s), defense_label(s)): s for s in series}

    def entry(attack: str, rule: str) -> tuple[Number, str]:
        found = at.get((attack, rule))
        if found is None or not found["finished"]:
            return None, "–" if found is None else "?"
        if found["point"] is None:
            return 0.0, f"> {found['limit']}"
        return 1 - (found["point"] - 1) / found["limit"], f"{found['point']}{'' if found['monotone'] else '*'}"

    clients = series[0]["clients"]
    figure = _grid(
        [[entry(a, r) for a in attacks] for r in rules],
        [wrapped(short(a), 20) for a in attacks],
        [wrapped(short(r), LABEL_WIDTH) for r in rules],
        f"malicious clients of {clients} that cost the rule its AUC; white: none up to the number shown",
    )
    header = ("attack", "rule", "clients", "breakdown", "limit", "monotone")
    rows = [(a, r, s["clients"], s["point"] or "", s["limit"], s["monotone"]) for (a, r), s in at.items()]
    return write_figure(figure, path, header, rows)


def _grid(
    entries: Sequence[Sequence[tuple[Number, str]]], columns: Sequence[str], rows: Sequence[str], note: str
) -> Figure:
    """A table whose entries are shaded from 0 (white) to 1 (dark); None is left empty."""
    from matplotlib.figure import Figure

    wide, tall = max(1.9 + 1.15 * len(columns), 4.2), 1.1 + 0.27 * len(rows)
    figure = Figure(figsize=(wide, tall), facecolor="white")
    axes = figure.add_axes((1.75 / wide, 0.3 / tall, 1.15 * len(columns) / wide, 1 - 1.1 / tall))
    numbers = [[float("nan") if v is None else v for v, _ in row] for row in entries]
    axes.imshow(numbers, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(entries):
        for x, (share, text) in enumerate(row):
            colour = "white" if share is not None and share > 0.6 else "black"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), columns, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks([c - 0.5 for c in range(1, len(columns))], minor=True)
    axes.set_yticks([r - 0.5 for r in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    figure.text(0.02, 0.06 / tall, note, fontsize=7, color=MUTED)
    return figure


def roc_curves(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> list[Path]:
    """True- against false-positive rate of membership inference, both logarithmic: the left side is what hurts.

    Args:
        curves: name -> (false-positive rate, true-positive rate), rising. path: where to write, without suffix.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, max(3.8, 0.9 + 0.22 * len(curves))), facecolor="white")
    axes = figure.add_axes((0.11, 0.15, 0.86, 0.8))
    shown = {name: [(x, y) for x, y in points if x > 0 and y > 0] for name, points in curves.items()}
    shown = {name: points for name, points in shown.items() if points}
    least = min([x for points in shown.values() for x, _ in points], default=1e-3)
    axes.set(xscale="log", yscale="log", xlim=(least, 1.0), ylim=(least, 1.3))
    axes.plot([least, 1], [least, 1], color=MUTED, linewidth=0.9, linestyle=":", zorder=1)
    axes.text(least * 1.5, least * 1.15, "guessing", fontsize=7, color=MUTED)
    for k, (_, points) in enumerate(shown.items()):
        axes.plot(*zip(*points, strict=True), markevery=max(1, len(points) // 6), **line_style(k))
    _axes(axes, "false-positive rate", "true-positive rate")
    for k, name in enumerate(shown):
        axes.plot([], [], label=wrapped(name, LABEL_WIDTH), **line_style(k))
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8, frameon=False)
    rows = [(name, f"{x:.6g}", f"{y:.6g}") for name, points in curves.items() for x, y in points]
    return write_figure(figure, path, ("curve", "false_positive_rate", "true_positive_rate"), rows)


def breakdown_curve(
    curves: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]], path: Path, attack: str, ylabel: str = "test AUC"
) -> list[Path]:
    """How much a rule withstands: a measure against the share of malicious clients.

    Args:
        curves: defense -> (share, estimate), rising. path: where to write, without suffix.
        attack: what the malicious clients do. ylabel: what the estimate is.
    """
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), facecolor="white")
    axes = figure.add_axes((0.11, 0.14, 0.86, 0.78))
    drawn = {}
    for k, (name, points) in enumerate(curves.items()):
        x = [share for share, _ in points]
        y = [e["value"] for _, e in points]
        style = line_style(k)
        axes.plot(x, y, **style)
        if all(e.get("low") is not None for _, e in points):
            axes.fill_between(x, [e["low"] for _, e in points], [e["high"] for _, e in points],
                              color=style["color"], alpha=0.1, linewidth=0)  # fmt: skip
        drawn[name] = np.array(list(zip(x, y, strict=True)), dtype=float)
    _axes(axes, f"share of malicious clients ({short(attack)})", ylabel)
    _percent(axes.xaxis)
    label_ends(axes, drawn, figure.get_figheight() * 72 * axes.get_position().height)
    rows = [(name, share, *_three(e)) for name, points in curves.items() for share, e in points]
    return write_figure(figure, path, ("defense", "share", "value", "low", "high"), rows)


def cost_bars(costs: Mapping[str, tuple[float, float]], path: Path) -> list[Path]:
    """What each defense costs: seconds of training, and bytes of one upload.

    Args:
        costs: defense -> (seconds, bytes). path: where to write, without suffix.
    """
    from matplotlib.figure import Figure

    names = list(costs)
    tall = 0.8 + 0.26 * len(names)
    figure = Figure(figsize=(7.0, tall), facecolor="white")
    panels = (
        ("training, s", [costs[n][0] for n in names], COLOURS[0], "{:.1f}", 0.26),
        ("one upload, kB", [costs[n][1] / 1000 for n in names], COLOURS[5], "{:.1f}", 0.66),
    )
    for k, (title, values, colour, form, left) in enumerate(panels):
        axes = figure.add_axes((left, 0.12 / tall, 0.27, 1 - 0.52 / tall))
        axes.barh(range(len(names)), values, color=colour, height=0.65)
        for row, value in enumerate(values):
            axes.text(value, row, " " + form.format(value), va="center", fontsize=7.5)
        axes.set_yticks(range(len(names)), [wrapped(short(n), LABEL_WIDTH) for n in names] if k == 0 else [])
        axes.set_title(title, fontsize=8.5, loc="left")
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max([*values, 1e-9]))
        axes.tick_params(labelsize=8, length=0)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    rows = [(name, f"{seconds:.3f}", f"{size:.0f}") for name, (seconds, size) in costs.items()]
    return write_figure(figure, path, ("defense", "training_seconds", "upload_bytes"), rows)


def _label_points(
    axes: Axes, points: Sequence[Point], labels: Sequence[str], families: Sequence[str], height: float
) -> None:
    """Names right of the axes, moved apart, each with its marker and a thin line to its point; `height` in points."""
    low, high = axes.get_ylim()
    order = sorted(range(len(points)), key=lambda i: (points[i].utility["value"], points[i].leakage["value"]))
    fractions = [(points[i].utility["value"] - low) / (high - low) for i in order]
    places = spread(fractions, [(10.5 * labels[i].count("\n") + 12.5) / height for i in order])
    for i, place in zip(order, places, strict=True):
        p = points[i]
        axes.annotate("", xy=(p.leakage["value"], p.utility["value"]), xytext=(1.02, place),
                      textcoords="axes fraction", annotation_clip=False, zorder=1,
                      arrowprops={"arrowstyle": "-", "color": "#BBBBBB", "linewidth": 0.5, "shrinkB": 4})  # fmt: skip
        style = _marker(families.index(p.family), p.family)
        axes.plot([1.035], [place], transform=axes.transAxes, clip_on=False, linestyle="none", markersize=5.5, **style)
        axes.text(1.055, place, labels[i], transform=axes.transAxes, va="center", fontsize=8, linespacing=1.05)


def _point_label(p: Point) -> str:
    text = short(p.defense) if p.defense != "none" else "no defense"
    asked = [float(number) for number in re.findall(r"ε=([\d.]+)", text)]
    if p.epsilon is not None and not any(math.isclose(e, p.epsilon, rel_tol=0.01) for e in asked):
        text += f" (ε={p.epsilon:.3g})"
    return wrapped(text, LABEL_WIDTH)


def _marker(k: int, family: str) -> dict[str, Any]:
    if family == "none":
        return {"color": "#000000", "marker": "*"}
    return {"color": COLOURS[k % (len(COLOURS) - 1)], "marker": MARKERS[k % len(MARKERS)]}


def _axes(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#E4E4E4", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def _error(estimate: Mapping[str, Any]) -> list[list[float]] | None:
    """Lengths of the error bar; an interval need not be around the value, and a bar is never negative."""
    if estimate.get("low") is None or estimate.get("high") is None:
        return None
    value = estimate["value"]
    return [[max(0.0, value - estimate["low"])], [max(0.0, estimate["high"] - value)]]


def _three(estimate: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple("" if estimate.get(k) is None else f"{estimate[k]:.6g}" for k in ("value", "low", "high"))


def _unit(measure: Measure) -> str:
    return measure.title if measure.higher_is_worse else f"{measure.title} (further right is better)"


def _value(measure: Measure, value: float) -> str:
    if measure.percent:
        return f"{100 * value:.0f} %"
    return f"{value:.1f}" if "dB" in measure.title else f"{value:.2f}"


def _what(at: Mapping[tuple[str, str], Point], attack: str, defenses: Sequence[str]) -> str:
    found = next(at[attack, d] for d in defenses if (attack, d) in at)
    return wrapped(found.measure.title, 20)


def _share(p: Point, undefended: Point | None, points: Sequence[Point]) -> Number:
    """0: as without an attack; 1: as against no defense; None where there is nothing to compare with."""
    if p.measure.higher_is_worse:
        if undefended is None or not p.baselines:
            return None
        none, full = p.baselines[0][1], undefended.leakage["value"]
    else:  # quality under attack, from that of the undisturbed, undefended model to guessing
        clean = [q.utility["value"] for q in points if q.defense == "none" and q.measure.higher_is_worse]
        none, full = max([*clean, p.leakage["value"]]), p.baselines[0][1] if p.baselines else 0.0
    if abs(full - none) < p.measure.least:
        return 0.0
    return float(min(1.0, max(0.0, (p.leakage["value"] - none) / (full - none))))


def _seeds(points: Sequence[Point]) -> str:
    counts = sorted({len(p.seeds) for p in points})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
