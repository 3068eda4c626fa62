"""The first layers of the large nets: which stem fits an image size."""

from __future__ import annotations

from typing import Literal

from fedsec.errors import ConfigError
from fedsec.models.base import check_size

Stem = Literal["auto", "small", "imagenet"]

SMALLEST = {"small": 16, "imagenet": 64}


def choose_stem(name: str, stem: Stem, image_size: int) -> Literal["small", "imagenet"]:
    """`imagenet` (7x7, stride 2, then pooling: a quarter of the side) or `small` (3x3, stride 1, no pooling).

    Args:
        name: the model, for messages.
        stem: `auto` takes `small` below 64 pixels.
        image_size: side in pixels.

    Raises:
        ConfigError: not a known stem, or images too small for it.
    """
    if stem == "auto":
        stem = "small" if image_size < SMALLEST["imagenet"] else "imagenet"
    if stem not in SMALLEST:
        raise ConfigError(f"{name}: stem={stem}: write auto, small or imagenet")
    check_size(name, image_size, SMALLEST[stem], " with this stem; use stem=small" if stem == "imagenet" else "")
    return stem
