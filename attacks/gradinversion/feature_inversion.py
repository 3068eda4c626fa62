"""Which image has these features? A descent in coordinates in which public images are N(0, I).

x = μ + C^½·ξ, minimising Σ_j (h_j(x) − ĥ_j)²/s² + ‖ξ‖² by L-BFGS with s falling from a third of the features' public
spread. First derivatives are all it needs, so kinks do no harm: on a ReLU net with max pooling it beats Gauss–Newton,
whose linearisation holds for tiny steps only. Exact features want small s, and small s a Jacobian along the leading
components, which turns long valleys into bowls. Feature inversion: Mahendran and Vedaldi 2015; as an attack on
gradients: Kariyappa et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import lbfgs
from .clock import Clock
from .gauss_newton import derivatives
from .prior import Prior

OUTER, INNER, HISTORY = 8, 20, 30
"""Of L-BFGS."""
CHANGE = 1e-2
"""Share by which an outer iteration must lower the objective for another one to follow."""
FURTHEST = 1e3
"""A coordinate beyond this counts as divergence."""
AT_ONCE = 40_000
"""Pixels of all directions that are followed at once: a wide net holds a thousand times as many numbers."""
PUBLIC_IMAGES = 16
"""From which the spread is taken."""

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Whitening:
    """Images as x = μ + C^½·ξ with ‖ξ‖² the prior energy, whether or not the basis is complete."""

    prior: Prior

    def images(self, point: Tensor) -> Tensor:
        """x (B, C, H, W) at ξ of the same shape."""
        flat, low = point.flatten(1), self.prior.floor**0.5
        inside = (flat @ self.prior.basis) * (self.prior.variance.sqrt() - low)
        images: Tensor = self.prior.mean + (low * flat + inside @ self.prior.basis.T).view_as(point)
        return images

    def point(self, images: Tensor) -> Tensor:
        """ξ at images (B, C, H, W)."""
        flat, low = (images - self.prior.mean).flatten(1), self.prior.floor**-0.5
        inside = (flat @ self.prior.basis) * (self.prior.variance.rsqrt() - low)
        point: Tensor = (low * flat + inside @ self.prior.basis.T).view_as(images)
        return point


@torch.no_grad()
def spread_of(function: Function, prior: Prior) -> float:
    """Standard deviation of a feature over public images, root mean square over the features."""
    images = prior.images[:PUBLIC_IMAGES]
    if len(images) < 2:
        return float(function(prior.mean[None]).pow(2).mean().sqrt())
    return float(torch.cat([function(image[None]) for image in images]).var(0).mean().sqrt())


def curvature(function: Function, images: Tensor, prior: Prior, components: int) -> Tensor:
    """JᵀJ (K, K) of one image's features along the first components, in prior standard deviations; float64."""
    rank = min(components, prior.rank)
    directions = prior.basis[:, :rank].T.reshape(rank, *prior.mean.shape)
    groups = directions.split(max(1, AT_ONCE // prior.mean.numel()))
    first = [torch.zeros(len(g), dtype=torch.long, device=images.device) for g in groups]
    parts = [derivatives(lambda x: function(x)[0], images, w, g) for w, g in zip(first, groups, strict=True)]
    slopes = torch.cat(parts).double()
    slopes = slopes * prior.variance[:rank].double().sqrt()[:, None]
    gram: Tensor = slopes @ slopes.T
    return gram


def conditioner(gram: Tensor, basis: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
    """The linear map from coordinates in which the objective's Hessian is about I to ξ.

    Along the components it is L⁻ᵀ with LLᵀ = JᵀJ/s² + I; across them the curvature is taken to be that of the last.
    """
    matrix = gram / scale**2 + torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.inv(torch.linalg.cholesky(matrix)).to(basis)
    across = float(matrix.diagonal()[-(len(gram) // 8 + 1) :].mean()) ** -0.5
    leading = basis[:, : len(gram)]

    def apply(step: Tensor) -> Tensor:
        flat = step.flatten(1)
        inside = flat @ leading
        out: Tensor = (across * (flat - inside @ leading.T) + (inside @ inverse) @ leading.T).view_as(step)
        return out

    return apply


def invert(
    function: Function,
    target: Tensor,
    prior: Prior,
    start: Tensor,
    clock: Clock,
    *,
    widenings: Sequence[float],
    error: float = 0.0,
    components: int = 0,
) -> Tensor:
    """The image whose features come closest to `target` while it looks like public ones.

    Args:
        function: images (B, C, H, W) -> features (B, F), differentiable.
        target: (B, F).
        prior: N(μ, C).
        start: (B, C, H, W).
        clock: CPU budget.
        widenings: s in units of the features' public spread, falling.
        error: standard deviation of the target, added to s².
        components: of the Jacobian that conditions the descent, for one image; 0: none.

    Returns:
        images (B, C, H, W), not clamped.
    """
    whitening = Whitening(prior)
    unit = max(spread_of(function, prior), 1e-12 * float(target.abs().max()), 1e-30)
    gram = curvature(function, start, prior, components) if components and prior.rank else None
    point = whitening.point(start)
    for widening in widenings:
        scale = ((widening * unit) ** 2 + error**2) ** 0.5
        condition = (lambda step: step) if gram is None else conditioner(gram, prior.basis, scale)

        def place(step: Tensor, condition: Function = condition, origin: Tensor = point) -> Tensor:
            return origin + condition(step)

        def objective(step: Tensor, place: Function = place, scale: float = scale) -> Tensor:
            at = place(step)
            left = (function(whitening.images(at)) - target) / scale
            return (left * left).sum() + (at * at).sum()

        ended = lbfgs.minimise(
            objective,
            torch.zeros_like(point),
            clock,
            outer=OUTER,
            inner=INNER,
            history=HISTORY,
            limit=FURTHEST,
            change=CHANGE,
        )
        point = place(ended.point).detach()
        if clock.left <= 0:
            break
    return whitening.images(point).detach()
