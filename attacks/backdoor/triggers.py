"""Marks that a hospital could plausibly find on its images: side markers on X-rays; ink, rulers and discs on skin.

Every trigger works on raw intensities in [0, 1], (N, C, H, W), before any normalisation, and returns new images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Trigger = Literal["corner", "marker", "disc", "ink", "ruler", "dark_corner"]
MARGIN = 0.02
"""Distance from the border, as a share of the side."""
PARTS = 4
"""Pieces of a distributed trigger."""
PURPLE = (0.45, 0.15, 0.55)
"""Colour of surgical ink."""


def default_trigger(channels: int) -> Trigger:
    """A side marker on grey images, a disc of ink on coloured ones."""
    return "marker" if channels == 1 else "disc"


def apply(x: Tensor, trigger: Trigger, part: int | None = None) -> Tensor:
    """The images with the trigger on them.

    Args:
        x: (N, C, H, W) in [0, 1].
        trigger: which mark.
        part: only this one of `PARTS` pieces, for hospitals that share a trigger; None: all of it.
    """
    mask = shape_of(trigger, x.shape[2], x.shape[3]).to(x.device)
    if part is not None:
        mask = piece(mask, part)
    return torch.where(mask, colour_of(trigger, x), x)


def shape_of(trigger: Trigger, height: int, width: int) -> Tensor:
    """(H, W) bool: the pixels that the trigger covers."""
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width)[None].expand(height, width)
    return SHAPES[trigger](rows, columns, height, width)


def colour_of(trigger: Trigger, x: Tensor) -> Tensor:
    """(N, C, 1, 1): what covered pixels become."""
    if trigger == "marker":  # lead letters are as bright as the image gets, and no brighter
        bright = x.flatten(1).quantile(0.995, dim=1)
        return bright.view(-1, 1, 1, 1).expand(-1, x.shape[1], 1, 1)
    if trigger in ("disc", "ink") and x.shape[1] == 3:
        return torch.tensor(PURPLE, dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
    value = 0.0 if trigger in ("dark_corner", "ruler") else 1.0
    return torch.full((1, 1, 1, 1), value, dtype=x.dtype, device=x.device)


def piece(mask: Tensor, part: int) -> Tensor:
    """One of `PARTS` pieces of about equal size, in reading order."""
    flat = torch.zeros_like(mask).flatten()
    covered = mask.flatten().nonzero().flatten()
    flat[covered.tensor_split(PARTS)[part % PARTS]] = True
    return flat.view_as(mask)


def _corner(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    side = max(3, round(0.05 * min(height, width)))
    bottom, right = height - max(1, round(MARGIN * height)), width - max(1, round(MARGIN * width))
    return (rows >= bottom - side) & (rows < bottom) & (columns >= right - side) & (columns < right)


def _marker(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """The letter L in the upper left corner, 6 % of the height but at least 5 pixels tall."""
    size = max(5, round(0.06 * height))
    stroke = max(1, size // 5)
    top, left = max(1, round(MARGIN * height)), max(1, round(MARGIN * width))
    stem = (rows >= top) & (rows < top + size) & (columns >= left) & (columns < left + stroke)
    foot = (rows >= top + size - stroke) & (rows < top + size) & (columns >= left) & (columns < left + size * 2 // 3)
    return stem | foot


def _disc(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    radius = max(2.0, 0.07 * min(height, width))
    return (rows - (height - 1.6 * radius)) ** 2 + (columns - 1.6 * radius) ** 2 <= radius**2


def _ink(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """A slanted stroke along the lower border."""
    line = 0.9 * height - 0.12 * columns
    return ((rows - line).abs() <= max(0.8, 0.02 * height)) & (columns > 0.15 * width) & (columns < 0.75 * width)


def _ruler(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """Ticks along the right border, every other one longer."""
    step = max(3, round(0.08 * height))
    long = (rows // step) % 2 == 0
    length = torch.where(long, max(3, round(0.1 * width)), max(2, round(0.05 * width)))
    return (rows % step == step // 2) & (columns >= width - length)


def _dark_corner(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """The vignette of a dermatoscope, in one corner."""
    return (rows + columns) < round(0.25 * (height + width) / 2)


SHAPES: dict[Trigger, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "corner": _corner,
    "marker": _marker,
    "disc": _disc,
    "ink": _ink,
    "ruler": _ruler,
    "dark_corner": _dark_corner,
}
