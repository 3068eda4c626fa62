"""Divide and conquer: drop the updates that stand out along the main direction of disagreement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedsec.robust.rule import Seen, Weighing, WeightRule


@dataclass(frozen=True)
class DnC(WeightRule):
    """Outliers by squared projection on the top right singular vector of the centred updates.

    Source: Shejwalkar and Houmansadr 2021, NDSS. The full spectrum from the Gram matrix takes the place of their
    subsampled coordinates.
    """

    name: ClassVar[str] = "dnc"
    protects: ClassVar[str] = "drops the updates that stand out along the main direction of disagreement"
    requirement: ClassVar[str] = "n ≥ ⌈c·f⌉ + 1"
    uses_f: ClassVar[bool] = True

    c: Annotated[float, Field(gt=0, description="updates dropped, in units of f")] = 1.0
    repeat: Annotated[int, Field(ge=1, description="times, each on what the one before kept")] = 1

    def feasible(self, n: int, f: int) -> bool:
        """Something is kept."""
        return n >= self.repeat * math.ceil(self.c * f) + 1

    def weigh(self, seen: Seen) -> Weighing:
        """Equal weights on what is kept."""
        kept = list(range(seen.n))
        suspicion = np.zeros(seen.n)
        for _ in range(self.repeat):
            values, vectors = np.linalg.eigh(seen.geometry.part(kept).centred)
            scores = max(values[-1], 0.0) * vectors[:, -1] ** 2
            suspicion[kept] = np.maximum(suspicion[kept], scores)
            order = np.lexsort(([seen.clients[i] for i in kept], scores))
            kept = sorted(kept[i] for i in order[: len(kept) - math.floor(self.c * seen.f)])
        coefficients = np.zeros(seen.n)
        coefficients[kept] = 1 / len(kept)
        return Weighing(coefficients, suspicion)
