"""Cosine matching with total variation and signed Adam (Geiping et al. 2020, 2003.14053): works on every model.

Two additions, off in the published form: the Gaussian prior of public images, and the features in front of the fully
connected layer where they are known. Restarts run side by side through `torch.func.vmap`. Never certified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from .candidate import Candidate
from .clock import Clock
from .features import Features, feature_distance
from .objectives import cosine_distance, total_variation
from .observation import Observation
from .starts import check_distinct, equal_pair, noise_start, prior_start

if TYPE_CHECKING:
    from .attempt import Attempt

STEP = 0.1
"""Adam's rate in units of the public pixel spread."""
DECAYS = (3 / 8, 5 / 8, 7 / 8)
"""Shares of the run after which the rate falls to a tenth."""
PLATEAU, PATIENCE = 1e-4, 200
"""Relative improvement over so many steps that counts as none."""
ANNEAL = 0.3
"""Factor on the prior at each decay: a strong prior finds the region, a weak one leaves room for detail."""
LEAST_STEPS = 600
"""Steps that every restart should be able to take; restarts beyond what the budget then allows are dropped."""
NOISY = 0.3
"""Relative noise above which cosine matching adds nothing to the maximum a posteriori estimate."""
IMPROVING_STEPS = 500
"""Steps from a good start."""
PRIOR_WEIGHT = 1e-2
"""Weight of the public prior at the start, in auto."""
AT_ONCE = 20_000_000
"""Gradient entries of all restarts together that are held at once."""


Evaluator = Callable[[Tensor, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Terms:
    """Weights of the objective 1 − cos(φ, g) + tv·TV + prior·energy/d + features·‖h(x) − ĥ‖²/‖ĥ‖²."""

    tv: float = 1e-3
    """In units of the public pixel spread. The value of CIFAR-10 papers, 0.2, leaves X-rays at their mean."""
    prior: float = 0.0
    features: Features | None = None
    feature_weight: float = 1.0


def objective(observation: Observation, labels: Tensor, terms: Terms, images: Tensor, damping: float = 1.0) -> Tensor:
    """The value at one batch of images (B, C, H, W); `damping` scales the prior."""
    simulated = observation.simulation.parts(images, labels)
    value = cosine_distance(simulated, observation.gradient_parts, observation.weight_parts)
    if terms.features is not None:
        value = value + terms.feature_weight * feature_distance(terms.features, images)
    if terms.prior:
        energy = observation.prior.energy(images).mean() / observation.prior.mean.numel()
        value = value + damping * terms.prior * energy
    return value + terms.tv * total_variation(images) / observation.prior.spread


def inverting_gradients(
    observation: Observation,
    labels: Tensor,
    clock: Clock,
    generator: torch.Generator,
    *,
    restarts: int = 8,
    iterations: int = 2400,
    terms: Terms = Terms(),
    start: Tensor | None = None,
) -> list[Candidate]:
    """Reconstruct by cosine matching; one candidate a restart, the lowest objective first.

    Args:
        observation: g and φ.
        labels: (B,) or (B, L).
        clock: CPU budget; the rate decays with whichever of steps and budget is used up faster.
        generator: draws the starts.
        restarts: R, fewer where the budget would leave each of them less than `LEAST_STEPS` steps.
        iterations: steps at most.
        terms: the objective.
        start: (B, C, H, W), used for the first restart instead of noise.
    """
    prior = observation.prior
    restarts = affordable(observation, labels, terms, clock, min(iterations, LEAST_STEPS), restarts)
    images = noise_start(observation, generator, restarts)
    if start is not None:
        images[0] = start
    for restart in images:
        check_distinct(restart, prior.spread)
    images = images.clamp(0, 1)
    evaluate = _evaluator(observation, labels, terms, restarts)
    best, lowest = images.clone(), torch.full((restarts,), torch.inf, device=images.device)
    momentum, square = torch.zeros_like(images), torch.zeros_like(images)
    stage, since, reference, done = 0, 0, float("inf"), 0
    while done < iterations and stage <= len(DECAYS) and clock.left > 0:
        gradient, value = evaluate(images, ANNEAL**stage)
        done += 1
        # The iterate that was evaluated is kept, not the one that the next step makes of it.
        better = value < lowest
        lowest = torch.where(better, value, lowest)
        best = torch.where(better.view(-1, 1, 1, 1, 1), images, best)
        sign = gradient.nan_to_num().sign()
        momentum = 0.9 * momentum + 0.1 * sign
        square = 0.999 * square + 0.001 * sign**2
        direction = (momentum / (1 - 0.9**done)) / ((square / (1 - 0.999**done)).sqrt() + 1e-8)
        images = (images - STEP * 0.1**stage * prior.spread * direction).clamp(0, 1)

        fraction = max(done / iterations, clock.fraction)
        due = sum(fraction >= share for share in DECAYS)
        if (done - since) % PATIENCE == 0:
            current = float(lowest.min())
            due = max(due, stage + (reference - current < PLATEAU * abs(reference)))
            reference = current
        if due > stage:
            stage, since, reference = due, done, float("inf")
            images = best.clone()
            if terms.prior:  # the objective has changed: its old values mean nothing
                lowest.fill_(torch.inf)
    return [Candidate(x, labels, "inverting_gradients", iterations=done) for x in best[lowest.argsort()]]


def affordable(observation: Observation, labels: Tensor, terms: Terms, clock: Clock, steps: int, restarts: int) -> int:
    """How many restarts can take so many steps each within the budget, by timing one step; at least 1."""
    images = noise_start(observation, torch.Generator().manual_seed(0), 1)
    evaluate = _evaluator(observation, labels, terms, 1)
    evaluate(images, 1.0)
    timed = Clock(clock.left)
    evaluate(images, 1.0)
    return max(1, min(restarts, int(clock.left / (max(timed.used, 1e-6) * steps))))


def _evaluator(observation: Observation, labels: Tensor, terms: Terms, restarts: int) -> Evaluator:
    """Gradients and values of all restarts at once."""
    if restarts == 1:  # plain autograd takes half the time of the functional transforms

        def single(images: Tensor, damping: float) -> tuple[Tensor, Tensor]:
            x = images[0].detach().requires_grad_(True)
            value = objective(observation.eager, labels, terms, x, damping)
            return torch.autograd.grad(value, x)[0][None], value.detach()[None]

        return single
    step = grad_and_value(lambda x, damping: objective(observation, labels, terms, x, damping))
    chunk = max(1, AT_ONCE // (observation.simulation.size * observation.batch))
    return lambda images, k: vmap(lambda x: step(x, k), chunk_size=chunk)(images)


def stage(run: Attempt) -> None:
    """Every model; in auto with the public prior, known features, and the best candidate so far as the start."""
    observation, settings = run.observation, run.settings
    posterior = run.noisy and (observation.relative_noise > NOISY or not run.kinked)
    if run.auto and (run.solved or posterior):
        return
    terms = Terms(tv=settings.tv)
    start, restarts, iterations = None, settings.restarts, settings.iterations
    if run.auto:
        terms = replace(terms, prior=PRIOR_WEIGHT, features=run.features)
        start = run.best_start()
        if start is None or equal_pair(start, observation.prior.spread):
            start = prior_start(observation, run.generator)
        else:  # a good start: more of the same adds little
            restarts, iterations = 1, min(iterations, IMPROVING_STEPS)
    run.attempt(
        "inverting_gradients",
        lambda y, c: inverting_gradients(
            observation, y, c, run.generator, restarts=restarts, iterations=iterations, terms=terms, start=start
        ),
    )
