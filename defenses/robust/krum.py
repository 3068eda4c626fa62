"""Krum and Multi-Krum: the updates whose nearest neighbours are near."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedsec.robust.rule import Seen, Weighing, WeightRule

if TYPE_CHECKING:
    from fedsec.robust.geometry import Matrix, Vector


def krum_scores(squared_distances: Matrix, neighbours: int) -> Vector:
    """(n,) sum of each row's smallest squared distances to others (Blanchard et al. 2017, 1703.02757)."""
    others = np.sort(squared_distances + np.diag(np.full(len(squared_distances), np.inf)), axis=1)
    scores: Vector = others[:, :neighbours].sum(1)
    return scores


@dataclass(frozen=True)
class MultiKrum(WeightRule):
    """The mean of the k updates with the smallest Krum score, with n − f − 2 neighbours (Blanchard et al. 2017)."""

    name: ClassVar[str] = "multi_krum"
    protects: ClassVar[str] = "mean of the updates that have near neighbours"
    requirement: ClassVar[str] = "n ≥ 2f + 3"
    uses_f: ClassVar[bool] = True

    k: Annotated[int | None, Field(ge=1, description="updates that are averaged; none: n − f")] = None

    def feasible(self, n: int, f: int) -> bool:
        """At least one neighbour is left, and honest clients are in the majority among them."""
        return n >= 2 * f + 3 and self.chosen(n, f) <= n - f

    def chosen(self, n: int, f: int) -> int:
        """How many updates are averaged."""
        return n - f if self.k is None else self.k

    def weigh(self, seen: Seen) -> Weighing:
        """1/k on the k smallest scores; ties go to the smaller client id."""
        scores = krum_scores(seen.geometry.squared_distances, len(seen.geometry) - seen.f - 2)
        k = self.chosen(seen.n, seen.f)
        coefficients = np.zeros(seen.n)
        coefficients[np.lexsort((np.array(seen.clients), scores))[:k]] = 1 / k
        return Weighing(coefficients, scores)


@dataclass(frozen=True)
class Krum(MultiKrum):
    """The one update whose n − f − 2 nearest neighbours are nearest (Blanchard et al. 2017, 1703.02757)."""

    name: ClassVar[str] = "krum"
    protects: ClassVar[str] = "the one update that has the nearest neighbours"

    k: Annotated[int | None, Field(ge=1, le=1, description="always 1")] = 1
