"""FoolsGold: clients whose updates have always been alike are taken for one adversary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedsec.robust.rule import Infeasible, Seen, Weighing, WeightRule

if TYPE_CHECKING:
    from torch import Tensor

    from fedsec.robust.geometry import Matrix, Vector

CONFIDENCE = 1.0
"""κ of the paper: how steep the logit is."""


def foolsgold_weights(cosines: Matrix) -> tuple[Vector, Vector]:
    """(weights before normalisation, largest pardoned cosine) from cosines of histories (Fung et al. 2020)."""
    n = len(cosines)
    alike = cosines.copy()
    np.fill_diagonal(alike, -np.inf)
    largest = alike.max(1)
    pardon = np.ones((n, n))
    lower = largest[:, None] < largest
    ratio = np.divide(largest[:, None], largest, out=np.ones((n, n)), where=largest != 0)
    pardon[lower] = ratio[lower]
    suspicion = (alike * pardon).max(1, where=~np.eye(n, dtype=bool), initial=-np.inf)
    weights = np.clip(1 - suspicion, 0.0, 1.0)
    if weights.max() > 0:
        weights = weights / weights.max()
    weights = np.where(weights == 1.0, 0.99, weights)
    logit = np.log(np.maximum(weights, 1e-300) / (1 - weights))
    return np.clip(CONFIDENCE * (logit + 0.5), 0.0, 1.0), suspicion


@dataclass(frozen=True)
class FoolsGold(WeightRule):
    """Weights fall with the cosine of summed updates (Fung et al. 2020, 1808.04866), normalised to sum 1.

    Keeps one vector a client. Honest clients with the same data distribution look alike too, and pay for it.
    """

    name: ClassVar[str] = "foolsgold"
    protects: ClassVar[str] = "suppresses clients whose updates have always been alike"
    requirement: ClassVar[str] = "n ≥ 2"

    def feasible(self, n: int, f: int) -> bool:
        """Likeness needs two."""
        return n >= 2

    def extra_rows(self, clients: tuple[int, ...], memory: Mapping[str, Any], like: Tensor) -> list[Tensor]:
        """Each client's summed updates of earlier rounds, zero where it is new."""
        history = memory.get("history", {})
        return [history[c] if c in history else like.new_zeros(like.shape) for c in clients] if history else []

    def remember(self, rows: Sequence[Tensor], clips: Sequence[float], seen: Seen, delta: Tensor) -> Mapping[str, Any]:
        """The sums, this round included."""
        history = dict(seen.memory.get("history", {}))
        for client, row, clip in zip(seen.clients, rows, clips, strict=True):
            history[client] = history[client] + row * clip if client in history else row * clip
        return {"history": history}

    def weigh(self, seen: Seen) -> Weighing:
        """From cosines of the sums."""
        n, m = seen.n, len(seen.geometry)
        sums = np.eye(n, m)
        if m == 2 * n:
            sums[:, n:] = np.eye(n)
        products = sums @ seen.geometry.products @ sums.T
        norms = np.sqrt(np.maximum(0.0, np.diagonal(products)))
        scale = np.outer(norms, norms)
        weights, suspicion = foolsgold_weights(np.divide(products, scale, out=np.zeros((n, n)), where=scale > 0))
        if weights.sum() == 0:
            raise Infeasible("foolsgold: every client looks like every other")
        coefficients = np.zeros(m)
        coefficients[:n] = weights / weights.sum()
        return Weighing(coefficients, suspicion)
