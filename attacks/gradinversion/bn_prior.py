"""Gradient matching with a prior on BatchNorm's moments: the candidate's must equal those the victim's batch caused.

    L = match(φ, g) + α_tv·TV + α₂·‖ξ‖²/d + α_bn·Σ_l(‖μ_l(x) − μ̂_l‖ + ‖σ²_l(x) − σ̂²_l‖) + α_grp·Σ_i‖x_i − x̄_i‖²

after GradInversion (Yin et al. 2021, 2104.07586) with the reference moments of Hatamizadeh et al. 2023 (2202.06924).
Where they may come from is decided by `batch_statistics`. The images are x = μ + C^½·ξ with the covariance of public
images, so that ‖ξ‖² is what the published ‖x‖² stands for, and Adam's rate is in prior standard deviations. x̄ is the
mean over the restarts, aligned by Hungarian matching. Weights: ours, the papers' were not verified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.func import grad_and_value, vmap

from .batch_statistics import Moments, Used, batch_norms, counts_of, distance, moments_of
from .candidate import Candidate, NotApplicable
from .clock import Clock
from .feature_inversion import Whitening
from .objectives import cosine_distance, squared_error, total_variation
from .observation import Observation
from .starts import check_distinct, prior_start

if TYPE_CHECKING:
    from .attempt import Attempt

STEP = 0.1
"""Adam's rate in prior standard deviations."""
WARM_UP = 50
"""Steps over which the rate rises from zero."""
LEAST_STEPS = 300
"""Steps that every restart should be able to take; restarts beyond what the budget then allows are dropped."""
REGROUP = 50
"""Steps between two alignments of the restarts."""
PUBLIC_BATCHES = 9
"""From which it is learned how far a batch's moments are from the running ones."""
AT_ONCE = 20_000_000
"""Gradient entries of all restarts together that are held at once."""


@dataclass(frozen=True)
class Terms:
    """The weights α, and the reference moments."""

    gradient: Literal["cosine", "l2"] = "cosine"
    """l2: ‖φ − g‖²/‖g‖²."""
    tv: float = 1e-3
    """In units of the public pixel spread."""
    energy: float = 3e-3
    bn: float = 0.1
    group: float = 0.01
    """In units of the squared public pixel spread."""
    reference: Mapping[str, Moments] = field(default_factory=dict)
    slack: float = 0.0
    """Distance of the moments that costs nothing."""


def reference_of(observation: Observation, used: Used) -> dict[str, Moments]:
    """The moments to match.

    Raises:
        NotApplicable: they cannot honestly be had; the message says why.
    """
    statistics = observation.statistics
    if used == "none" or statistics is None:
        return {}
    model, batch = observation.simulation.model, observation.batch
    return statistics.reference(used, counts_of(model, statistics.layers, observation.prior.mean, batch))


@torch.no_grad()
def slack_of(observation: Observation, reference: Mapping[str, Moments], used: Used) -> float:
    """How far the moments of public batches are from running ones: no batch has the moments of all images.

    Pulled closer than that, one image goes from 37 dB to 24. Inferred moments are exact: 0.
    """
    if used != "running":
        return 0.0
    model, images = observation.simulation.model, observation.prior.images
    batches = [b for b in images.split(observation.batch) if len(b) == observation.batch][:PUBLIC_BATCHES]
    found = [float(distance(moments_of(model, tuple(reference), batch), reference)) for batch in batches]
    return sorted(found)[len(found) // 2] if found else 0.0


def objective(
    observation: Observation, labels: Tensor, terms: Terms, point: Tensor, group: Tensor | None = None
) -> Tensor:
    """L at ξ (B, C, H, W); `group` is x̄ in this restart's order of images."""
    prior, simulation = observation.prior, observation.simulation
    images = Whitening(prior).images(point)
    parts = simulation.parts(images, labels)
    if terms.gradient == "cosine":
        value = cosine_distance(parts, observation.gradient_parts, observation.weight_parts)
    else:
        value = squared_error(parts, observation.gradient_parts, observation.weight_parts) / observation.norm**2
    value = value + terms.tv * total_variation(images) / prior.spread + terms.energy * (point * point).mean()
    if terms.reference:
        found = moments_of(simulation.model, tuple(terms.reference), images)
        value = value + terms.bn * (distance(found, terms.reference) - terms.slack).clamp(min=0)
    if group is not None:
        value = value + terms.group * (((images - group) / prior.spread) ** 2).mean()
    return value


def rate(done: int, iterations: int, fraction: float) -> float:
    """Warm-up, then a cosine from `STEP` to 0 over whichever of steps and budget is used up faster."""
    progress = max(done / iterations, fraction)
    return STEP * min(1.0, (done + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def align(images: Tensor) -> Tensor:
    """x̄ for every restart in its own order: (R, B, C, H, W) -> the same shape.

    Each restart's images are matched to those of the first by least total squared error (Kuhn 1955).
    """
    flat = images.flatten(2)
    orders = []
    for restart in flat:
        cost = torch.cdist(flat[0], restart) ** 2
        orders.append(torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=images.device))
    mean = torch.stack([image[order] for image, order in zip(images, orders, strict=True)]).mean(0)
    return torch.stack([mean[order.argsort()] for order in orders])


def bn_prior(
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
    """Reconstruct; one candidate a restart, the lowest objective first.

    Args:
        observation: g, φ and statistics.
        labels: (B,) or (B, L).
        clock: CPU budget.
        generator: draws the starts.
        restarts: R, fewer where the budget would leave each of them less than `LEAST_STEPS` steps.
        iterations: steps at most.
        terms: the objective.
        start: (B, C, H, W), used for the first restart.
    """
    whitening = Whitening(observation.prior)
    evaluate = _evaluator(observation, labels, terms)
    restarts = _affordable(evaluate, whitening.point(prior_start(observation, generator))[None], clock, restarts)
    starts = [prior_start(observation, generator) for _ in range(restarts)]
    if start is not None:
        starts[0] = start
    for images in starts:
        check_distinct(images, observation.prior.spread)
    point = torch.stack([whitening.point(images) for images in starts])
    if observation.batch == 1 and restarts > 1:  # all would start at the public mean
        noise = torch.randn(point.shape, generator=generator).to(point)
        point[1:] = point[1:] + 0.3 * noise[1:]
    best, lowest = point.clone(), torch.full((restarts,), torch.inf, device=point.device)
    momentum, square = torch.zeros_like(point), torch.zeros_like(point)
    group, done = None, 0
    while done < iterations and clock.left > 0:
        if restarts > 1 and terms.group and done % REGROUP == 0 and done > 0:
            group = align(torch.stack([whitening.images(p) for p in best]))
            lowest.fill_(torch.inf)  # the objective has changed: its old values mean nothing
        gradient, value = evaluate(point, group)
        done += 1
        better = value < lowest
        lowest = torch.where(better, value, lowest)
        best = torch.where(better.view(-1, 1, 1, 1, 1), point, best)
        gradient = gradient.nan_to_num()
        momentum = 0.9 * momentum + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        direction = (momentum / (1 - 0.9**done)) / ((square / (1 - 0.999**done)).sqrt() + 1e-12)
        point = point - rate(done, iterations, clock.fraction) * direction
    return [
        Candidate(whitening.images(best[i]).clamp(0, 1), labels, "bn_prior", iterations=done) for i in lowest.argsort()
    ]


Evaluator = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def _evaluator(observation: Observation, labels: Tensor, terms: Terms) -> Evaluator:
    """Gradients and values of restarts (R, B, C, H, W)."""
    size = observation.simulation.size * observation.batch
    together = grad_and_value(lambda p, group: objective(observation, labels, terms, p, group))
    chunk = max(1, AT_ONCE // size)

    def evaluate(point: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor]:
        if len(point) == 1:  # plain autograd takes half the time of the functional transforms
            p = point[0].detach().requires_grad_(True)
            value = objective(observation.eager, labels, terms, p, None if group is None else group[0])
            return torch.autograd.grad(value, p)[0][None], value.detach()[None]
        if group is None:
            return vmap(lambda p: together(p, None), chunk_size=chunk)(point)
        return vmap(together, chunk_size=chunk)(point, group)

    return evaluate


def _affordable(evaluate: Evaluator, point: Tensor, clock: Clock, restarts: int) -> int:
    """How many restarts can take `LEAST_STEPS` steps each within the budget, by timing one step; at least 1."""
    evaluate(point, None)
    timed = Clock(clock.left)
    evaluate(point, None)
    return max(1, min(restarts, int(clock.left / (max(timed.used, 1e-6) * LEAST_STEPS))))


def stage(run: Attempt) -> None:
    """Every model with BatchNorm; in auto from the best candidate so far. Without moments only the term is off."""
    observation, settings = run.observation, run.settings
    statistics = observation.statistics
    if run.auto and (run.solved or run.noisy):
        return
    if run.auto and not batch_norms(observation.simulation.model):
        return
    used = "none" if statistics is None else statistics.strongest(settings.bn)
    try:
        reference = reference_of(observation, used)
    except NotApplicable as reason:
        run.skipped["bn_prior"] = str(reason)
        return
    terms = Terms(tv=settings.tv, reference=reference, slack=slack_of(observation, reference, used))
    start = run.best_start() if run.auto else None
    run.attempt(
        "bn_prior",
        lambda y, c: bn_prior(
            observation,
            y,
            c,
            run.generator,
            restarts=settings.restarts,
            iterations=settings.iterations,
            terms=terms,
            start=start,
        ),
        0.6 if run.auto else 1.0,
    )
