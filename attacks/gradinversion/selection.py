"""Which candidate is handed in? Chosen without the truth, and without any similarity to real images.

Certificates first. Where noise is known of, or rounding is as coarse as noise, then the posterior density: misfit plus
prior energy. Otherwise the relative residual, and within one per cent the smaller prior energy.
"""

from __future__ import annotations

from collections.abc import Sequence

from scipy.optimize import linear_sum_assignment

from .candidate import Candidate
from .observation import Observation

COARSE = 1e-3
"""Rounding, as a share of ‖g‖, that is treated as noise."""
TIE = 0.01
"""Residuals this close, relative, count as equal."""


def select(candidates: Sequence[Candidate], observation: Observation) -> Candidate:
    """The candidate to report; all must have been assessed."""
    proven = max(c.certified for c in candidates)
    pool = [c for c in candidates if c.certified == proven]
    partial = 0 < proven < observation.batch  # what is not proven is then hardly more than rounding
    if partial or observation.noise_std > 0 or observation.relative_floor > COARSE:
        return min(pool, key=lambda c: c.misfit + c.energy)
    lowest = min(c.residual for c in pool)
    return min((c for c in pool if c.residual <= lowest * (1 + TIE)), key=lambda c: c.energy)


def disagreement(first: Candidate, second: Candidate) -> float:
    """Root mean square difference of two candidates' pixels after the best matching of their images.

    Images of a batch come in no order, so the assignment with the least total error is used (Kuhn 1955).
    """
    left, right = first.images.flatten(1), second.images.flatten(1)
    cost = ((left[:, None] - right[None]) ** 2).mean(2)
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return float(cost[rows, columns].mean().sqrt())
