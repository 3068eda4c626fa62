"""Which images are nearly the same picture: rescaled, recompressed, a little brighter, or cut a little otherwise."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedsec.data.images import BLOCK, ImageSource, to_tensor

Thumbs = npt.NDArray[np.float32]
Pairs = npt.NDArray[np.int64]
SIDE = 24
NEAR = 0.99
"""Correlation of two thumbnails, less the mean picture of the set, from which they count as one picture. Measured on
HAM10000 at 28 pixels: 70 pairs that are not identical, 66 of them of one lesion; on 5,856 and 1,993 chest X-rays: none.
"""
EXACT = 20_000
"""Images up to which every pair is compared."""
BITS, BANDS = 20, 24
"""Of the hash above that: a pair at the threshold shares a band with probability 1 - 5e-6 and more."""
CROWD = 4_096
"""Images of one hash value that are compared with each other; more are one flat picture, or a set of one."""


def thumbnails(images: ImageSource) -> Thumbs:
    """(N, 576) grey thumbnails, each of zero mean and unit length; zeros for an image of one colour."""
    found = np.empty((len(images), SIDE * SIDE), dtype=np.float32)
    for start in range(0, len(images), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(images)))
        found[rows] = to_tensor(images.read(rows), SIDE, 1).flatten(1).numpy()
    return _standard(found)


def near_pairs(thumbs: Thumbs, threshold: float = NEAR) -> Pairs:
    """(P, 2) pairs i < j whose thumbnails correlate at the threshold or above, also without the set's mean picture.

    Radiographs of different people correlate at 0.9 and more, since all show a chest; the mean picture is taken out,
    so that what is compared is what tells one from the other.

    Args:
        thumbs: (N, D) of `thumbnails`. threshold: of correlation.
    """
    if len(thumbs) < 2:
        return np.zeros((0, 2), dtype=np.int64)
    own = _standard(thumbs - thumbs.mean(0, keepdims=True)) if len(thumbs) > 50 else thumbs
    if len(thumbs) <= EXACT:
        return _compare(own, np.arange(len(own)), threshold)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(BANDS):
        planes = rng.standard_normal((own.shape[1], BITS)).astype(np.float32)
        codes = ((own @ planes) > 0) @ (1 << np.arange(BITS))
        order = np.argsort(codes, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)
        found += [_compare(own, np.sort(g[:CROWD]), threshold) for g in groups if len(g) > 1]
    return np.unique(np.concatenate(found), axis=0) if found else np.zeros((0, 2), dtype=np.int64)


def _compare(thumbs: Thumbs, rows: Pairs, threshold: float) -> Pairs:
    """All pairs among some rows, block by block."""
    found = []
    for start in range(0, len(rows), BLOCK):
        block = thumbs[rows[start : start + BLOCK]]
        i, j = np.nonzero(block @ thumbs[rows[start:]].T >= threshold)
        later = j > i
        found.append(np.stack([rows[start + i[later]], rows[start + j[later]]], axis=1))
    return np.concatenate(found)


def _standard(values: Thumbs) -> Thumbs:
    centred = values - values.mean(1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.where(norm > 1e-3, norm, np.inf), dtype=np.float32)
