"""One image behind a fully connected first layer: read off, x = dWᵀ·da/(daᵀ·da) (Phong et al. 2018).

Exact to float32 rounding, trained or not, whatever stands above the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .candidate import Candidate, NotApplicable
from .certificate import estimate_from_replay, tolerance
from .chain import Chain
from .observation import Observation

if TYPE_CHECKING:
    from .attempt import Attempt


def analytic(observation: Observation, chain: Chain, labels: Tensor) -> list[Candidate]:
    """Reconstruct the image in front of the first layer.

    Raises:
        NotApplicable: more than one image, a first layer that is not fully connected, or declared noise.
    """
    refuse_mixtures(observation, weight=chain.weight)
    if chain.broken_at is not None or chain.layers:
        raise NotApplicable(chain.broken_at or "the first layer is a convolution")
    dw, da = observation.gradients[chain.weight].double(), observation.gradients[chain.bias].double()

    std = observation.stds[chain.weight]

    def solve(parts: Mapping[str, Tensor]) -> Tensor:
        flat = dense_input(parts[chain.weight].double(), parts[chain.bias].double(), std)
        pixels = (flat.view(observation.image_shape) - chain.pixel_shift) / chain.pixel_gain
        return pixels.clamp(0, 1).to(observation.gradient)[None]

    unexplained = float((dw - torch.outer(da, dense_input(dw, da, std))).norm() / dw.norm())
    found = Candidate(solve(observation.gradients), labels, "analytic", layers_ok=unexplained <= tolerance(observation))
    return [estimate_from_replay(found, observation, solve)]


def dense_input(weight_gradient: Tensor, bias_gradient: Tensor, std: Tensor) -> Tensor:
    """Input h of a fully connected layer behind one image: least squares over the rows of dW = da·hᵀ.

    Phong et al. 2018. Entry j is Σ_c da_c·dW_cj/s²_cj over Σ_c da_c²/s²_cj, where s (`std`, the shape of dW) is the
    error of dW. Its own standard deviation is (Σ_c da_c²/s²_cj)^-½, some 1e-7 relative on a clean gradient.
    """
    precise = bias_gradient[:, None] / std.double() ** 2
    information = (precise * bias_gradient[:, None]).sum(0)
    if not bool((information > 0).all()):
        raise NotApplicable("the bias gradient of the fully connected layer is zero")
    return (precise * weight_gradient).sum(0) / information


def refuse_mixtures(observation: Observation, noise: float = 1e-3, weight: str | None = None) -> None:
    """What every closed-form method for one image needs.

    Args:
        observation: whose gradient is read.
        noise: declared noise that is borne, as a share of ‖g‖.
        weight: of the fully connected layer whose rank, the number of mixtures it holds, the refusal names.

    Raises:
        NotApplicable: more than one image, or more noise.
    """
    if observation.batch > 1:
        reason = f"each row of the gradient is a mixture of {observation.batch} images"
        if weight is not None:
            rank, rows = gradient_rank(observation, weight), len(observation.gradients[weight])
            reason += f"; that of {weight} has rank {rank}"
            if rank < observation.batch:  # with C classes the rows of a softmax head add up to zero: rank C - 1 at most
                reason += f" with {rows} rows, too low to tell {observation.batch} images apart"
        raise NotApplicable(reason)
    if observation.relative_noise > noise:
        share = observation.relative_noise
        raise NotApplicable(f"the defense's noise is {share:.2g} of the gradient; closed forms bear {noise:g}")


def gradient_rank(observation: Observation, weight: str) -> int:
    """Numerical rank of a fully connected layer's weight gradient: how many mixtures of images its rows can hold."""
    values = torch.linalg.svdvals(observation.gradients[weight].double())
    noise = 3 * float(observation.stds[weight].double().norm())
    return int((values > max(1e-6 * float(values[0]), noise)).sum())


def stage(run: Attempt) -> None:
    """One image, fully connected first layer."""
    run.attempt("analytic", lambda y, _: analytic(run.observation, run.chain(), y))
