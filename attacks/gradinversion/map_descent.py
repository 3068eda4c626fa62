"""Maximum a posteriori reconstruction of a batch, and of images behind models too large for an explicit Jacobian.

At first with 64 principal components of public images and from several starts side by side, then with more components
from the best. What makes it work: components that are left out enter as noise with the covariance that they have on
public images (`approximation`); coordinates in which the problem is round (`curvature`); starts that are mixtures of
public images which would have caused nearly the same update. A batch of one class has many wrong explanations that a
single start cannot leave: images whose differences are mixed up while their mean is right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import vmap

from .approximation import ErrorModel, white_error
from .candidate import Candidate, NotApplicable
from .clock import Clock
from .curvature import Curvature, full_curvature, prior_curvature, shared_curvature
from .examples import Examples, find_examples
from .gauss_newton import derivatives
from .observation import Observation
from .prior import widen
from .side_by_side import minimise_all
from .starts import PRIOR_SPREAD, public_mixtures

if TYPE_CHECKING:
    from .attempt import Attempt


@dataclass(frozen=True)
class _Stage:
    rank: int
    starts: int
    evaluations: int
    blind: float
    """Variance of the error where no examples tell it: as a share of ‖g‖, squared and spread over all entries."""
    widening: float = 0.0
    """The same in addition to what examples tell."""


LADDER = (
    _Stage(64, 6, 25, 0.3),
    _Stage(64, 3, 30, 0.3),
    _Stage(320, 1, 100, 0.01),
    _Stage(520, 1, 100, 3e-3),
    _Stage(1024, 1, 300, 1e-3, 1e-3),
    _Stage(1024, 1, 300, 1e-4, 1e-4),
)
"""Where every image adds a similar share to the update."""
SLOW_LADDER = (
    _Stage(64, 8, 30, 0.3),
    _Stage(128, 3, 40, 0.1),
    _Stage(320, 1, 100, 0.01),
    _Stage(520, 1, 300, 1e-3, 1e-3),
    _Stage(1024, 1, 300, 1e-3, 1e-3),
)
"""Where shares differ by much, as behind a trained model."""
COARSE_LADDER = (
    _Stage(64, 4, 25, 0.3),
    _Stage(64, 2, 40, 0.3),
    _Stage(160, 1, 60, 0.1),
)
"""Where kinks make the update too rough a function of the image for details."""
SETUP = 0.1
"""Share of the budget that examples may cost."""
ROUND = 0.5
"""Share of the time left that the Jacobians of one stage may cost."""
TRIES = 12
"""Mixtures of public images that are improved."""
SHRINK = 0.6
"""Starts lie at so much of the mixtures' distance from the public mean."""
AT_ONCE = 40_000_000
"""Entries of one set of Jacobians."""
COLUMN = 2.0
"""What a column of a Jacobian costs, in gradients."""
MAX_FULL = 2100
"""Largest B·K for the full Gauss–Newton matrix."""
FURTHEST = 1e5
"""Whitened coordinates beyond which no step leads."""
FLAT = 1e-3
"""Relative fall in ten evaluations below which a stage has ended."""
FIRST = 0.9
"""Share of the budget for the first set of starts, where it needs so much."""
SOLVED = 1e-2
"""Relative residual below which no further round of starts is tried."""


def map_descent(
    observation: Observation,
    labels: Tensor,
    clock: Clock,
    generator: torch.Generator,
    *,
    rounds: int = 2,
    coarse: bool = False,
) -> list[Candidate]:
    """Reconstruct B images from up to `rounds` sets of starts; one candidate each. `coarse`: no more than outlines."""
    if observation.prior.rank < 1:
        raise NotApplicable("no public images to take principal components from")
    examples = find_examples(observation, labels, SETUP * clock.left)
    if coarse and examples is None:
        raise NotApplicable("outlines need the gradients of public images, which cost too much or do not add up here")
    search = _Search(observation, labels, generator, examples, coarse)
    found: list[Candidate] = []
    for left in range(rounds, 0, -1):
        points, evaluations = search.climb(clock.share(1.0 if left == 1 else FIRST))
        images = observation.prior.synthesise(points).clamp(0, 1)
        found.append(Candidate(images, labels, "map_descent", iterations=evaluations))
        difference = (observation.simulation.flat(images, labels) - observation.gradient).detach()
        if clock.left <= 0 or float((difference * observation.weights).norm()) < SOLVED * observation.norm:
            break
    return found


@dataclass(frozen=True)
class _Search:
    """One batch, under one guess of its labels."""

    observation: Observation
    labels: Tensor
    generator: torch.Generator
    examples: Examples | None
    coarse: bool

    @property
    def ladder(self) -> tuple[_Stage, ...]:
        """The stages."""
        if self.coarse:
            return COARSE_LADDER
        return SLOW_LADDER if self.examples is not None and self.examples.uneven else LADDER

    def climb(self, clock: Clock) -> tuple[Tensor, int]:
        """All stages from one set of starts: coordinates (B, K) of the best, evaluations."""
        observation, prior = self.observation, self.observation.prior
        points, like = self.starts(self.ladder[0])
        images = prior.images[:1] if self.examples is None else self.examples.images[like]
        evaluations, done = 0, None
        for stage in self.ladder:
            if 0 < stage.widening < observation.relative_noise:
                continue
            rank = min(stage.rank, prior.rank)
            points = widen(points[: stage.starts].flatten(0, 1), rank).view(-1, observation.batch, rank)
            if done is None or (stage.rank, stage.widening) != (done.rank, done.widening):
                error = self.error(stage, rank, like)
                curvature = self.curvature(images, error, rank, clock)
            done = stage
            points, values, spent = self.descend(points, error, curvature, stage.evaluations, clock)
            points, evaluations = points[values.argsort()], evaluations + spent
            images = prior.synthesise(points[0])
            if clock.left <= 0:
                break
        return points[0], evaluations

    def starts(self, stage: _Stage) -> tuple[Tensor, Tensor]:
        """Coordinates (R, B, K), and the rows of the examples behind the first of them."""
        observation, prior = self.observation, self.observation.prior
        rank, batch = min(stage.rank, prior.rank), observation.batch
        if self.examples is None:
            draw = torch.randn(stage.starts, batch, rank, generator=self.generator).to(prior.mean)
            return PRIOR_SPREAD * draw * prior.variance[:rank].sqrt(), torch.arange(batch)
        target = observation.gradient * observation.weights
        mixtures = public_mixtures(self.examples.shares, target, batch, self.generator, TRIES)[: stage.starts]
        points = [SHRINK * prior.coordinates(self.examples.images[rows], rank) for rows in mixtures]
        return torch.stack(points), mixtures[0]

    def error(self, stage: _Stage, rank: int, like: Tensor) -> ErrorModel:
        """What the simulation misses with so many components, and the noise."""
        observation, prior = self.observation, self.observation.prior
        unit = observation.norm**2 / float(observation.weights.sum())
        complete = rank == prior.mean.numel()
        known = observation.noise_std**2 + float((observation.floor * observation.weights).pow(2).sum()) / len(
            observation.floor
        )
        if self.examples is None or complete:
            return white_error(known + max(stage.blind, stage.widening) ** 2 * unit, observation.gradient)
        return self.examples.error(prior, rank, like, known + stage.widening**2 * unit)

    def curvature(self, images: Tensor, error: ErrorModel, rank: int, clock: Clock) -> Curvature:
        """Coordinates that make the problem round near these images (B, C, H, W)."""
        observation, prior, examples = self.observation, self.observation.prior, self.examples
        variance, batch = prior.variance[:rank], observation.batch
        if examples is None:
            return prior_curvature(variance, batch)
        affordable = min(
            AT_ONCE // (rank * observation.simulation.size),
            int(ROUND * clock.left / (COLUMN * rank * examples.seconds)),
        )
        full = examples.uneven and batch * rank <= MAX_FULL and affordable >= batch and rank > LADDER[0].rank
        count = batch if full else min(batch, 4 if rank <= LADDER[0].rank else 2, affordable)
        if count < min(2, batch):
            return prior_curvature(variance, batch)
        directions = prior.basis[:, :rank].T.reshape(rank, *prior.mean.shape)
        which = torch.zeros(rank, dtype=torch.long, device=images.device)
        slopes = []
        for i in range(count):
            label = self.labels[i : i + 1]

            def share(x: Tensor, label: Tensor = label) -> Tensor:
                return examples.share(x, label)

            rows = derivatives(share, images[i : i + 1], which, directions)
            slopes.append(error.whiten(rows))
        stacked = torch.stack(slopes)
        return full_curvature(stacked, variance) if full else shared_curvature(stacked, variance, batch)

    def descend(
        self, points: Tensor, error: ErrorModel, curvature: Curvature, evaluations: int, clock: Clock
    ) -> tuple[Tensor, Tensor, int]:
        """From coordinates (R, B, K): better ones, F (R,), evaluations."""
        observation, prior = self.observation, self.observation.prior
        precision, shape = 1 / prior.variance[: points.shape[2]], points.shape
        g, weights = observation.gradient, observation.weights

        def evaluate(point: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                z = curvature.place(point.view(shape))
            z.requires_grad_(True)
            images = prior.synthesise(z.flatten(0, 1)).view(*shape[:2], *prior.mean.shape)
            simulated = self.simulate(images)
            residual = (simulated.detach() - g) * weights
            (slope,) = torch.autograd.grad(simulated, z, 2 * error.precision(residual) * weights)
            z = z.detach()
            value = error.square(residual) + (z**2 * precision).sum((1, 2))
            return value, curvature.pull(slope + 2 * z * precision).flatten(1)

        start = curvature.locate(points).flatten(1)
        ended = minimise_all(evaluate, start, clock, evaluations=evaluations, limit=FURTHEST, change=FLAT)
        return curvature.place(ended.points.view(shape)), ended.values, ended.evaluations

    def simulate(self, images: Tensor) -> Tensor:
        """φ of R batches (R, B, C, H, W): (R, P)."""
        if len(images) == 1:  # plain autograd takes half the time of the functional transforms
            return self.observation.eager.simulation.flat(images[0], self.labels)[None]
        return vmap(lambda x: self.observation.simulation.flat(x, self.labels))(images)


def stage(run: Attempt) -> None:
    """Batches, and models too large for an explicit Jacobian; without noise and at kinks, outlines of batches."""
    observation = run.observation
    coarse = run.auto and run.kinked is not None and not run.noisy
    if observation.batch > 1 or ("map_gauss_newton" in run.skipped and not coarse):
        share = (0.6 if coarse else 0.9) if run.auto else 1.0
        run.attempt(
            "map_descent",
            lambda y, c: map_descent(observation, y, c, run.generator, rounds=1 if coarse else 2, coarse=coarse),
            share,
        )
