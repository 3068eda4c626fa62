"""L-BFGS for several starts at once: one evaluation serves them all, and each keeps its own step and history.

Side by side a gradient costs half of what it costs alone. Every accepted step lowers the value (Armijo 1966), so that
no run can run away: points that are not finite or too far out are never accepted, and the last point is the best.
Limited memory: Nocedal 1980, with the scaling of Liu and Nocedal 1989.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .clock import Clock

DECREASE = 1e-4
"""Share of the predicted fall that a step must bring."""
SHRINK = (0.1, 0.5)
"""Bounds on the factor by which a refused step is cut."""
SMALLEST = 1e-8
"""A run whose step has been cut to this has ended."""
PATIENCE = 10
"""Evaluations over which the fall is judged."""


@dataclass(frozen=True)
class Descents:
    """Where R runs ended."""

    points: Tensor
    """(R, n), for each run the best point that was evaluated."""
    values: Tensor
    """(R,) the objective there."""
    evaluations: int
    """Of all runs together, counted once."""


class _Memory:
    """Pairs of steps and changes of the gradient, for R runs."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, step: Tensor, change: Tensor, accepted: Tensor) -> None:
        """Keep a pair; runs that did not move, or in which curvature is not positive, get one without effect."""
        product = (step * change).sum(1)
        useful = accepted & (product > 1e-10 * (change * change).sum(1))
        inverse = torch.where(useful, 1 / product.where(useful, torch.ones_like(product)), 0.0)
        self.pairs = [*self.pairs, (step, change, inverse)][-self.size :]

    def direction(self, gradient: Tensor) -> Tensor:
        """−H·g by the two-loop recursion."""
        vector, factors = gradient.clone(), []
        scale, scaled = torch.ones(len(vector), device=vector.device), torch.zeros_like(vector[:, 0], dtype=torch.bool)
        for step, change, inverse in reversed(self.pairs):
            factor = inverse * (step * vector).sum(1)
            vector = vector - factor[:, None] * change
            factors.append(factor)
            newest = (inverse > 0) & ~scaled
            scale = torch.where(newest, 1 / (inverse * (change * change).sum(1)).clamp(min=1e-30), scale)
            scaled = scaled | newest
        vector = scale[:, None] * vector
        for (step, change, inverse), factor in zip(self.pairs, reversed(factors), strict=True):
            vector = vector + step * (factor - inverse * (change * vector).sum(1))[:, None]
        return -vector


def minimise_all(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    clock: Clock,
    *,
    evaluations: int,
    history: int = 20,
    limit: float = float("inf"),
    change: float = 0.0,
) -> Descents:
    """Minimise from R starts (R, n).

    Args:
        evaluate: points (R, n) -> values (R,), gradients (R, n).
        start: where the first step of length one should make sense, as in coordinates that make the problem round.
        clock: checked before every evaluation but the first.
        evaluations: at most so many.
        history: pairs that approximate the curvature.
        limit: points with a larger absolute entry are refused.
        change: a run ends when it falls by less than this share in 10 evaluations; all must have ended.
    """
    points = start.clone()
    values, gradients = evaluate(points)
    direction, memory = -gradients, _Memory(history)
    length = torch.ones_like(values)
    before, done = values.clone(), 1
    while done < evaluations and clock.left > 0:
        slope = (gradients * direction).sum(1)
        trial = points + length[:, None] * direction
        found, slopes = evaluate(trial)
        done += 1
        inside = torch.isfinite(found) & (trial.abs().amax(1) <= limit) & torch.isfinite(slopes).all(1)
        accepted = inside & (found <= values + DECREASE * length * slope)
        # Where the step is refused: the minimum of the parabola through both values and the slope.
        parabola = (-0.5 * slope * length / (found - values - slope * length) * length).nan_to_num(0.0)
        shorter = parabola.maximum(SHRINK[0] * length).minimum(SHRINK[1] * length)
        moved, turned = trial - points, slopes - gradients
        keep = accepted[:, None]
        memory.add(moved.where(keep, 0.0), turned.where(keep, 0.0), accepted)
        points, values = trial.where(keep, points), found.where(accepted, values)
        gradients = slopes.where(keep, gradients)
        newest = memory.direction(gradients)
        downhill = (newest * gradients).sum(1, keepdim=True) < 0
        direction = torch.where(keep, newest.where(downhill, -gradients), direction)
        length = torch.where(accepted, torch.ones_like(length), shorter)
        stuck = length < SMALLEST
        if done % PATIENCE == 0:  # while a step is being cut, the fall says nothing
            flat = accepted & (before - values <= change * values.abs())
            stuck, before = stuck | flat, values.clone()
        if bool(stuck.all()):
            break
    return Descents(points, values, done)
