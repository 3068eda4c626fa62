"""The audit's report: one HTML file with its style and figures inside, no script, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedsec.audit.figures import roc_figure, score_figure
from fedsec.embed import png

Picture = tuple[str, np.ndarray]
"""Caption, and (H, W) or (H, W, 3) in [0, 1]."""


def render(
    report: Mapping[str, Any],
    pictures: Sequence[Picture] = (),
    exposed: Sequence[Picture] = (),
    redact: bool = False,
) -> str:
    """The page of a report in JSON form.

    Args:
        pictures: reconstructions. exposed: the members that are recognised best. redact: leave every image out.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fedsec"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    shown = [[] if redact else [(text, png(np.squeeze(x))) for text, x in images] for images in (pictures, exposed)]
    return environment.get_template("audit.html").render(
        r=report,
        roc=roc_figure(report),
        scores=score_figure(report),
        pictures=shown[0],
        exposed=shown[1],
        redacted=redact,
    )


def number(value: Any) -> str:
    """An estimate as people read it."""
    if isinstance(value, Mapping):
        if "not_resolvable" in value:
            return f"not resolvable: {value['not_resolvable']}"
        if value.get("value") is None:
            return "–"
        low, high = value.get("low"), value.get("high")
        interval = f" [{low:.4f}, {high:.4f}]" if low is not None and high is not None else ""
        return f"{value['value']:.4f}{interval}"
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
