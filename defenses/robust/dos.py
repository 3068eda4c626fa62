"""Distance-based outlier suppression (DOS): weights from how outlying a client's distances are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from fedsec.robust.rule import Seen, Weighing, WeightRule

if TYPE_CHECKING:
    from fedsec.robust.geometry import Geometry, Matrix, Vector

MAD_TO_STD = 1.4826
"""Median absolute deviation of a Gaussian, inverted."""


def copod_scores(samples: Matrix) -> Vector:
    """(n,) COPOD's outlier score of each row (Li et al. 2020, 2009.09463).

    Tail probabilities are empirical, and tied values count in full on both sides, so that no tail is ever zero. The
    side of each column follows the sign of its skewness, both count where that is zero.
    """
    n = len(samples)
    ordered = np.sort(samples, axis=0)
    left, right = np.empty_like(samples), np.empty_like(samples)
    for j in range(samples.shape[1]):
        left[:, j] = -np.log(np.searchsorted(ordered[:, j], samples[:, j], side="right") / n)
        right[:, j] = -np.log((n - np.searchsorted(ordered[:, j], samples[:, j], side="left")) / n)
    side = _skew_signs(ordered)
    chosen = left * (side != 1) + right * (side != -1)
    scores: Vector = np.maximum(chosen, (left + right) / 2).sum(1)
    return scores


def _skew_signs(ordered: Matrix) -> Vector:
    """(n,) −1, 0 or 1: the sign of each column's third central moment, 0 where rounding alone decides it."""
    centred = ordered - ordered.mean(0)
    third, size = (centred**3).sum(0), (np.abs(centred) ** 3).sum(0)
    signs: Vector = np.where(np.abs(third) <= 1e-12 * size, 0.0, np.sign(third))
    return signs


def dos_scores(geometry: Geometry) -> Vector:
    """(n,) r: COPOD's score on Euclidean distances plus that on cosine distances."""
    return copod_scores(np.sqrt(geometry.squared_distances)) + copod_scores(geometry.cosine_distances)


def softmin(scores: Vector) -> Vector:
    """(n,) exp(−(r − min r)), normalised: shifted first, since exp(−745) is 0 in float64."""
    weights = np.exp(-(scores - scores.min()))
    normalised: Vector = weights / weights.sum()
    return normalised


@dataclass(frozen=True)
class DOS(WeightRule):
    """Weights are the softmax of minus the outlier scores (Alkhunaizi et al. 2022, 2207.10804, from its equations).

    No count of attackers and no threshold. Sums over n columns sharpen the softmax with n, until one client has nearly
    all the weight; and identical colluders, who share their zeros, look central.
    """

    name: ClassVar[str] = "dos"
    protects: ClassVar[str] = "softmax of outlier scores of distances, as published; identical colluders beat it"
    requirement: ClassVar[str] = "n ≥ 3"

    def feasible(self, n: int, f: int) -> bool:
        """Ranks need three."""
        return n >= 3

    def weigh(self, seen: Seen) -> Weighing:
        """a_i ∝ exp(−r_i)."""
        scores = dos_scores(seen.geometry)
        return Weighing(softmin(scores), scores)


@dataclass(frozen=True)
class DOSClipped(DOS):
    """DOS on updates that were shortened to a multiple of the median norm first."""

    name: ClassVar[str] = "dos_clipped"
    protects: ClassVar[str] = "DOS on updates shortened to a multiple of the median norm"

    c: Annotated[float, Field(gt=0, description="updates are shortened to c times the median norm")] = 2.0

    def factors(self, norms: Vector, shares: Vector, f: int, memory: Mapping[str, Any]) -> Vector:
        """min(1, c·M/‖u_i‖)."""
        limit = self.c * float(np.median(norms))
        return np.minimum(1.0, limit / np.maximum(norms, 1e-300)) if limit > 0 else np.ones(len(norms))


def representatives(geometry: Geometry) -> tuple[list[int], list[int]]:
    """(rows that stand for a group of equal rows, the position of each row's representative among them).

    Rows are equal where their squared distance is at most `NEAR` of their squared norms: no outlier can move that
    threshold, and honest clients never meet it.
    """
    from fedsec.robust.geometry import NEAR

    squares = np.diagonal(geometry.products)
    near = geometry.squared_distances <= NEAR * (squares[:, None] + squares)
    chosen: list[int] = []
    position: list[int] = []
    for i in range(len(geometry)):
        same = [k for k, j in enumerate(chosen) if near[i, j]]
        if not same:
            chosen.append(i)
        position.append(same[0] if same else len(chosen) - 1)
    return chosen, position


@dataclass(frozen=True)
class DOSGuarded(DOSClipped):
    """DOS that can take weight away and never gives any: coefficients s_i/(n·g_i), not normalised. Ours.

    g_i counts the clients that sent the same update, so that identical colluders share one client's weight. s_i is 1
    up to one robust standard deviation above the median outlier score and falls exponentially beyond. Whatever f
    malicious clients send, their coefficients sum to at most f/n, since each is at most 1/n; what is taken away goes
    to nobody, and the step is shorter. A rule that normalises can't promise that: colluders who are exchangeable with
    honest clients get more than their share whenever an honest client loses some.
    """

    name: ClassVar[str] = "dos_guarded"
    protects: ClassVar[str] = "DOS that only takes weight away: f of n clients never hold more than f/n"

    tolerance: Annotated[
        float, Field(ge=0, description="robust standard deviations above the median score that cost nothing")
    ] = 1.0

    def weigh(self, seen: Seen) -> Weighing:
        """Suspicion is the score; equal rows have equal ones."""
        n = len(seen.geometry)
        chosen, position = representatives(seen.geometry)
        if len(chosen) < 3:
            return Weighing(np.full(n, 1 / n), np.zeros(n), ("dos_guarded: fewer than three different updates",))
        scores = dos_scores(seen.geometry.part(chosen))
        median = float(np.median(scores))
        spread = MAD_TO_STD * float(np.median(np.abs(scores - median)))
        keep = np.exp(-np.maximum(0.0, scores - median - self.tolerance * spread))
        sizes = np.bincount(position)
        return Weighing((keep / sizes)[position] / n, scores[position])
