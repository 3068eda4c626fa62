"""Is a reconstruction exact? Tests that need no ground truth.

1. Gradient: the simulation reproduces the observation to rounding. Necessary, not sufficient.
2. Error estimate of at least 50 dB: the method is run once more on what its own result would have sent, where the
   truth is known; or the posterior covariance at the solution.
3. The method's own checks of its intermediate results (`Candidate.layers_ok`).

A method that proves every image by itself (`Candidate.image_psnr`) needs only 2 for a part of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .candidate import Candidate
from .objectives import best_scale
from .observation import Observation

TOLERANCE = 1e-4
"""Relative residual of an exact reconstruction, computed in float32 or float64."""
ROUNDING_FACTOR = 30.0
"""Where a real update's rounding exceeds the tolerance, the residual may be so many times the rounding."""
COARSEST = 3e-3
"""Rounding, as a share of ‖g‖, above which nothing is certified."""
EXACT_DB = 50.0
"""Estimated PSNR from which a reconstruction may be certified."""
MATCHED = (0.9, 1.1)
"""Scales κ that raise no warning."""


def tolerance(observation: Observation) -> float:
    """The relative error that float32 rounding of the update alone can cause."""
    return max(TOLERANCE, ROUNDING_FACTOR * observation.relative_floor)


@torch.no_grad()
def assess(candidate: Candidate, observation: Observation) -> Candidate:
    """Fill in residual, scale, misfit, prior energy and certificate of a candidate."""
    x, y, simulation = candidate.images, candidate.labels, observation.simulation
    weights, g = observation.weights, observation.gradient
    simulated = simulation.flat(x, y) * weights
    residual, kappa = _residual(simulated, g * weights)
    if candidate.layers_ok and residual > TOLERANCE:  # saturated nets: float32 is too coarse to confirm
        exact = simulation.double.flat(x.double(), y if y.ndim == 1 else y.double()).to(g) * weights
        residual, kappa = min((residual, kappa), _residual(exact, g * weights))
    notes = candidate.notes
    filled = candidate.image_psnr is not None and min(candidate.image_psnr) < 0  # with images that explain nothing
    if not filled and not MATCHED[0] <= kappa <= MATCHED[1] and (residual < 0.1 or kappa < 0):
        what = "the sign of the update or of the model is wrong" if kappa < 0 else "scale mismatch"
        notes = (*notes, f"{what}: the update is {kappa:.3g} times what the model says")
    certified = (
        candidate.layers_ok
        and residual <= tolerance(observation)
        and observation.relative_floor <= COARSEST
        and candidate.est_psnr is not None
        and candidate.est_psnr >= EXACT_DB
    )
    proven = observation.batch if certified else 0
    if candidate.image_psnr is not None:
        proven = _proven_alone(candidate.image_psnr, residual, observation)
    return replace(
        candidate,
        residual=residual,
        kappa=kappa,
        misfit=float(observation.whitened_square(simulated)),
        energy=float(observation.prior.energy(x).sum()),
        certified=proven,
        notes=notes,
    )


def _proven_alone(image_psnr: tuple[float, ...], residual: float, observation: Observation) -> int:
    """Images with a proof of their own. All of them together must explain the update, too, or none is believed."""
    proven = sum(value >= EXACT_DB for value in image_psnr)
    return 0 if proven == observation.batch and residual > tolerance(observation) else proven


def _residual(simulated: Tensor, observed: Tensor) -> tuple[float, float]:
    """(‖κφ − g‖/‖g‖ at the best κ ≥ 0, that κ before the bound)."""
    kappa = best_scale(simulated, observed)
    difference = max(kappa, 0.0) * simulated.double() - observed.double()
    value = float(difference.norm() / observed.double().norm().clamp(min=1e-300))
    return (value, kappa) if math.isfinite(value) else (math.inf, kappa)


@torch.no_grad()
def estimate_from_replay(
    candidate: Candidate, observation: Observation, solve: Callable[[Mapping[str, Tensor]], Tensor]
) -> Candidate:
    """Estimate the PSNR of a closed-form method by running it on the update that its own result would have caused.

    That update carries the float32 rounding of a real one, and its image is known, so the error of the second run
    has the size of the error of the first (a parametric bootstrap of size one).
    """
    replayed = observation.named(observation.reobserve(candidate.images, candidate.labels))
    error = float((solve(replayed).double() - candidate.images.double()).pow(2).mean())
    decibel = -10 * math.log10(max(error, 1e-14)) if math.isfinite(error) else None
    return replace(candidate, est_psnr=decibel)
