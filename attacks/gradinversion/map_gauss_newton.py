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

from .candidate import Candidate, NotApplicable
from .clock import Clock
from .gauss_newton import Problem, Solution, jacobian, minimise, posterior_variance
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
FINE_ANNEALING = (*ANNEALING, 3e-4, 1e-4, 3e-5)
"""The same where entries are missing."""
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


def schedule(full: int, noise: float, annealing: tuple[float, ...] = ANNEALING) -> list[_Stage]:
    """Stages for a relative noise: widenings below the noise are left out, since the noise itself is that wide."""
    stages = [_Stage(min(k, full), w, 4, 0.03) for k, w in LADDER if w > noise]
    stages += [_Stage(full, w, 4, 0.03) for w in annealing if noise < w < LADDER[-1][1]]
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
    rows = int(observation.weights.sum())
    full = min(rank_limit(observation, rows), limit or observation.prior.rank)
    if full < min(LEAST_RANK, observation.prior.mean.numel()):
        raise NotApplicable(
            f"{full} components are too few ({rows:,} gradient entries, {observation.prior.rank} public)"
        )
    prior = observation.prior
    problem = measurements(observation, labels)
    unit = observation.norm**2 / rows
    z, steps = torch.zeros(1, 0, device=prior.mean.device), 0
    annealing = ANNEALING if observation.kept is None else FINE_ANNEALING
    for stage in schedule(full, max(observation.relative_noise, observation.relative_floor), annealing):
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


def measurements(observation: Observation, labels: Tensor) -> Problem:
    """The entries of g that were sent and can be simulated, with their noise."""
    simulation, kept = observation.simulation, observation.kept
    laplace = observation.noise == "laplace" and observation.noise_std > 0
    if kept is None:
        return Problem(lambda x: simulation.flat(x, labels), observation.gradient, observation.std**2, laplace)
    rows = kept.nonzero()[:, 0]
    return Problem(
        lambda x: simulation.flat(x, labels)[rows], observation.gradient[rows], observation.std[rows] ** 2, laplace
    )


def approximate(observation: Observation, problem: Problem, z: Tensor) -> Posterior:
    """The posterior's Gaussian approximation at x = μ + V·z; directions that were not fitted keep the prior."""
    prior = observation.prior
    scale = prior.variance[: z.shape[1]].double()
    slopes = jacobian(problem, prior, z) * scale.sqrt()
    values, left = posterior_variance((slopes.T / problem.variance.double()) @ slopes, scale)
    gamma, inside = values / (1 + values), float(left.sum())
    outside = float(prior.variance[z.shape[1] :].double().sum())
    outside += prior.floor * (prior.mean.numel() - prior.rank)
    variance = (inside + outside) / prior.mean.numel()
    return Posterior(variance, float(gamma.sum()), math.sqrt(2 * float((gamma**2).sum())))


def value_at(problem: Problem, prior: Prior, z: Tensor) -> float:
    """F at x = μ + V·z with the declared noise."""
    residual = problem.residual(prior.synthesise(z))
    return float((problem.weights(residual, 0.0) * residual**2).sum() + (z**2 / prior.variance[: z.shape[1]]).sum())


def _explained(problem: Problem, solution: Solution) -> bool:
    return solution.misfit / max(1, int(torch.isfinite(problem.variance).sum())) <= EXPLAINED


def stage(run: Attempt) -> None:
    """One image; with known noise, or smooth activations."""
    observation = run.observation
    if run.auto and run.kinked and not run.noisy:
        run.skipped["map_gauss_newton"] = f"without noise it stalls at the kinks of {run.kinked}"
        return
    limit = COARSE_RANK if run.kinked or observation.relative_noise > 1 else None
    share = 0.6 if run.auto else 1.0
    run.attempt("map_gauss_newton", lambda y, c: map_gauss_newton(observation, y, c, limit=limit), share)
