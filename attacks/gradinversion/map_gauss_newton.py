"""Maximum a posteriori reconstruction of one image: what the noisy update and public images together say.

Under known noise this is the adaptive attack, and it falls back to the public mean where the update says nothing;
without noise it starts widened and anneals to the rounding floor. Coordinates are principal components of public
images, a few at first (`gauss_newton` does the mathematics).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .candidate import Candidate, Clock, NotApplicable
from .features import Features
from .gauss_newton import Problem, Solution, jacobian, minimise
from .observation import Observation
from .prior import Prior, widen

if TYPE_CHECKING:
    from .attempt import Attempt

MAX_JACOBIAN = 120_000_000
"""Entries of the largest Jacobian (1 GB in float64)."""
LEAST_RANK = 32
"""Components below which the estimate is not worth having."""
LADDER = ((64, 0.3), (160, 0.1))
"""(components, widening) of the first stages; the widening is a share of ‖g‖."""
ANNEALING = (0.1, 0.03, 0.01, 3e-3, 1e-3)
"""Widenings of the stages at full rank."""
FEATURE_LADDER = ((64, 0.3, 6), (160, 0.1, 6))
"""(components, widening, steps) of the feature inversion."""
SIGNIFICANT = 3.0
"""Standard deviations by which an explanation must beat chance."""
COARSE_RANK = 160
"""Components where more would cost time and bring nothing."""
EXPLAINED = 1.25
"""Largest reduced χ² that counts as explained; a small one is no failure, as the floor may be set too high."""


@dataclass(frozen=True)
class _Stage:
    rank: int
    widening: float
    steps: int
    tolerance: float


@dataclass(frozen=True)
class Posterior:
    """The Gaussian approximation at a solution, with h the eigenvalues of Λ^½JᵀWJΛ^½ and γ = h/(1 + h)."""

    variance: float
    """Mean posterior variance of a pixel."""
    freedom: float
    """Σ γ: directions that the update decides rather than the prior."""
    spread: float
    """√(2·Σ γ²): standard deviation of the gain in F that pure noise would bring."""

    @property
    def psnr(self) -> float:
        """−10·log₁₀ of the variance, dB."""
        return -10 * math.log10(max(self.variance, 1e-14))

    def significant(self, gain: float) -> bool:
        """Is a fall of F by `gain` from the prior mean more than noise alone explains (its mean is `freedom`)?"""
        return gain > self.freedom + SIGNIFICANT * self.spread


def rank_limit(observation: Observation, rows: int) -> int:
    """Components that a Jacobian of so many rows can afford."""
    return min(observation.prior.rank, MAX_JACOBIAN // max(1, rows))


def schedule(full: int, noise: float) -> list[_Stage]:
    """Stages for a relative noise: widenings below the noise are left out, since the noise itself is that wide."""
    stages = [_Stage(min(k, full), w, 4, 0.03) for k, w in LADDER if w > noise]
    stages += [_Stage(full, w, 4, 0.03) for w in ANNEALING if noise < w < LADDER[-1][1]]
    return [*stages, _Stage(full, 0.0, 15, 1e-4)]


def map_gauss_newton(
    observation: Observation, labels: Tensor, clock: Clock, *, limit: int | None = None
) -> list[Candidate]:
    """Reconstruct one image by Gauss–Newton on the whole observed gradient.

    Where noise is known and the solution fits no better than noise alone would make it, the public mean is handed in.

    Args:
        observation: g, φ, noise and prior; B = 1.
        labels: (1,) or (1, L).
        clock: CPU budget.
        limit: components at most.
    """
    if observation.batch > 1:
        raise NotApplicable(f"explicit Gauss–Newton is for one image, not {observation.batch}")
    rows = observation.simulation.size
    full = min(rank_limit(observation, rows), limit or observation.prior.rank)
    if full < min(LEAST_RANK, observation.prior.mean.numel()):
        raise NotApplicable(
            f"{full} components are too few ({rows:,} gradient entries, {observation.prior.rank} public)"
        )
    prior = observation.prior
    problem = Problem(
        lambda x: observation.simulation.flat(x, labels),
        observation.gradient,
        observation.std**2,
        laplace=observation.noise == "laplace" and observation.noise_std > 0,
    )
    unit = observation.norm**2 / float(observation.weights.sum())
    z, steps = torch.zeros(1, 0, device=prior.mean.device), 0
    for stage in schedule(full, observation.relative_noise):
        z = widen(z, stage.rank)
        extra = stage.widening**2 * unit
        solution = minimise(problem, prior, z, clock, extra=extra, max_iter=stage.steps, tolerance=stage.tolerance)
        z, steps = solution.coordinates, steps + solution.iterations
        if clock.left <= 0:
            break
    images = prior.synthesise(z).clamp(0, 1)
    if clock.left <= 0 or (z.shape[1] < prior.mean.numel() and observation.noise_std == 0):
        notes = (f"{z.shape[1]} of {prior.mean.numel()} directions were fitted",)
        return [Candidate(images, labels, "map_gauss_newton", iterations=steps, notes=notes)]
    posterior = approximate(observation, problem, z)
    gain = value_at(problem, prior, torch.zeros_like(z)) - value_at(problem, prior, z)
    if observation.noise_std > 0 and not posterior.significant(gain):
        mean, what = prior.mean[None].clone(), "the update says no more than its noise: the public mean is handed in"
        return [Candidate(mean, labels, "map_gauss_newton", est_psnr=None, iterations=steps, notes=(what,))]
    return [
        Candidate(
            images,
            labels,
            "map_gauss_newton",
            est_psnr=posterior.psnr,
            layers_ok=z.shape[1] == prior.mean.numel() and _explained(problem, solution),
            iterations=steps,
        )
    ]


def approximate(observation: Observation, problem: Problem, z: Tensor) -> Posterior:
    """The posterior's Gaussian approximation at x = μ + V·z; directions that were not fitted keep the prior."""
    prior = observation.prior
    scale = prior.variance[: z.shape[1]].double()
    slopes = jacobian(problem, prior, z) * scale.sqrt()
    values, vectors = torch.linalg.eigh((slopes.T / problem.variance.double()) @ slopes)
    values = values.clamp(min=0)
    gamma = values / (1 + values)
    inside = float(scale @ (vectors**2 @ (1 / (1 + values))))
    outside = float(prior.variance[z.shape[1] :].double().sum())
    outside += prior.floor * (prior.mean.numel() - prior.rank)
    variance = (inside + outside) / prior.mean.numel()
    return Posterior(variance, float(gamma.sum()), math.sqrt(2 * float((gamma**2).sum())))


def value_at(problem: Problem, prior: Prior, z: Tensor) -> float:
    """F at x = μ + V·z with the declared noise."""
    residual = problem.residual(prior.synthesise(z))
    return float((problem.weights(residual, 0.0) * residual**2).sum() + (z**2 / prior.variance[: z.shape[1]]).sum())


def invert_features(observation: Observation, features: Features, labels: Tensor, clock: Clock) -> Candidate:
    """The image whose features are ĥ and which looks like public images: a start for optimisations, in under a second.

    A forward pass is all that a Jacobian column costs here.
    """
    norm = float(features.value.norm())
    problem = Problem(lambda x: features.function(x)[0], features.value, features.std**2 + (1e-6 * norm) ** 2)
    z, steps = torch.zeros(1, 0, device=observation.prior.mean.device), 0
    for rank, widening, limit in FEATURE_LADDER:
        rank = min(rank, rank_limit(observation, len(features.value)))
        z = widen(z, rank)
        extra = (widening * norm) ** 2 / len(features.value)
        solution = minimise(problem, observation.prior, z, clock, extra=extra, max_iter=limit, tolerance=0.03)
        z, steps = solution.coordinates, steps + solution.iterations
    images = observation.prior.synthesise(z).clamp(0, 1)
    return Candidate(images, labels, "feature_inversion", iterations=steps)


def _explained(problem: Problem, solution: Solution) -> bool:
    return solution.misfit / max(1, int(torch.isfinite(problem.variance).sum())) <= EXPLAINED


def stage(run: Attempt) -> None:
    """One image; with known noise, or smooth activations. Piecewise-linear nets give their features instead."""
    observation = run.observation
    if run.auto and run.kinked and not run.noisy:
        run.skipped["map_gauss_newton"] = f"without noise it stalls at the kinks of {run.kinked}"
        if run.features is not None:
            known = run.features
            run.attempt("feature_inversion", lambda y, c: [invert_features(observation, known, y, c)], 0.25)
        return
    limit = COARSE_RANK if run.kinked or observation.relative_noise > 1 else None
    share = 0.6 if run.auto else 1.0
    run.attempt("map_gauss_newton", lambda y, c: map_gauss_newton(observation, y, c, limit=limit), share)
