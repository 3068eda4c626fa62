"""Norm clipping: shorten what is long, then average."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedsec.errors import ConfigError
from fedsec.robust.rule import Seen, Weighing, WeightRule

if TYPE_CHECKING:
    from fedsec.robust.aggregator import RuleAggregator
    from fedsec.robust.geometry import Vector
    from fedsec.types import RoundContext, Update

QUANTILE = 0.5
"""Share of clients that the adaptive bound lets through unclipped."""
RATE = 0.2
"""Rate at which the adaptive bound moves."""


@dataclass(frozen=True)
class NormClip(WeightRule):
    """Every update is shortened to a norm C, then weighed by capped sample counts (Sun et al. 2019, 1911.07963).

    C is fixed, or a multiple of the median norm, or follows the median over rounds (Andrew et al. 2021, 1905.03871).
    One client moves the model by at most its share times C. The only rule here that makes use of sample counts.
    """

    name: ClassVar[str] = "norm_clip"
    protects: ClassVar[str] = "bounds what one client can do: updates are shortened to a common norm"
    requirement: ClassVar[str] = "n ≥ 1"

    bound: Annotated[
        Literal["median", "fixed", "adaptive"],
        Field(description="C: a multiple of the median norm, a fixed number, or a quantile followed over rounds"),
    ] = "median"
    c: Annotated[
        float, Field(gt=0, description="the multiple, or the fixed norm; 1 is expensive where sites differ")
    ] = 2.0
    at: Annotated[
        Literal["server", "client"],
        Field(description="who shortens; client: with bound=fixed alone, for servers that see no individual update"),
    ] = "server"

    def __post_init__(self) -> None:
        if self.at == "client" and self.bound != "fixed":
            raise ConfigError("norm_clip: at=client needs bound=fixed, since a client knows no norm but its own")

    def aggregator(self) -> RuleAggregator | None:  # type: ignore[override]
        """The rule on the server; nothing where the clients clip themselves."""
        return super().aggregator() if self.at == "server" else None

    def on_upload(self, update: Update, ctx: RoundContext) -> Update:
        """At the client: shorten to C. A malicious client skips this, and under encryption nobody can tell."""
        if self.at == "server":
            return update
        norm = float(update.delta.norm())
        return update if norm <= self.c else replace(update, delta=update.delta * (self.c / norm))

    def public_knowledge(self, client: int) -> Mapping[str, Any]:
        """The bound, where it is the clients'."""
        return {"clip_norm": self.c, "clip_scope": "update", "clip_order": 2} if self.at == "client" else {}

    def limit(self, norms: Vector, memory: Mapping[str, Any]) -> float:
        """C of this round."""
        if self.bound == "fixed":
            return self.c
        median = float(np.median(norms))
        return self.c * median if self.bound == "median" else float(memory.get("limit", median))

    def factors(self, norms: Vector, shares: Vector, f: int, memory: Mapping[str, Any]) -> Vector:
        """min(1, C/‖u_i‖)."""
        limit = self.limit(norms, memory)
        return np.minimum(1.0, limit / np.maximum(norms, 1e-300)) if limit > 0 else np.ones(len(norms))

    def decide(self, seen: Seen) -> Weighing:
        """Suspicion is the norm in units of C, as sent."""
        norms = seen.geometry.norms[: seen.n]
        limit = self.limit(norms, seen.memory)
        found = super().decide(seen)
        inside = float((norms <= limit).mean())
        memory = {"limit": limit * math.exp(-RATE * (inside - QUANTILE))} if self.bound == "adaptive" else {}
        return Weighing(found.coefficients, norms / max(limit, 1e-300), found.flags, memory)

    def weigh(self, seen: Seen) -> Weighing:
        """The shares of the shortened updates."""
        return Weighing(seen.shares, seen.geometry.norms)
