"""What is a robust aggregation rule? The base classes of rules that weigh whole updates and of rules by coordinate.

A rule never learns how many clients are malicious: `declared_f` is what the server was told. Every rule also says how
suspicious each client looks. The functions work on the geometry of a round, so that a rule can be evaluated on
another's round (a shadow) or searched by an attack without touching a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedsec.defense import Defense

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedsec.robust.aggregator import RuleAggregator
    from fedsec.robust.geometry import Geometry, Matrix, Vector
    from fedsec.robust.order import Blocks
    from fedsec.types import RoundContext

PreStep = Literal["none", "nnm", "bucketing"]
ASSUMED_SHARE = 0.2
"""Share of clients that is taken for malicious where the server was told nothing."""


@dataclass(frozen=True)
class Seen:
    """What a rule decides on: one round's submissions after screening and the safety clip."""

    geometry: Geometry
    """Of the n clients' rows, then of the rule's own extra rows."""
    clients: tuple[int, ...]
    shares: Vector
    """(n,) what the strategy gives each client, summing to 1."""
    f: int
    """The number of malicious clients that the rule reckons with."""
    generator: np.random.Generator
    memory: Mapping[str, Any] = field(default_factory=dict)
    """What the rule kept from earlier rounds, by client id where it is a client's."""

    @property
    def n(self) -> int:
        """Clients in this round."""
        return len(self.clients)


@dataclass(frozen=True)
class Weighing:
    """How much of each row enters the aggregate."""

    coefficients: Vector
    """(m,) on the clients' rows and the extra rows; the aggregate is Σ c_i u_i."""
    suspicion: Vector
    """(n,) larger is more suspicious."""
    flags: tuple[str, ...] = ()
    memory: Mapping[str, Any] = field(default_factory=dict)
    """What to keep for the next round."""


class Infeasible(Exception):
    """The rule has no answer for this round; the message says which requirement fails."""


@dataclass(frozen=True)
class Rule(Defense):
    """Base of all robust rules."""

    kind: ClassVar[Literal["weights", "coordinates"]]
    requirement: ClassVar[str]
    """In words, with n clients of which f are malicious."""
    uses_f: ClassVar[bool] = False
    needs_geometry: ClassVar[bool] = True
    needs_root: ClassVar[bool] = False
    """The server trains on images of its own, and the rule compares with that update."""

    declared_f: Annotated[
        int | None,
        Field(ge=0, description="malicious clients that the server reckons with; none: a fifth of the clients"),
    ] = None
    kappa: Annotated[
        float, Field(gt=0, description="updates longer than this many medians are shortened to it; inf: never")
    ] = 10.0
    pre: Annotated[
        PreStep, Field(description="mix updates first: nearest-neighbour mixing, or means of random buckets")
    ] = "none"

    def aggregator(self) -> RuleAggregator:
        """The rule as a server applies it."""
        from fedsec.robust.aggregator import RuleAggregator

        return RuleAggregator(self)

    def feasible(self, n: int, f: int) -> bool:
        """Can the rule work with n clients, f of them malicious?"""
        return n >= 1

    def factors(self, norms: Vector, shares: Vector, f: int, memory: Mapping[str, Any]) -> Vector:
        """(n,) by how much the rule itself shortens each update, from their norms."""
        return np.ones(len(norms))

    def extra_rows(self, clients: tuple[int, ...], memory: Mapping[str, Any], like: Tensor) -> list[Tensor]:
        """Vectors (d,) of the rule's own that take part in the geometry, such as the last aggregate."""
        return []

    def remember(self, rows: Sequence[Tensor], clips: Sequence[float], seen: Seen, delta: Tensor) -> Mapping[str, Any]:
        """What to keep for the next round, beside `Weighing.memory`."""
        return {}

    def finish(self, delta: Tensor, seen: Seen, ctx: RoundContext) -> Tensor:
        """The last change to the aggregate, such as noise."""
        return delta


@dataclass(frozen=True)
class WeightRule(Rule):
    """A rule whose aggregate is a weighted sum of the updates."""

    kind: ClassVar[Literal["weights", "coordinates"]] = "weights"

    def weigh(self, seen: Seen) -> Weighing:
        """Decide on the rows as they are after clipping and pre-steps.

        Raises:
            Infeasible: there is no safe answer.
        """
        raise NotImplementedError

    def decide(self, seen: Seen) -> Weighing:
        """Clip, mix and weigh; coefficients and suspicion on the rows of `seen`.

        Mixed rows belong to several clients: coefficients and suspicion travel back through the transpose.
        """
        n, m = seen.n, len(seen.geometry)
        factors = np.ones(m)
        factors[:n] = self.factors(seen.geometry.norms[:n], seen.shares, seen.f, seen.memory)
        geometry = seen.geometry.scaled(factors)
        mixing = self.mixing(replace(seen, geometry=geometry))
        if mixing is None:
            found = self.weigh(replace(seen, geometry=geometry))
            return replace(found, coefficients=found.coefficients * factors)
        rows = len(mixing) - (m - n)
        mixed = replace(
            seen,
            geometry=geometry.mixed(mixing),
            clients=tuple(range(rows)),
            shares=np.full(rows, 1 / rows),
        )
        if not self.feasible(rows, seen.f):
            raise Infeasible(f"{self.name} needs {self.requirement}; {self.pre} leaves {rows} rows for f = {seen.f}")
        found = self.weigh(mixed)
        part = mixing[:rows, :n]
        return replace(
            found,
            coefficients=(mixing.T @ found.coefficients) * factors,
            # A client that no mixed row contains is as suspicious as the most suspicious one.
            suspicion=np.divide(
                part.T @ found.suspicion, part.sum(0), out=np.full(n, found.suspicion.max()), where=part.sum(0) > 0
            ),
        )

    def mixing(self, seen: Seen) -> Matrix | None:
        """The matrix T of the pre-step, extra rows left alone; None where there is none."""
        from fedsec.robust.presteps import mixing_matrix

        mixing = mixing_matrix(self.pre, seen)
        extra = len(seen.geometry) - seen.n
        if mixing is None or extra == 0:
            return mixing
        whole = np.zeros((len(mixing) + extra, seen.n + extra))
        whole[: len(mixing), : seen.n] = mixing
        whole[len(mixing) :, seen.n :] = np.eye(extra)
        return whole


@dataclass(frozen=True)
class CoordinateRule(Rule):
    """A rule that looks at every coordinate on its own."""

    kind: ClassVar[Literal["weights", "coordinates"]] = "coordinates"
    needs_geometry: ClassVar[bool] = False

    def reduce(self, fill: Blocks, count: int, length: int, f: int, device: torch.device) -> Tensor:
        """The aggregate (d,) of the rows that `fill` writes block by block (see `order`)."""
        raise NotImplementedError

    def select(self, seen: Seen) -> Sequence[int]:
        """The rows that take part."""
        return range(seen.n)


def assumed_f(rule: Rule, n: int) -> tuple[int, bool]:
    """(f, whether it is an assumption): what the server was told, else a fifth of the clients, at least 1 of 5.

    An assumption is lowered to what the rule can bear; a declaration is not.
    """
    if rule.declared_f is not None:
        return rule.declared_f, False
    f = max(int(ASSUMED_SHARE * n), 1 if n >= 5 else 0)
    while f > 0 and not rule.feasible(n, f):
        f -= 1
    return f, rule.uses_f
