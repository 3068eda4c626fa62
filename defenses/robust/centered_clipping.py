"""Centred clipping: around the last aggregate, no client pulls harder than a radius allows.

Source: Karimireddy et al. 2021, 2012.10333.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from fedsec.robust.rule import Seen, Weighing, WeightRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CenteredClipping(WeightRule):
    """v ← v + mean of (u_i − v)·min(1, τ/‖u_i − v‖), from the last aggregate v (Karimireddy et al. 2021)."""

    name: ClassVar[str] = "centered_clipping"
    protects: ClassVar[str] = "limits how far each client pulls away from the last aggregate"
    requirement: ClassVar[str] = "n ≥ 1"

    tau: Annotated[
        float | None, Field(gt=0, description="radius; none: the median distance from the last aggregate")
    ] = None
    iterations: Annotated[int, Field(ge=1, description="steps a round")] = 5

    def extra_rows(self, clients: tuple[int, ...], memory: Mapping[str, Any], like: Tensor) -> list[Tensor]:
        """The last aggregate, from the second round on."""
        return [memory["aggregate"]] if "aggregate" in memory else []

    def remember(self, rows: Sequence[Tensor], clips: Sequence[float], seen: Seen, delta: Tensor) -> Mapping[str, Any]:
        """The aggregate."""
        return {"aggregate": delta}

    def weigh(self, seen: Seen) -> Weighing:
        """Coefficients of the clients and, where there is one, of the last aggregate."""
        n, m = seen.n, len(seen.geometry)
        centre = np.zeros(m)
        centre[n:] = 1.0
        tau = self.tau
        distances = seen.geometry.distances_to(centre)[:n]
        first = distances
        if tau is None:
            tau = float(np.median(distances))
        for _ in range(self.iterations):
            pull = np.minimum(1.0, np.divide(tau, distances, out=np.ones(n), where=distances > tau)) / n
            centre = (1 - pull.sum()) * centre
            centre[:n] += pull
            distances = seen.geometry.distances_to(centre)[:n]
        return Weighing(centre, first / max(tau, 1e-300))
