"""Images behind several local steps: match the whole local training, not one gradient of it.

φ trainings through the client's steps, mini-batches, momentum and weight decay, so that at the right images and in the
right order it equals the update to rounding. One step at rate η·T over all images is the cheap first guess
(Dimitrov et al. 2022, 2206.12395). There the epochs get images of their own, tied together by a prior that does not
depend on their order; here that is the fallback: few images leave few orders, which can all be tried, and copies that
have been matched tell the order.

The objective is the squared error as a share of ‖g‖², first widened, plus the Gaussian prior of public images, in
coordinates that make it round (`whitened`); for a few small images then Gauss–Newton to the last digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import gauss_newton
from .candidate import Candidate, NotApplicable
from .cascade import cascade
from .clock import Clock
from .defect import corrected
from .gauss_newton import jacobian
from .local_training import copies, epochs, matched_order
from .map_descent import map_descent
from .map_gauss_newton import EXPLAINED, MAX_JACOBIAN
from .observation import Observation
from .prior import widen
from .selection import select
from .starts import PRIOR_SPREAD
from .unrolled import Unrolled, batch_size, best_order_for, one_step, possible_orders, unrolled_along
from .whitened import Measured, descend

if TYPE_CHECKING:
    from .attempt import Attempt

MAX_SIMULATED = 256
"""Image gradients in one simulation (steps times images a step) that a CPU's budget allows."""
MAX_ORDERS = 12
"""Orders that are each tried; where there are more, every epoch gets images of its own."""
TRIED_IN_PLACE = 64
"""Orders of images that are already roughly known: one forward simulation each."""
FIRST = (64, 0.3)
"""(components, widening as a share of ‖g‖) of the first pass and of the trial of each order."""
LADDER = ((64, 0.1), (160, 0.03), (520, 1e-2), (1024, 3e-3), (1024, 1e-3))
"""(components, widening) of the stages that follow."""
ANNEALING = (0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4)
"""Widenings of Gauss–Newton at full rank; those above the residual of the start are left out."""
NEAR = 0.3
"""Relative residual below which given images are worth starting from."""
POLISHED = 0.03
"""Relative residual from which Gauss–Newton is worth its time."""
SOLVED = 1e-2
"""Relative residual below which no other order is worked out."""
FLOPS = 1e10
"""Multiplications a second that are expected of a matrix product."""
COARSER = 3.0
"""A stage whose widening is more than so many times the residual would be a step back."""
ROUNDING = 3.0
"""A residual of so many times the rounding is explained by it."""

Found = tuple[Candidate, Observation]
"""A candidate, and the observation in whose order of local steps its images stand."""


def fedavg(
    observation: Observation, labels: Tensor, clock: Clock, generator: torch.Generator, *, start: Tensor | None = None
) -> Found:
    """Reconstruct the N images of a client that trained for several steps.

    Args:
        observation: g and φ; its `order` is not used.
        labels: (N,) or (N, L), in any order.
        clock: CPU budget.
        generator: draws the starts.
        start: (1, C, H, W), for one image: what to improve on.
    """
    check_applicable(observation)
    if observation.batch == 1:
        return _one_image(Unrolled(observation, labels, (0,)), clock, start)
    trainings = possible_orders(observation, labels, MAX_ORDERS)
    if trainings is None:
        return _through_copies(observation, labels, clock, generator)
    return _race(observation, labels, trainings, clock, generator)


def check_applicable(observation: Observation) -> None:
    """Can one client's training be simulated within the budget?

    Raises:
        NotApplicable: with the numbers.
    """
    simulation, size = observation.simulation, batch_size(observation)
    if simulation.steps * size > MAX_SIMULATED:
        raise NotApplicable(
            f"{simulation.steps} steps of {size} images are {simulation.steps * size} image gradients in each "
            f"simulation; {MAX_SIMULATED} are affordable"
        )
    if simulation.clients > 1:
        raise NotApplicable(f"{simulation.clients} clients in the sum trained on their own; one training is simulated")
    if observation.prior.rank < 1:
        raise NotApplicable("no public images to take principal components from")


def _race(
    observation: Observation, labels: Tensor, trainings: list[Unrolled], clock: Clock, generator: torch.Generator
) -> Found:
    """A short trial of every order, beside the first pass; the best is then worked out, and the second if needed."""
    prior, start, trials = observation.prior, _draw(observation, generator), clock.share(0.4)
    runners = [(training, start) for training in trainings]
    ahead = _first_pass(observation, labels, trials.share(0.4), generator)
    runners = runners if ahead is None else [ahead, *runners]
    ran: list[tuple[float, Unrolled, Tensor]] = []
    for i, (training, z) in enumerate(runners):
        if ran and trials.left <= 0:
            break
        if training is not (ahead and ahead[0]):
            z = stage_of(training, z, *FIRST, trials.share(1 / (len(runners) - i)))
        ran.append((training.residual(prior.synthesise(z)), training, z))
    ran.sort(key=lambda entry: entry[0])
    found: list[tuple[float, Found]] = []
    for i, (_, training, z) in enumerate(ran[:2]):
        ended = _work_out(training, z, clock.share(0.8 if i == 0 and len(ran) > 1 else 1.0))
        found.append((training.residual(ended[0].images), ended))
        if clock.left <= 0 or found[-1][0] < SOLVED:
            break
    return min(found, key=lambda entry: entry[0])[1]


def _draw(observation: Observation, generator: torch.Generator) -> Tensor:
    """Coordinates (N, K) to start from: images must not start equal, or they never separate."""
    prior, rank = observation.prior, min(FIRST[0], observation.prior.rank)
    draw = torch.randn(observation.batch, rank, generator=generator).to(prior.mean)
    return PRIOR_SPREAD * draw * prior.variance[:rank].sqrt()


def _first_pass(
    observation: Observation, labels: Tensor, clock: Clock, generator: torch.Generator
) -> tuple[Unrolled, Tensor] | None:
    """Images from one step at rate η·T, and the order that suits them; None where that step is a bad likeness."""
    images = map_descent(one_step(observation), labels, clock, generator, rounds=1)[0].images
    training = best_order_for(observation, labels, images, TRIED_IN_PLACE)
    if training is None or training.residual(images[list(training.source)]) > NEAR:
        return None
    return training, observation.prior.coordinates(images[list(training.source)], LADDER[1][0])


def _through_copies(observation: Observation, labels: Tensor, clock: Clock, generator: torch.Generator) -> Found:
    """Images of their own for each epoch; matched, they tell the order, in which their means are then worked out."""
    prior, count, steps = observation.prior, observation.batch, observation.simulation.steps
    size = batch_size(observation)
    rounds = epochs(count, size, steps)
    simulation = replace(observation.simulation, order=copies(count, size, steps))
    numbers = tuple(range(count * rounds))
    apart = Unrolled(replace(observation, simulation=simulation), torch.cat([labels] * rounds), numbers)
    z = _draw(observation, generator).repeat(rounds, 1)
    scale = prior.variance.sqrt()
    for rank, widening, share in ((*FIRST, 0.2), (*LADDER[0], 0.3)):
        z = stage_of(apart, z, rank, widening, clock.share(share), lambda at: alike(at / scale[: at.shape[1]], count))
    images, order = matched_order(prior.synthesise(z), count, size, steps)
    training = unrolled_along(observation, labels, order)
    return _work_out(training, prior.coordinates(images[list(training.source)], LADDER[0][0]), clock)


def alike(coordinates: Tensor, count: int) -> Tensor:
    """How far are the epochs' sets of `count` images apart, whatever their order? Coordinates (E·N, K) in prior units.

    Σ over the epochs of the squared distance to the first one in Σ_i z_i/√N and Σ_i z_i²/√N: 0 for the same images in
    any order.
    """
    stacks = coordinates.view(-1, count, coordinates.shape[1])
    moments = torch.cat([stacks.sum(1), (stacks**2).sum(1)], 1) / count**0.5
    apart: Tensor = moments[1:] - moments[:1]
    return (apart**2).sum()


def _work_out(training: Unrolled, z: Tensor, clock: Clock) -> Found:
    """The rest of the ladder, then Gauss–Newton where it is affordable and near enough."""
    seen, prior = training.observation, training.observation.prior
    stages = [(rank, widening) for rank, widening in LADDER if widening > seen.relative_noise]
    stages += [(LADDER[-1][0], 0.0)] if seen.noise_std > 0 else []
    for rank, widening in stages:
        if widening <= COARSER * training.residual(prior.synthesise(z)) or rank == LADDER[-1][0]:
            z = stage_of(training, z, rank, widening, clock)
    near = seen.noise_std == 0 and training.residual(prior.synthesise(z)) < POLISHED
    if near and _affordable(training, prior.rank, clock):
        return _to_the_last_digit(training, z, clock)
    return _candidate(training, z), seen


def _one_image(training: Unrolled, clock: Clock, start: Tensor | None) -> Found:
    """No order to find: Gauss–Newton on the training, from the first pass or a better start."""
    prior = training.observation.prior
    if start is not None and training.residual(start) < NEAR:
        z = prior.coordinates(start, prior.rank)
    else:
        single = replace(training, observation=one_step(training.observation))
        z = torch.zeros(1, 0, device=prior.mean.device)
        for rank, widening in (FIRST, LADDER[0]):
            z = _gauss_newton(single, z, rank, widening, 4, clock)
        z = _gauss_newton(training, z, 160, 0.1, 4, clock)
    if not _affordable(training, prior.rank, clock):
        return _work_out(training, z[:, : LADDER[0][0]], clock)
    return _to_the_last_digit(training, z, clock)


def _to_the_last_digit(training: Unrolled, z: Tensor, clock: Clock) -> Found:
    """Annealed Gauss–Newton on all images together at full rank, and the proof of where it ended."""
    seen, prior = training.observation, training.observation.prior
    for widening in (*ANNEALING, 0.0):
        if widening == 0 or seen.relative_noise < widening < training.residual(prior.synthesise(z)):
            z = _gauss_newton(training, z, prior.rank, widening, 3 if widening else 15, clock)
    ended = _candidate(training, z)
    if z.shape[1] < prior.mean.numel() or clock.left <= 0:
        return ended, seen
    variance, explained = posterior(training, z)
    return replace(ended, est_psnr=-10 * math.log10(max(variance, 1e-14)), layers_ok=explained), seen


def posterior(training: Unrolled, z: Tensor) -> tuple[float, bool]:
    """Mean variance of a pixel from (JᵀWJ + Λ⁻¹)⁻¹, widened by the misfit; do noise or rounding explain that misfit?"""
    seen, prior, problem = training.observation, training.observation.prior, training.problem
    slopes = jacobian(problem, prior, z)
    precision = (1 / prior.variance[: z.shape[1]].double()).repeat(len(z))
    factor = torch.linalg.cholesky((slopes.T / problem.variance.double()) @ slopes + precision.diag())
    left = float(torch.cholesky_inverse(factor).diagonal().mean())
    residual = problem.residual(prior.synthesise(z))
    reduced = float((residual**2 / problem.variance.double()).sum()) / max(1.0, float(seen.weights.sum()))
    relative = float(residual.norm()) / max(seen.norm, 1e-300)
    return left * max(1.0, reduced), reduced <= EXPLAINED or relative <= ROUNDING * seen.relative_floor


def _extra(observation: Observation, widening: float) -> float:
    """The variance that a widening adds to every entry."""
    return (widening * observation.norm) ** 2 / max(1.0, float(observation.weights.sum()))


def _gauss_newton(training: Unrolled, z: Tensor, rank: int, widening: float, steps: int, clock: Clock) -> Tensor:
    prior, extra = training.observation.prior, _extra(training.observation, widening)
    z, end = widen(z, min(rank, prior.rank)), 0.03 if widening else 1e-4
    if clock.left <= 0:
        return z
    return gauss_newton.minimise(
        training.problem, prior, z, clock, extra=extra, max_iter=steps, tolerance=end
    ).coordinates


def stage_of(
    training: Unrolled,
    z: Tensor,
    rank: int,
    widening: float,
    clock: Clock,
    penalty: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """One stage of whitened descent from coordinates z (N, k): (N, min(rank, K))."""
    seen, prior = training.observation, training.observation.prior
    z = widen(z, min(rank, prior.rank))
    if clock.left <= 0:
        return z
    simulation, spread = seen.eager.simulation, seen.std**2 + _extra(seen, widening)
    measured = Measured(lambda x: simulation.flat(x, training.labels), seen.gradient, spread, penalty)
    slopes = jacobian(training.problem, prior, z) if _affordable(training, z.shape[1], clock) else None
    return descend(measured, prior, z, slopes, clock)


def _affordable(training: Unrolled, rank: int, clock: Clock) -> bool:
    """Is a Jacobian of this rank small enough, and does it leave some of the time? By timing one simulation."""
    seen = training.observation
    rows, columns = seen.simulation.size, rank * len(training.labels)
    if rows * columns > MAX_JACOBIAN:
        return False
    timed = Clock(clock.left)
    seen.simulation.flat(seen.prior.mean.expand(len(training.labels), *seen.image_shape), training.labels)
    return 0.5 * columns * timed.used + rows * columns**2 / FLOPS < 0.6 * clock.left


def _candidate(training: Unrolled, z: Tensor) -> Candidate:
    return Candidate(training.observation.prior.synthesise(z).clamp(0, 1), training.labels, "fedavg")


def stage(run: Attempt) -> None:
    """Several local steps; in auto not where second derivatives vanish, or for one image with known noise."""
    seen = run.observation
    if seen.simulation.steps == 1:
        if not run.auto:
            run.skipped["fedavg"] = "a single local step is behind the update: every method simulates it"
        return
    if run.auto and run.kinked and not run.noisy:
        run.skipped["fedavg"] = f"second derivatives vanish at {run.kinked}: cosine matching walks through the steps"
        return
    if run.auto and run.noisy and seen.batch == 1:
        return  # one image has no order, and explicit Gauss-Newton knows how to weigh the noise
    found: list[Found] = []

    def method(labels: Tensor, clock: Clock) -> list[Candidate]:
        closed = _closed_form(run, seen, labels, clock.share(0.6))
        start = run.best_start() if closed is None else closed[0].images
        near = closed is not None and Unrolled(seen, labels, (0,)).residual(closed[0].images) < SOLVED / 10
        found.append(closed if closed and near else fedavg(seen, labels, clock, run.generator, start=start))
        run.observation = found[-1][1]  # what is found stands in the order of its own training
        return [found[-1][0]]

    run.attempt("fedavg", method)
    own = [c for c in run.candidates if any(c.images is f.images for f, _ in found)]
    if own:
        best = select(own, seen)
        run.observation = next(o for c, o in found if c.images is best.images)


def _closed_form(run: Attempt, seen: Observation, labels: Tensor, clock: Clock) -> Found | None:
    """One image behind a chain that `cascade` undoes for one step, corrected for several."""
    if seen.batch > 1 or run.noisy:
        return None
    try:
        chain = run.chain()
        candidate = corrected(Unrolled(seen, labels, (0,)), lambda one: cascade(one, chain, labels)[0], clock)
    except NotApplicable:
        return None
    return None if candidate is None else (candidate, seen)
