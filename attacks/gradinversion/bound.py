"""How well could any attack have done on one observation? A Bayesian Cramér–Rao indicator, at the true images.

M = J*ᵀWJ* + I ⊗ C⁻¹ with J* = ∂φ/∂x at the truth, W the Fisher information of the defense's noise on each entry and
N(μ, C) the public prior; the mean squared error that M allows is the mean diagonal of M⁻¹ (van Trees 1968, part I,
§2.4.3, with J at the truth in the place of its prior expectation). Simulation only: it needs the images that an attack
looks for, and is called when all attacks are over.

Local, Gaussian prior, no pixel box, labels and order known, φ exact, noise small: an indicator, not a guarantee. Single
images beat it; compare means over 20 images or more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .candidate import NotApplicable
from .gauss_newton import derivatives, posterior_variance
from .observation import Observation, rounding
from .prior import Prior
from .simulation import Simulation

MAX_ENTRIES = 120_000_000
"""Entries of the largest Jacobian (480 MB)."""
MAX_UNKNOWNS = 4096
"""Unknowns of the largest eigenproblem: some 10 CPU seconds."""
NEGLIGIBLE = 1e-3
"""Variance, as a share of float32 rounding's, below which an entry carries no noise worth the name."""
INDEPENDENT = 1e-10
"""Eigenvalues of JᵀJ above this share of the largest are counted as its rank."""
ADDS_UP = 1e-4
"""Relative difference between a batch and the sum of its images up to which they are taken one by one."""
LITTLE = 1e4
"""Trace of the information up to which products in single precision serve: their error of some 1e-6 of the largest
eigenvalue is then below a hundredth of what the prior alone knows."""
_BLOCK = 4096


@dataclass(frozen=True)
class Bound:
    """What the noise of one observation leaves open, in units of pixels in [0, 1]."""

    mse: float
    """Mean over all pixels of all images."""
    information: Tensor
    """(B·K,) eigenvalues of C^½J*ᵀWJ*C^½: how much better than the prior each direction is known; 1 is as well."""


def fisher_weights(observation: Observation) -> Tensor | None:
    """W (P,) float64: 1/σ² for Gaussian noise, 1/b² for Laplace, 12/step² for quantisation, 0 for what was not sent.

    The rounding of float32 is left out. None: an entry that was sent carries no noise, so that no bound holds.
    """
    floor = rounding(observation.simulation, observation.gradient, observation.step, observation.simulation.steps)
    variance = observation.std.double() ** 2 - floor.double() ** 2
    if bool((variance <= NEGLIGIBLE * floor.double() ** 2).any()):
        return None
    # Laplace noise of variance 2b² has the Fisher information 1/b².
    laplace = observation.noise == "laplace" and observation.noise_std > 0
    return (2.0 if laplace else 1.0) / variance


def bound(observation: Observation, images: Tensor, labels: Tensor) -> Bound | None:
    """The least mean squared error that the observation's noise and the prior allow; None: it has no noise.

    Where the prior keeps fewer components than there are pixels, the directions outside count as known.

    Args:
        observation: of these images.
        images: (B, C, H, W), the true ones.
        labels: (B,) or (B, L), the true ones.

    Raises:
        NotApplicable: the Jacobian or the matrix M is too large.
    """
    weights = fisher_weights(observation)
    if weights is None:
        return None
    prior = observation.prior
    scale = prior.variance.double().repeat(len(images))
    matrix = information(observation, images, labels, weights, scaled(prior))
    values, variance = posterior_variance(matrix, scale)
    return Bound(float(variance.sum()) / images.numel(), values)


def jacobian_rank(observation: Observation, images: Tensor, labels: Tensor) -> int:
    """Directions of the images, of B·C·H·W, that change what is sent.

    Raises:
        NotApplicable: the Jacobian is too large.
    """
    basis = observation.prior.basis.T
    values = torch.linalg.eigvalsh(information(observation, images, labels, observation.weights.double(), basis))
    return int((values > INDEPENDENT * values[-1]).sum())


def van_trees(observation: Observation, images: Tensor, labels: Tensor) -> Bound | None:
    """The same with J*ᵀWJ* averaged over public images, for an observation of one image.

    A bound on the mean over images, if these were drawn from N(μ, C). Needs 50 images or more; each costs as much as a
    bound.

    Args:
        observation: of one image.
        images: (N, C, H, W), public. labels: (N,) or (N, L).
    """
    weights = fisher_weights(observation)
    if weights is None:
        return None
    alone = replace(observation, simulation=replace(observation.simulation, batch=1))
    directions, scale = scaled(observation.prior), observation.prior.variance.double()
    total = torch.zeros(len(scale), len(scale), dtype=torch.float64, device=scale.device)
    for x, y in zip(images.split(1), labels.split(1), strict=True):
        total += information(alone, x, y, weights, directions)
    values, variance = posterior_variance(total / len(images), scale)
    return Bound(float(variance.sum()) / images[0].numel(), values)


def scaled(prior: Prior) -> Tensor:
    """The prior's components, each with its standard deviation as its length, (K, d)."""
    return (prior.basis * prior.variance.sqrt()).T


def information(
    observation: Observation, images: Tensor, labels: Tensor, weights: Tensor, directions: Tensor
) -> Tensor:
    """DJᵀWJDᵀ (B·K, B·K) float64 at these images, with the same directions D (K, d) for each of them.

    Raises:
        NotApplicable: too large, with the numbers.
    """
    rows, unknowns = observation.simulation.size, len(images) * len(directions)
    if unknowns > MAX_UNKNOWNS or rows * unknowns > MAX_ENTRIES:
        raise NotApplicable(f"too large: {rows:,} entries of the update by {unknowns:,} unknowns")
    slopes = _slopes(observation.simulation, images, labels, directions.view(-1, *images.shape[1:]).to(images))
    root = weights.sqrt()
    blocks = list(zip(slopes.split(_BLOCK, 1), root.split(_BLOCK), strict=True))
    trace = sum(float((part * weight.to(part)).square().sum()) for part, weight in blocks)
    exact = not trace <= LITTLE  # also where it is not finite
    matrix = torch.zeros(unknowns, unknowns, dtype=torch.float64, device=images.device)
    for part, weight in blocks:
        block = part.double() * weight if exact else part * weight.to(part)
        matrix += block @ block.T
    return matrix


def _slopes(simulation: Simulation, images: Tensor, labels: Tensor, directions: Tensor) -> Tensor:
    """∂φ along each direction of each image, (B·K, P)."""
    share = _share(simulation, images, labels)
    if share is None:
        number = torch.arange(len(images), device=images.device)
        which, repeated = number.repeat_interleave(len(directions)), directions.repeat(len(images), 1, 1, 1)
        return derivatives(lambda x: simulation.flat(x, labels), images, which, repeated)
    pairs = zip(images.split(1), labels.split(1), strict=True)
    return torch.cat([share * _slopes_of_one(simulation, image, label, directions) for image, label in pairs])


def _slopes_of_one(simulation: Simulation, image: Tensor, label: Tensor, directions: Tensor) -> Tensor:
    alone = replace(simulation, batch=1)
    first = torch.zeros(len(directions), dtype=torch.long, device=image.device)
    return derivatives(lambda x: alone.flat(x, label), image, first, directions)


def _share(simulation: Simulation, images: Tensor, labels: Tensor) -> float | None:
    """The factor with which each image's own upload enters the batch's; None where they do not simply add up.

    B times cheaper where it is known: BatchNorm of a batch, several steps and clipping of the whole mix the images.
    """
    if len(images) == 1:
        return 1.0
    alone = replace(simulation, batch=1)
    factor = 1 / len(images) if simulation.divisor is None else 1.0
    whole, total = simulation.flat(images, labels), torch.zeros(simulation.size).to(images)
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        total += factor * alone.flat(image, label)
    return factor if float((whole - total).norm()) <= ADDS_UP * float(whole.norm()) else None
