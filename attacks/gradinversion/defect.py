"""A closed form for one step, made exact for several: defect correction.

Several steps send g = φ₁(x) + c(x), with φ₁ the one step at rate η·T that the closed form undoes and c the difference
that the local training makes, of first order in η. Both can be simulated. So x ← closed form(g − c(x)) is repeated; it
converges where the training does not bend faster than the closed form can follow. Anderson 1965 (with two remembered
steps) makes it quick. The residual of the whole training judges it, as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .candidate import Candidate
from .clock import Clock
from .observation import Observation
from .unrolled import Unrolled, one_step

ROUNDS = 25
REMEMBERED = 2
"""Steps that the acceleration remembers."""
STALLED = 4
"""Rounds without improvement after which the iteration has ended."""


@dataclass
class _Best:
    candidate: Candidate | None = None
    residual: float = math.inf
    moved: float = math.inf
    """Mean squared change of a pixel in the step that led here."""
    age: int = 0

    def offer(self, candidate: Candidate, residual: float, moved: float) -> None:
        self.age += 1
        if residual < self.residual:
            self.candidate, self.residual, self.moved, self.age = candidate, residual, moved, 0


def corrected(training: Unrolled, solve: Callable[[Observation], Candidate], clock: Clock) -> Candidate | None:
    """Iterate a closed form for one step until it explains several.

    Args:
        training: the local training of one image.
        solve: an observation of one step -> its closed-form candidate.
        clock: CPU budget.

    Returns:
        The candidate whose training explains g best; its error estimate includes the last step's change. None where
        nothing finite came out.
    """
    seen, single = training.observation, one_step(training.observation)
    best, images = _Best(), None
    points: list[tuple[Tensor, Tensor]] = []
    share = float(single.gradient.norm()) / max(float(seen.gradient.norm()), 1e-300)
    for _ in range(ROUNDS):
        defect = torch.zeros_like(single.gradient)
        if images is not None:
            walked = share * seen.simulation.flat(images, training.labels)
            defect = walked - single.simulation.flat(images, training.labels)
        candidate = solve(replace(single, gradient=single.gradient - defect))
        found = candidate.images
        if not bool(torch.isfinite(found).all()):
            break
        moved = math.inf if images is None else float((found - images).double().pow(2).mean())
        best.offer(candidate, training.residual(found), moved)
        if best.age >= STALLED or clock.left <= 0:
            break
        points = [*points[-REMEMBERED:], (found if images is None else images, found)]
        images = _accelerated(points) if images is not None else found
    return None if best.candidate is None else _judged(best)


def _accelerated(points: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The next point from (x, G(x)) of the last steps: the affine combination with the least change, within [0, 1]."""
    change = torch.stack([(after - before).flatten().double() for before, after in points])
    value = torch.stack([after.flatten().double() for _, after in points])
    if len(points) == 1:
        return points[0][1]
    slopes, target = (change[1:] - change[:-1]).T, change[-1]
    weights = torch.linalg.lstsq(slopes, target[:, None], driver="gelsd").solution[:, 0]
    if not bool(torch.isfinite(weights).all()) or float(weights.abs().sum()) > 50:
        return points[-1][1]
    moved: Tensor = value[-1] - (value[1:] - value[:-1]).T @ weights
    return moved.view_as(points[-1][1]).to(points[-1][1]).clamp(0, 1)


def _judged(best: _Best) -> Candidate:
    """The closed form's own error estimate, and what the last step still changed."""
    candidate = best.candidate
    assert candidate is not None
    if candidate.est_psnr is None or not math.isfinite(best.moved):
        return replace(candidate, method="fedavg", est_psnr=candidate.est_psnr)
    error = 10 ** (-candidate.est_psnr / 10) + best.moved
    return replace(candidate, method="fedavg", est_psnr=-10 * math.log10(max(error, 1e-14)))
