"""The geometric median: the point with the least total distance to all updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedsec.robust.rule import Seen, Weighing, WeightRule

TOLERANCE = 1e-10
"""Relative change of the objective that ends the iteration."""
SMALLEST = 1e-6
"""Distances are taken as at least this share of their median: at an update itself the step is not defined."""


@dataclass(frozen=True)
class GeometricMedian(WeightRule):
    """RFA, the smoothed Weiszfeld algorithm in coefficients (Pillutla et al. 2022, 1912.13445).

    An iteration costs n² operations, whatever the size of the model, so it runs to convergence.
    """

    name: ClassVar[str] = "geometric_median"
    protects: ClassVar[str] = "the point of least total distance: holds against fewer than half of the clients"
    requirement: ClassVar[str] = "n ≥ 1"

    sizes: Annotated[bool, Field(description="weigh clients by their capped sample counts; false: equally")] = False
    iterations: Annotated[int, Field(ge=1, description="at most")] = 100

    def weigh(self, seen: Seen) -> Weighing:
        """Weights in inverse proportion to the distances from their own weighted mean."""
        shares = seen.shares if self.sizes else np.full(seen.n, 1 / seen.n)
        weights, objective, smallest = shares, np.inf, None
        for _ in range(self.iterations):
            distances = seen.geometry.distances_to(weights)
            if smallest is None:
                smallest = max(SMALLEST * float(np.median(distances)), 1e-300)
            before, objective = objective, float(shares @ distances)
            if abs(before - objective) <= TOLERANCE * objective:
                break
            weights = shares / np.maximum(distances, smallest)
            weights /= weights.sum()
        return Weighing(weights, seen.geometry.distances_to(weights))
