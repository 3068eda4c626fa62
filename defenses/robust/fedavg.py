"""The weighted mean, as a rule: what robust rules are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsec.robust.rule import Seen, Weighing, WeightRule


@dataclass(frozen=True)
class FedAvg(WeightRule):
    """The strategy's weighted mean (McMahan et al. 2017), after screening and the safety clip.

    With `kappa=inf` it is the undefended mean, finite values apart.
    """

    name: ClassVar[str] = "fedavg"
    protects: ClassVar[str] = "weighted mean behind the safety clip: the yardstick of robust rules"
    requirement: ClassVar[str] = "n ≥ 1"

    def weigh(self, seen: Seen) -> Weighing:
        """The shares; suspicion is the distance from the mean."""
        return Weighing(seen.shares, seen.geometry.distances_to(seen.shares))
