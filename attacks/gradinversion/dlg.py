"""Deep leakage from gradients: match the gradient in L2 with L-BFGS (Zhu, Liu and Han 2019, 1906.08935).

Works on smooth activations; second derivatives of piecewise-linear nets with BatchNorm vanish almost everywhere.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import lbfgs
from .candidate import Candidate, NotApplicable
from .clock import Clock
from .objectives import best_scale, squared_error
from .observation import Observation
from .starts import noise_start

if TYPE_CHECKING:
    from .attempt import Attempt

MAX_UNKNOWNS = 20_000
SOLVED = 1e-6
"""Share of ‖g‖² below which no further seed is tried."""
FURTHEST = 3.0
"""Pixels farther than this many box widths outside the box count as divergence."""


def dlg(
    observation: Observation,
    labels: Tensor | None,
    clock: Clock,
    generator: torch.Generator,
    *,
    start: Tensor | None = None,
    seeds: int = 2,
) -> list[Candidate]:
    """Reconstruct by L2 matching.

    Args:
        observation: g and φ.
        labels: (B,) or (B, L); None: label logits are optimised along with the images, and the labels reported are
            the arg max of the *final* logits.
        clock: CPU budget, divided among the seeds that are needed.
        generator: draws the starts.
        start: (B, C, H, W) for the first seed instead of noise.
        seeds: starts to try at most. The next one is used only where the one before did not reach the target, and
            leaves the scale κ of the gradient free.
    """
    observation = observation.eager
    simulation, prior = observation.simulation, observation.prior
    batch, shape = observation.batch, observation.image_shape
    if batch * prior.mean.numel() > MAX_UNKNOWNS:
        raise NotApplicable(f"{batch} images of {prior.mean.numel()} pixels are above {MAX_UNKNOWNS:,} unknowns")
    if labels is None and simulation.task == "multilabel":
        raise NotApplicable("joint label optimisation is for one class an image")
    pixels, classes = prior.mean.numel(), simulation.logits(prior.mean[None]).shape[1]
    energy = observation.norm**2

    def unpack(point: Tensor) -> tuple[Tensor, Tensor]:
        images = prior.level + prior.spread * point[:, :pixels].view(batch, *shape)
        return images, point[:, pixels:].softmax(1) if labels is None else labels

    def objective(point: Tensor, free_scale: bool) -> Tensor:
        simulated = simulation.parts(*unpack(point))
        if free_scale:  # at the best κ, F does not change with κ: its derivative may be left out
            kappa = best_scale(torch.cat([part.detach().reshape(-1) for part in simulated]) * sent, observed)
            simulated = tuple(kappa * part for part in simulated)
        return squared_error(simulated, observation.gradient_parts, observation.weight_parts)

    sent, observed = observation.weights, observation.gradient * observation.weights
    found: list[Candidate] = []
    for seed in range(seeds):
        images = start if start is not None and seed == 0 else noise_start(observation, generator, 1)[0]
        point = ((images - prior.level) / prior.spread).flatten(1)
        if labels is None:
            point = torch.cat([point, torch.randn(batch, classes, generator=generator).to(point)], 1)
        # A wrong constant factor in front of the loss keeps L2 matching from reaching zero: then κ is left free.
        ended = lbfgs.minimise(
            partial(objective, free_scale=seed > 0),
            point,
            clock.share(1 / (seeds - seed)),
            outer=60 if batch == 1 else 150,
            target=1e-14 * energy,
            limit=(FURTHEST + 1) / prior.spread,
        )
        images, targets = unpack(ended.point)
        chosen = targets.argmax(1) if labels is None else labels
        notes = (f"divergence guard acted {ended.restored} times",) if ended.restored else ()
        found.append(Candidate(images.detach().clamp(0, 1), chosen, "dlg", iterations=ended.evaluations, notes=notes))
        if ended.value <= SOLVED * energy or clock.left <= 0:
            break
    return found


def stage(run: Attempt) -> None:
    """Smooth activations without known noise; in auto from the best candidate so far."""
    observation = run.observation
    if run.auto and run.kinked:
        run.skipped["dlg"] = f"second derivatives vanish at {run.kinked}"
        return
    if run.auto and run.noisy:
        run.skipped["dlg"] = "the noise is known: the maximum a posteriori estimate replaces it"
        return
    if run.auto and run.solved:
        return
    joint = run.labels.source in ("guessed", "joint") and observation.simulation.task != "multilabel"
    start = run.best_start() if run.auto and observation.batch > 1 else None
    seeds = 1 if start is not None else 2

    def method(labels: Tensor, clock: Clock) -> list[Candidate]:
        known = None if joint else labels
        return dlg(observation, known, clock, run.generator, start=start, seeds=seeds)

    run.attempt("dlg", method, 0.6 if run.auto else 1.0)
