"""L-BFGS that cannot run away: the best evaluated point is kept, and a diverging run is put back and slowed down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .clock import Clock

RUNAWAY = 10.0
"""A value this many times the best one counts as divergence."""


class _OutOfTimeError(Exception):
    """Leaves a line search in the middle; the best point has been kept."""


@dataclass(frozen=True)
class Descent:
    """Where a descent ended."""

    point: Tensor
    """The best point at which the objective was evaluated."""
    value: float
    """The objective there."""
    evaluations: int
    restored: int
    """How often the guard put the best point back."""


def minimise(
    objective: Callable[[Tensor], Tensor],
    start: Tensor,
    clock: Clock,
    *,
    outer: int,
    target: float = 0.0,
    history: int = 50,
    inner: int = 20,
    limit: float = float("inf"),
    change: float = 0.0,
) -> Descent:
    """Minimise from `start` with strong-Wolfe line searches.

    Args:
        objective: point -> scalar, differentiable.
        start: any shape.
        clock: checked before every evaluation but the first.
        outer: outer iterations, of `inner` steps each.
        target: stop at or below this value.
        history: pairs that approximate the curvature.
        inner: steps of one outer iteration.
        limit: a point with a larger absolute entry counts as divergence.
        change: stop when an outer iteration lowers the best value by less than this share.

    The guard acts after every outer iteration on a value that is not finite or exceeds ten times the best, or a
    point beyond `limit`: the first time it restores the best point, clears the history and cuts the rate to 0.3;
    the second time it ends the descent.
    """
    point = start.detach().clone().requires_grad_(True)
    best, lowest, evaluations, restored = start.detach().clone(), float("inf"), 0, 0
    rate = 1.0

    def fresh() -> torch.optim.LBFGS:
        return torch.optim.LBFGS(
            [point],
            lr=rate,
            max_iter=inner,
            history_size=history,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-14,
            tolerance_change=1e-16,
        )

    latest = float("inf")

    def closure() -> Tensor:
        nonlocal best, lowest, evaluations, latest
        if evaluations and clock.left <= 0:
            raise _OutOfTimeError
        value = objective(point)
        (gradient,) = torch.autograd.grad(value, point)
        point.grad = gradient
        evaluations += 1
        latest = float(value.detach())
        if latest < lowest and bool(point.detach().abs().max() <= limit):
            lowest, best = latest, point.detach().clone()
        return value.detach()

    optimizer = fresh()
    for _ in range(outer):
        before = lowest
        try:
            optimizer.step(closure)
        except _OutOfTimeError:
            break
        diverged = latest != latest or latest > RUNAWAY * lowest or bool((point.detach().abs() > limit).any())
        if diverged:
            restored += 1
            if restored == 2:
                break
            rate *= 0.3
            with torch.no_grad():
                point.copy_(best)
            optimizer = fresh()
        if lowest <= target or clock.left <= 0:
            break
        if not diverged and before < float("inf") and before - lowest <= change * abs(before):
            break
    return Descent(best, lowest, evaluations, restored)
