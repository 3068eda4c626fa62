"""The audit's report: one HTML file with its style and figures inside, no script, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsec.metrics.membership import claimed_tpr

WIDTH, HEIGHT, LEFT, BOTTOM = 560.0, 400.0, 62.0, 48.0
TEMPLATE = Path(__file__).with_name("audit.html")
COLOURS = ("#0b5cad", "#b3541e", "#2f7d32", "#6b3fa0", "#8a6d00", "#00767a")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5", "12 4")


def render(report: Mapping[str, Any], images: Mapping[str, np.ndarray] | None = None, redact: bool = False) -> str:
    """The page of a report in JSON form.

    Args:
        images: caption -> (H, W) or (H, W, 3) in [0, 1]: reconstructions. redact: leave every image out.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["number"] = number
    pictures = [] if redact else [(text, data_uri(x)) for text, x in (images or {}).items()]
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return page.render(r=report, roc=roc_figure(report), pictures=pictures, redacted=redact and bool(images))


def number(value: Any) -> str:
    """An estimate as people read it."""
    if isinstance(value, Mapping):
        if "not_resolvable" in value:
            return f"not resolvable: {value['not_resolvable']}"
        if value.get("value") is None:
            return "–"
        low, high = value.get("low"), value.get("high")
        return f"{value['value']:.4f}" + (f" [{low:.4f}, {high:.4f}]" if low is not None and high is not None else "")
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def roc_figure(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Curves in log-log axes as SVG paths: every attack, the blind program, chance, and what the claim allows."""
    table = report.get("membership")
    if not table or "attacks" not in table:
        return None
    floor = 10 ** math.floor(math.log10(1 / max(10, report["data"]["n_nonmembers"])))
    rates = np.geomspace(floor, 1, 60)
    curves: list[tuple[str, Sequence[Sequence[float]]]] = [(n, a["roc"]) for n, a in table["attacks"].items()]
    if "blind" in table:
        curves.append(("without the model", table["blind"]["roc"]))
    claim = report.get("claim")
    if claim:
        allowed = claimed_tpr(rates, claim["epsilon"], claim["delta"])
        curves.append((f"claim ε = {claim['epsilon']:g} allows", list(zip(rates, allowed, strict=True))))
    lines = [
        {"name": name, "path": _path(points, floor), "colour": COLOURS[i % 6], "dash": DASHES[i % 6]}
        for i, (name, points) in enumerate(curves)
    ]
    ticks = [10.0**k for k in range(round(math.log10(floor)), 1)]
    return {
        "lines": lines,
        "chance": _path([(floor, floor), (1, 1)], floor),
        "x_ticks": [(f"{t:g}", _x(t, floor)) for t in ticks],
        "y_ticks": [(f"{t:g}", _y(t, floor)) for t in ticks],
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "base": HEIGHT - BOTTOM,
    }


def data_uri(image: np.ndarray) -> str:
    """A PNG inside an address."""
    from PIL import Image

    pixels = (np.clip(np.squeeze(image), 0, 1) * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _x(value: float, floor: float) -> float:
    return round(LEFT + (WIDTH - LEFT - 14) * math.log(max(value, floor) / floor) / math.log(1 / floor), 1)


def _y(value: float, floor: float) -> float:
    return round(
        HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 14) * math.log(max(value, floor) / floor) / math.log(1 / floor), 1
    )


def _path(points: Sequence[Sequence[float]], floor: float) -> str:
    return "M" + " L".join(f"{_x(x, floor)},{_y(y, floor)}" for x, y in points) if points else ""
