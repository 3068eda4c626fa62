"""How image files become one array: found by name inside one folder, decoded once, resized, cached."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps

from fedsec.data.cache import cached
from fedsec.data.images import Pixels
from fedsec.data.report import BadRow
from fedsec.errors import DataError, RefusedError

SUFFIXES = (".png", ".jpg", ".jpeg")
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def index_images(root: Path) -> dict[str, Path]:
    """Stem -> image file, in the folder and its direct subfolders; of two files with one stem, the first by path.

    Raises:
        RefusedError: a link that leads out of the folder (D16).
    """
    found: dict[str, Path] = {}
    inside = root.resolve()
    for folder in sorted([root, *(entry for entry in root.iterdir() if entry.is_dir())]):
        if not folder.resolve().is_relative_to(inside):
            raise RefusedError(f"{folder}: leads out of {root}; copy the images into the folder [D16]")
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() not in SUFFIXES or not path.is_file():
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise RefusedError(f"{path}: leads out of {root}; copy the image into the folder [D16]")
            found.setdefault(path.stem, path)
    return found


def decode_rgb(path: Path, size: int) -> Pixels:
    """One image as (S, S, 3) uint8: upright by its EXIF tag, in RGB, squashed (bicubic, antialiased)."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(upright.resize((size, size), Image.Resampling.BICUBIC), dtype=np.uint8)


def decode_all(paths: Sequence[Path], size: int, key: str) -> tuple[Pixels, list[str]]:
    """All images, from the cache where this key is known; and why an image cannot be decoded, else empty text.

    Args:
        paths: the files. size: side in pixels. key: names the files' content, the decoder aside.

    Returns:
        (N, S, S, 3) uint8, zero where undecodable, and N texts.
    """

    def one(path: Path) -> tuple[Pixels, str]:
        try:
            return decode_rgb(path, size), ""
        except UNREADABLE as error:
            reason = str(error).replace(str(path), path.name) or type(error).__name__
            return np.zeros((size, size, 3), dtype=np.uint8), f"cannot be decoded: {reason}"

    def make() -> dict[str, np.ndarray]:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
            done = list(pool.map(one, paths))
        return {"images": np.stack([pixels for pixels, _ in done]), "problems": np.array([text for _, text in done])}

    arrays = cached(f"decoded-{key}-{size}-pillow{PIL.__version__}", make)
    return arrays["images"], arrays["problems"].tolist()


def judge(bad: Sequence[BadRow], rows: int, on_bad: str, max_bad: float) -> None:
    """Stop at bad rows: at the first where `on_bad` is `error`, at too many where it is `skip`.

    Raises:
        DataError: the row's own code, or D20.
    """
    if not bad:
        return
    if on_bad == "error":
        same = sum(row.code == bad[0].code for row in bad)
        more = f" ({same:,} of {rows:,} rows are like this; on_bad=skip leaves them out)" if same > 1 else ""
        raise DataError(bad[0].code, f"{bad[0].file}:{bad[0].row}: {bad[0].detail}{more}")
    if len(bad) > max_bad * rows:
        codes = ", ".join(f"{code} {count:,}" for code, count in Counter(row.code for row in bad).items())
        first = "; ".join(map(str, bad[:3]))
        raise DataError(
            "D20", f"{len(bad):,} of {rows:,} rows are bad, more than max_bad={max_bad:g} ({codes}): {first}"
        )
