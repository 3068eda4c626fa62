"""What makes two images, or two data sets, the same: hashes of their content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import numpy.typing as npt

from fedsec.data.images import BLOCK, ImageSource

Digests = npt.NDArray[np.bytes_]
PARTS = ("train", "val", "test")


def image_digests(images: ImageSource) -> Digests:
    """A 128-bit BLAKE2b hash of each image's stored pixels, in order; those of decoded files are known already."""
    if isinstance(known := getattr(images, "digests", None), np.ndarray):
        return known
    found: list[str] = []
    for start in range(0, len(images), BLOCK):
        block = np.ascontiguousarray(images.read(np.arange(start, min(start + BLOCK, len(images)))))
        found += [hashlib.blake2b(image.data, digest_size=16).hexdigest() for image in block]
    # Hex, because NumPy's bytes type drops trailing zero bytes.
    return np.array(found, dtype="S32")


def fingerprint(*parts: object) -> str:
    """32 hex digits of BLAKE2b over texts, numbers, bytes and arrays; equal content gives equal digits anywhere."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            data = np.ascontiguousarray(part)
            h.update(f"{data.dtype.str}{data.shape}".encode())
            h.update(data.tobytes())
        elif isinstance(part, bytes):
            h.update(f"bytes{len(part)}".encode() + part)
        else:
            text = repr(part).encode()
            h.update(f"text{len(text)}".encode() + text)
    return h.hexdigest()


@dataclass(frozen=True)
class Duplicates:
    """Pixel-identical images."""

    inside: dict[str, int] = field(default_factory=dict)
    """Part -> images that repeat an earlier image of the same part."""
    across: dict[str, int] = field(default_factory=dict)
    """`train/val` and so on -> images of the second part that also lie in the first."""
    conflicting: int = 0
    """Images whose pixels also occur under another label."""


def find_duplicates(digests: Digests, split: npt.NDArray[np.str_], labels: npt.NDArray[np.generic]) -> Duplicates:
    """Count the pixel-identical images inside each part, across parts, and under different labels."""
    parts = [part for part in (*PARTS, "") if np.any(split == part)]
    by_part = {part: digests[split == part] for part in parts}
    inside = {part: len(d) - len(np.unique(d)) for part, d in by_part.items()}
    across = {f"{a}/{b}": int(np.isin(by_part[b], by_part[a]).sum()) for a, b in combinations(parts, 2)}
    _, inverse, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(sizes[inverse] > 1)
    seen: dict[int, set[bytes]] = {}
    for row in repeated:
        seen.setdefault(int(inverse[row]), set()).add(labels[row].tobytes())
    conflicting = sum(len(seen[int(inverse[row])]) > 1 for row in repeated)
    return Duplicates(
        {part: count for part, count in inside.items() if count},
        {pair: count for pair, count in across.items() if count},
        conflicting,
    )
