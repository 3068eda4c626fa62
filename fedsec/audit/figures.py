"""The figures of an audit as SVG paths: ROC in log-log axes, and how scores are spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsec.metrics.membership import claimed_tpr
from fedsec.metrics.statistics import clopper_pearson

WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 620.0, 420.0, 70.0, 48.0, 14.0
COLOURS = tuple(f"--c{i}" for i in range(6))
DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5", "12 4")
Points = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Axes:
    """Where a pair of values lies on the paper."""

    x: tuple[float, float]
    y: tuple[float, float]
    logarithmic: bool = False

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Paper coordinates, inside the frame."""
        u, v = self._share(x, *self.x), self._share(y, *self.y)
        return (
            round(LEFT + (WIDTH - LEFT - MARGIN) * u, 1),
            round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - MARGIN) * v, 1),
        )

    def path(self, points: Points) -> str:
        """Straight lines through the points."""
        return "M" + " L".join("{},{}".format(*self.place(p[0], p[1])) for p in points) if len(points) else ""

    def frame(self, name: str, x_label: str, y_label: str) -> dict[str, Any]:
        """What every figure has."""
        size = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "base": HEIGHT - BOTTOM}
        return {"name": name, "x_label": x_label, "y_label": y_label, **size}

    def _share(self, value: float, low: float, high: float) -> float:
        value = min(max(value, low), high)
        if self.logarithmic:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)


def roc_figure(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Every attack, the blind program, chance, and what the claim allows; None without membership."""
    table = report.get("membership")
    if not table or "attacks" not in table:
        return None
    floor = 10 ** math.floor(math.log10(1 / max(10, report["data"]["n_nonmembers"])))
    axes = Axes((floor, 1.0), (floor, 1.0), logarithmic=True)
    best = table.get("headline", {}).get("method")
    attacks = sorted(table["attacks"], key=lambda name: name != best)  # the headline is first, and so in blue
    curves: list[tuple[str, Points]] = [(name, table["attacks"][name]["roc"]) for name in attacks]
    if "blind" in table:
        curves.append(("without the model", table["blind"]["roc"]))
    if claim := report.get("claim"):
        curves.append((f"claim ε = {claim['epsilon']:.3g} allows", claimed_curve(claim, floor)))
    lines = [
        {"name": name, "path": axes.path(points), "colour": COLOURS[i % 6], "dash": DASHES[i % 6]}
        for i, (name, points) in enumerate(curves)
    ]
    ticks = [10.0**k for k in range(round(math.log10(floor)), 1)]
    return {
        **axes.frame("roc", "false-positive rate: non-members called members", "true-positive rate"),
        "lines": lines,
        "names": ", ".join(name for name, _ in curves),
        "band": _band(curves[0][1], report["data"]["n_members"], axes) if best else "",
        "chance": axes.path([(floor, floor), (1, 1)]),
        "x_ticks": [(f"{t:g}", axes.place(t, 1)[0]) for t in ticks],
        "y_ticks": [(f"{t:g}", axes.place(1, t)[1]) for t in ticks],
    }


def claimed_curve(claim: Mapping[str, Any], floor: float) -> Points:
    """Largest TPR that a claim allows: the lower envelope over all (ε, δ) of its ledger, else over its one pair."""
    rates = np.geomspace(floor, 1, 80)
    pairs = claim.get("profile") or [(claim["epsilon"], claim["delta"])]
    allowed = np.min([claimed_tpr(rates, epsilon, delta) for epsilon, delta in pairs], axis=0)
    return [(float(x), float(y)) for x, y in zip(rates, allowed, strict=True)]


def score_figure(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Members' and non-members' scores, by rank among non-members; None where nothing was scored."""
    spread = report.get("membership", {}).get("headline", {}).get("spread")
    if not spread:
        return None
    edges = np.array(spread["edges"])
    top = 1.1 * max(max(spread["members"]), max(spread["others"]), 1.5 / (len(edges) - 1))
    axes = Axes((0.0, 1.0), (0.0, top))
    lines = []
    for i, (name, key) in enumerate((("members", "members"), ("non-members", "others"))):
        shares = np.repeat(spread[key], 2)
        points = list(zip(np.repeat(edges, 2)[1:-1].tolist(), shares.tolist(), strict=True))
        area = axes.path([(0.0, 0.0), *points, (1.0, 0.0)])
        lines.append({"name": name, "path": axes.path(points), "area": area, "colour": COLOURS[i], "dash": DASHES[i]})
    steps = np.linspace(0, top / 1.1, 4)
    return {
        **axes.frame("scores", "score, as the share of non-members below it", "share of images"),
        "lines": lines,
        "x_ticks": [(f"{t:g}", axes.place(t, 0)[0]) for t in (0, 0.25, 0.5, 0.75, 1)],
        "y_ticks": [(f"{100 * t:.1f} %", axes.place(0, t)[1]) for t in steps],
    }


def _band(points: Points, members: int, axes: Axes) -> str:
    """Clopper-Pearson of the true-positive rates of a curve."""
    rates = np.array([p[0] for p in points])
    found = np.array([p[1] for p in points]) * members
    low, high = clopper_pearson(found, members)
    there = list(zip(rates.tolist(), np.asarray(high).tolist(), strict=True))
    back = list(zip(rates.tolist()[::-1], np.asarray(low).tolist()[::-1], strict=True))
    return axes.path([*there, *back]) + " Z"
