"""The plain weighted mean, which is what aggregates where no defense brings a rule of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsec.defense import Aggregation, Aggregator
from fedsec.types import Payload, RoundContext, Update


class WeightedMean(Aggregator):
    """Σ w_k Δ_k over the clients that replied, summed in client order."""

    def begin(self, weights: Mapping[int, float], ctx: RoundContext) -> None:
        """Start from nothing."""
        self._weights = dict(weights)
        self._delta: Tensor | None = None
        self._buffers: Tensor | None = None
        self._buffer_weight = 0.0

    def accumulate(self, payload: Payload, ctx: RoundContext) -> None:
        """Add one client's share."""
        update: Update = payload.content
        weight = self._weights[payload.client]
        self._delta = _add(self._delta, update.delta, weight)
        if update.buffers is not None:
            self._buffers = _add(self._buffers, update.buffers, weight)
            self._buffer_weight += weight

    def finish(self, ctx: RoundContext) -> Aggregation:
        """The weighted mean; None for `delta` where nobody replied."""
        # A client whose statistics were dropped still counts for its parameters, so the two sums are normalised apart.
        buffers = None if self._buffers is None else self._buffers / self._buffer_weight
        return Aggregation(self._delta, buffers, weights=self._weights)


def _add(total: Tensor | None, part: Tensor, weight: float) -> Tensor:
    if total is None:
        return part * weight
    return torch.add(total, part, alpha=weight, out=total)
