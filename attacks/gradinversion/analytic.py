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
    refuse_mixtures(observation)
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


def refuse_mixtures(observation: Observation, noise: float = 1e-3) -> None:
    """What every closed-form method for one image needs.

    Raises:
        NotApplicable: more than one image, or declared noise above the share `noise` of ‖g‖.
    """
    if observation.batch > 1:
        raise NotApplicable(f"each row of the gradient is a mixture of {observation.batch} images")
    if observation.relative_noise > noise:
        share = observation.relative_noise
        raise NotApplicable(f"the defense's noise is {share:.2g} of the gradient; closed forms bear {noise:g}")


def stage(run: Attempt) -> None:
    """One image, fully connected first layer."""
    run.attempt("analytic", lambda y, _: analytic(run.observation, run.chain(), y))
