"""How a user tunes the attack: free of torch, so that listing plugins costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal[
    "auto",
    "analytic",
    "peel",
    "spear",
    "cascade",
    "unpooling",
    "map_gauss_newton",
    "dlg",
    "fedavg",
    "bn_prior",
    "inverting_gradients",
]
"""auto, or one method alone. `auto.METHODS` has a row for each."""

MaliciousMethod = Literal["imprint", "fishing"]
"""Methods of a server that breaks the protocol; never in auto."""
SortBy = Literal["mean", "gaussian", "cosine"]
"""What bins sort images by: mean pixel, a random direction, the first cosine mode from top to bottom."""


ClockKind = Literal["cpu", "work"]
"""What a budget is counted in: CPU seconds, or the work that would take them, which a rerun repeats to the bit."""


@dataclass(frozen=True)
class Malicious:
    """What a malicious server does."""

    method: MaliciousMethod
    bins: int = 512
    sort_by: SortBy = "mean"


BatchStatistics = Literal["none", "running", "inferred", "auto"]
"""Which moments of BatchNorm's inputs are matched: none, the broadcast running ones, or the batch's own."""


@dataclass(frozen=True)
class Settings:
    """How hard to try."""

    method: Method = "auto"
    restarts: int = 8
    iterations: int = 2400
    tv: float = 1e-3
    budget_s: float = 20.0
    bn: BatchStatistics = "auto"
    joint: bool = False
    """Optimise label logits along with the images."""
    clock: ClockKind = "cpu"
