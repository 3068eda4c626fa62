"""The worst update of a family against the very rule in use, found without touching a parameter.

Every candidate is a combination of known rows, so its geometry follows from theirs by algebra; a rule that weighs
whole updates decides on that, and the damage is a quadratic form. One evaluation costs n² operations, whatever the
size of the model. A rule that works by coordinate is tried on a sample of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsec.robust.aggregator import by_coordinate, safety_clip
from fedsec.robust.geometry import Geometry, Matrix, combine, measure
from fedsec.robust.rule import CoordinateRule, Infeasible, Rule, Seen, WeightRule, assumed_f

from .crafted import Known

Objective = Literal["deviation", "reverse", "weight"]
Family = Literal["ipm", "alie", "minmax_mean"]
FAMILIES: tuple[Family, ...] = ("ipm", "alie", "minmax_mean")
FACTORS = np.geomspace(0.05, 50, 14)
SAMPLED = 100_000
"""Coordinates on which a rule by coordinate is tried."""
REFINEMENTS = 6
"""Further evaluations around the best factor; the objective jumps for rules that select, so no derivative helps."""


@dataclass(frozen=True)
class Found:
    """The best attack of a search."""

    row: Tensor
    family: Family
    factor: float
    value: float
    """The objective as the algebra predicts it."""
    evaluations: int


@dataclass(frozen=True)
class Board:
    """The known rows and the directions, with their geometry: everything a search needs."""

    rows: tuple[Tensor, ...]
    """h honest updates, then σ where a family needs it."""
    geometry: Geometry
    honest: int

    @classmethod
    def of(cls, known: Known, families: Sequence[Family] = FAMILIES) -> Board:
        """Measure the honest updates, and σ for ALIE's family, in one pass."""
        rows = (*known.updates, known.std) if "alie" in families else known.updates
        return cls(rows, measure(rows), len(known.updates))

    def sampled(self, seed: int = 0) -> Board:
        """The same geometry, over rows of at most `SAMPLED` coordinates."""
        length = len(self.rows[0])
        if length <= SAMPLED:
            return self
        pick = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:SAMPLED].sort().values
        return replace(self, rows=tuple(row[pick.to(row.device)] for row in self.rows))

    def mean(self) -> NDArray[np.float64]:
        """m as coefficients on the rows."""
        coefficients = np.zeros(len(self.rows))
        coefficients[: self.honest] = 1 / self.honest
        return coefficients

    def candidate(self, family: Family, factor: float) -> NDArray[np.float64]:
        """A malicious row as coefficients: −τm, m − τσ, or m − τm/‖m‖·(typical distance)."""
        mean = self.mean()
        if family == "ipm":
            return -factor * mean
        if family == "alie":
            sigma = np.zeros(len(self.rows))
            sigma[-1] = 1.0
            return mean - factor * sigma
        distances = self.geometry.squared_distances[: self.honest, : self.honest]
        reach = np.sqrt(distances.max()) / max(self.geometry.norm_of(mean), 1e-300)
        away: NDArray[np.float64] = mean * (1 - factor * reach)
        return away


def damage(
    board: Board, rule: Rule, row: NDArray[np.float64], malicious: int, objective: Objective, seed: int = 0
) -> float:
    """The objective if `malicious` clients send this row, with safety clip and rule applied as the server does.

    deviation: ‖A − m‖/‖m‖. reverse: −⟨A, m⟩/‖m‖². weight: the attackers' share.

    Args:
        board: for a rule by coordinate one whose rows are `sampled`; its objective is taken over these coordinates.
    """
    h, n = board.honest, board.honest + malicious
    sent = np.zeros((n, len(board.rows)))
    sent[:h, :h] = np.eye(h)
    sent[h:] = row
    geometry = _combined(board.geometry, sent, h)
    clips = np.array(safety_clip(geometry.norms, rule.kappa)[0])
    f, _ = assumed_f(rule, n)
    shares = np.full(n, 1 / n)
    seen = Seen(geometry.scaled(clips), tuple(range(n)), shares, f, np.random.default_rng(seed))
    if isinstance(rule, CoordinateRule):
        return _sampled_damage(board, rule, row, list(clips), seen, objective)
    assert isinstance(rule, WeightRule)
    try:
        weights = rule.decide(seen).coefficients[:n] * clips if rule.feasible(n, f) else np.zeros(n)
    except Infeasible:
        weights = np.zeros(n)
    if objective == "weight":
        return float(weights[h:].sum())
    mean = board.mean()
    norm = max(board.geometry.norm_of(mean), 1e-300)
    aggregate = weights @ sent
    if objective == "reverse":
        return float(-(aggregate @ board.geometry.products @ mean) / norm**2)
    return board.geometry.norm_of(aggregate - mean) / norm


def _sampled_damage(
    board: Board, rule: CoordinateRule, row: NDArray[np.float64], clips: list[float], seen: Seen, objective: Objective
) -> float:
    """What the rule does on the board's coordinates; norms and choices are those of whole updates."""
    honest = list(board.rows[: board.honest])
    forged = combine(board.rows, list(row))
    mean = combine(honest, [1 / board.honest] * board.honest)
    try:
        if not rule.feasible(seen.n, seen.f):
            raise Infeasible
        aggregate, _ = by_coordinate(rule, [*honest, *[forged] * (seen.n - board.honest)], clips, seen)
    except Infeasible:
        aggregate = torch.zeros_like(mean)
    norm = max(float(mean.norm()), 1e-30)
    if objective == "reverse":
        return -float(torch.dot(aggregate, mean)) / norm**2
    return float((aggregate - mean).norm()) / norm


def _combined(geometry: Geometry, sent: Matrix, h: int) -> Geometry:
    """The geometry of the rows Σ_k B_ik z_k, whose coefficients need not have equal sums; the first h are z_1 … z_h."""
    products = sent @ geometry.products @ sent.T
    diagonal = np.diagonal(products)
    squared = np.maximum(0.0, diagonal[:, None] + diagonal - 2 * products)
    squared[:h, :h] = geometry.squared_distances[:h, :h]  # the honest ones keep their digits
    equal = (sent[:, None] == sent[None]).all(2)
    squared[equal] = 0.0
    scale = np.sqrt(np.maximum(0.0, np.outer(diagonal, diagonal)))
    cosine = 1 - np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    cosine[equal] = 0.0
    return Geometry(products, squared, np.clip(cosine, 0.0, 2.0))


def search(
    known: Known,
    rule: Rule,
    malicious: int,
    objective: Objective = "deviation",
    families: Sequence[Family] = FAMILIES,
) -> Found:
    """The factor and family that hurt most: log-spaced factors, then a refinement around the best.

    Args:
        known: the honest updates the adversary knows. rule: the server's. malicious: rows it may send, all alike.
        objective: what it wants; rules by coordinate give no weights. families: kinds of rows to try.
    """
    board = whole = Board.of(known, families)
    if isinstance(rule, CoordinateRule):
        board = whole.sampled()
    evaluations = 0

    def value_of(family: Family) -> Callable[[float], float]:
        def value(factor: float) -> float:
            nonlocal evaluations
            evaluations += 1
            return damage(board, rule, board.candidate(family, factor), malicious, objective)

        return value

    best: tuple[float, Family, float] = (-np.inf, families[0], 0.0)
    for family in families:
        value = value_of(family)
        tried = {float(f): value(float(f)) for f in FACTORS}
        for _ in range(REFINEMENTS):
            peak = max(tried, key=lambda f: tried[f])
            around = sorted(tried)
            index = around.index(peak)
            left, right = around[max(0, index - 1)], around[min(len(around) - 1, index + 1)]
            gaps = [(np.log(peak / left), left), (np.log(right / peak), right)]
            middle = float(np.sqrt(peak * max(gaps)[1]))
            tried[middle] = value(middle)
        factor = max(tried, key=lambda f: tried[f])
        best = max(best, (tried[factor], family, factor))
    value_found, family, factor = best
    row = combine(whole.rows, list(whole.candidate(family, factor)))
    return Found(row, family, factor, value_found, evaluations)
