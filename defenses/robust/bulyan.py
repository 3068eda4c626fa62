"""Bulyan: Krum chooses, then every coordinate keeps what lies around its median."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedsec.robust.rule import CoordinateRule, Seen

from .krum import krum_scores

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedsec.robust.geometry import Matrix
    from fedsec.robust.order import Blocks


def select_by_krum(squared_distances: Matrix, f: int, clients: Sequence[int]) -> list[int]:
    """n − 2f rows, each time the one with the smallest Krum score among those that are left, by original index.

    Ties, which are the rule when few are left, go to the smaller client id.
    """
    left = list(range(len(squared_distances)))
    chosen: list[int] = []
    while len(chosen) < len(squared_distances) - 2 * f:
        scores = krum_scores(squared_distances[np.ix_(left, left)], max(1, len(left) - f - 2))
        best = np.lexsort((np.array([clients[i] for i in left]), scores))[0]
        chosen.append(left.pop(int(best)))
    return chosen


@dataclass(frozen=True)
class Bulyan(CoordinateRule):
    """n − 2f updates chosen by Krum; of each coordinate the mean of the n − 4f values closest to the median.

    Source: El Mhamdi et al. 2018, 1802.07927.
    """

    name: ClassVar[str] = "bulyan"
    protects: ClassVar[str] = "Krum's choice, then the values around the median of each coordinate"
    requirement: ClassVar[str] = "n ≥ 4f + 3"
    uses_f: ClassVar[bool] = True
    needs_geometry: ClassVar[bool] = True

    def feasible(self, n: int, f: int) -> bool:
        """Both steps keep a majority of honest values."""
        return n >= 4 * f + 3

    def select(self, seen: Seen) -> Sequence[int]:
        """The updates that Krum takes one after the other."""
        return select_by_krum(seen.geometry.squared_distances[: seen.n, : seen.n], seen.f, seen.clients)

    def reduce(self, fill: Blocks, count: int, length: int, f: int, device: torch.device) -> Tensor:
        """The mean of the count − 2f values closest to each median."""
        from fedsec.robust.order import closest_mean

        return closest_mean(fill, count, length, count - 2 * f, device)
