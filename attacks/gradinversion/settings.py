"""How a user tunes the attack: free of torch, so that listing plugins costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal["auto", "analytic", "cascade", "map_gauss_newton", "dlg", "inverting_gradients"]
"""auto, or one method alone. `auto.METHODS` has a row for each."""


@dataclass(frozen=True)
class Settings:
    """How hard to try."""

    method: Method = "auto"
    restarts: int = 8
    iterations: int = 2400
    tv: float = 1e-3
    budget_s: float = 20.0
