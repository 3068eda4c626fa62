"""Which entries are encrypted where not all are, and which always have to be."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fedsec.errors import ConfigError
from fedsec.types import Layout

Interval = tuple[int, int]


def clear_entries(select: str, layout: Layout) -> Tensor | None:
    """(d,) true where an entry travels in clear; None where all are encrypted.

    Always encrypted are the first and the last layer with a weight matrix (the last one's bias gradient gives the
    labels away), and every vector-shaped tensor: biases, and the scale and shift of normalisation layers.

    Args:
        select: `all`; `first:F`, encrypt from the input side until a share F of all entries is hidden;
            `layers:REGEX`, encrypt the tensors whose name matches.
        layout: of the update.

    Raises:
        ConfigError: not one of these, or a pattern that matches nothing.
    """
    kind, _, value = select.partition(":")
    if kind == "all" and not value:
        return None
    hidden = torch.zeros(layout.size, dtype=torch.bool)
    matrices = [name for name, shape in zip(layout.names, layout.shapes, strict=True) if len(shape) > 1]
    views = layout.views(hidden)
    for name, view in views.items():
        if name in (*matrices[:1], *matrices[-1:]) or view.dim() < 2:
            view.fill_(True)
    if kind == "first" and _share(value) is not None:
        wanted = round((_share(value) or 0.0) * layout.size)
        free = (~hidden).nonzero().flatten()
        hidden[free[: max(0, wanted - int(hidden.sum()))]] = True
    elif kind == "layers" and value:
        for name in _matching(value, layout.names):
            views[name].fill_(True)
    else:
        raise ConfigError(f"he: select={select}: write all, first:0.2 or layers:REGEX")
    return None if bool(hidden.all()) else ~hidden


def _share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 <= share <= 1 else None


def _matching(pattern: str, names: tuple[str, ...]) -> list[str]:
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ConfigError(f"he: select=layers:{pattern} is no regular expression: {error}") from None
    if not found:
        raise ConfigError(f"he: select=layers:{pattern} matches no tensor; there are {', '.join(names[:6])}")
    return found
