"""What may happen to the updates before a rule sees them, as a matrix on the left: rows become means of rows."""

from __future__ import annotations

import numpy as np

from fedsec.robust.geometry import Geometry, Matrix
from fedsec.robust.rule import PreStep, Seen

BUCKET = 2
"""Updates in one bucket."""


def mixing_matrix(step: PreStep, seen: Seen) -> Matrix | None:
    """T (k, n); None for `none`."""
    if step == "nnm":
        return nearest_neighbours(seen.geometry.part(range(seen.n)), seen.f)
    if step == "bucketing":
        return buckets(seen.clients, seen.generator)
    return None


def nearest_neighbours(geometry: Geometry, f: int) -> Matrix:
    """Each row becomes the mean of the n − f rows nearest to it, itself included (Allouah et al. 2023, 2302.01772)."""
    n = len(geometry)
    mixing = np.zeros((n, n))
    for i, distances in enumerate(geometry.squared_distances):
        nearest = np.argsort(distances, kind="stable")[: n - f]
        mixing[i, nearest] = 1 / len(nearest)
    return mixing


def buckets(clients: tuple[int, ...], generator: np.random.Generator) -> Matrix:
    """Means of random buckets of two, drawn by client id (Karimireddy et al. 2022, 2006.09365)."""
    n = len(clients)
    by_id = np.argsort(clients, kind="stable")
    shuffled = by_id[generator.permutation(n)]
    mixing = np.zeros((-(-n // BUCKET), n))
    for row, start in enumerate(range(0, n, BUCKET)):
        members = shuffled[start : start + BUCKET]
        mixing[row, members] = 1 / len(members)
    return mixing
