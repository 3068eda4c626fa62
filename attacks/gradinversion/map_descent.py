"""Maximum a posteriori reconstruction by L-BFGS: for batches, and for models too large for an explicit Jacobian.

Works in coordinates w in which the prior is N(0, I): x = μ + V·Λ^½·w. There the prior's curvature is 1 in every
direction, which is why this beats plain L2 matching on batches by far. Minimises Σ ((φ − g)/s)² + ‖w‖², first with a
few components and widened noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import lbfgs
from .candidate import Candidate, Clock, NotApplicable
from .observation import Observation
from .prior import widen
from .starts import PRIOR_SPREAD

if TYPE_CHECKING:
    from .attempt import Attempt

LADDER = ((64, 0.3, 10), (160, 0.1, 10), (1024, 0.01, 30), (1024, 1e-3, 30), (1024, 0.0, 30))
"""(components, widening as a share of ‖g‖, outer iterations); the last stage is for observations with known noise."""
FURTHEST = 30.0
"""A coordinate beyond so many prior standard deviations counts as divergence."""
SOLVED = 1e-2
"""Relative residual below which no further start is tried."""


def map_descent(
    observation: Observation, labels: Tensor, clock: Clock, generator: torch.Generator, *, seeds: int = 2
) -> list[Candidate]:
    """Reconstruct B images from up to `seeds` starts; one candidate each."""
    prior, simulation = observation.prior, observation.eager.simulation
    if prior.rank < 1:
        raise NotApplicable("no public images to take principal components from")
    scale = prior.variance.sqrt()
    sent = float(observation.weights.sum())
    base = torch.where(observation.weights > 0, observation.std**2, 1.0)

    def images_at(point: Tensor) -> Tensor:
        return prior.synthesise(point * scale[: point.shape[1]])

    def descend(point: Tensor, share: Clock) -> Candidate:
        evaluations = 0
        for rank, widening, outer in LADDER:
            if 0 < widening < observation.relative_noise or (widening == 0 and observation.noise_std == 0):
                continue
            precision = observation.weights / (base + (widening * observation.norm) ** 2 / sent)

            def objective(at: Tensor, precision: Tensor = precision) -> Tensor:
                difference = simulation.flat(images_at(at), labels) - observation.gradient
                return ((precision * difference) @ difference + (at**2).sum()) / sent

            start = widen(point, min(rank, prior.rank))
            ended = lbfgs.minimise(objective, start, share, outer=outer, history=20, limit=FURTHEST, change=1e-3)
            point, evaluations = ended.point, evaluations + ended.evaluations
        return Candidate(images_at(point).clamp(0, 1), labels, "map_descent", iterations=evaluations)

    found: list[Candidate] = []
    for seed in range(seeds):
        draw = torch.randn(observation.batch, min(LADDER[0][0], prior.rank), generator=generator)
        found.append(descend(PRIOR_SPREAD * draw.to(prior.mean), clock.share(1 / (seeds - seed))))
        sent_by_it = observation.simulation.flat(found[-1].images, labels)
        difference = (sent_by_it - observation.gradient) * observation.weights
        if clock.left <= 0 or float(difference.norm()) < SOLVED * observation.norm:
            break
    return found


def stage(run: Attempt) -> None:
    """Batches, and models too large for an explicit Jacobian; smooth activations, or any where noise is known."""
    wanted = run.noisy or not run.kinked
    if wanted and (run.observation.batch > 1 or "map_gauss_newton" in run.skipped):
        run.attempt("map_descent", lambda y, c: map_descent(run.observation, y, c, run.generator), 0.7)
