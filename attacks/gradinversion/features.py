"""The input of the first fully connected layer: recovered exactly for one image, and what an image would put there.

Any net ending in "convolutions -> fully connected" leaks these features at B = 1 (Phong et al. 2018). They cannot be
inverted in closed form through max pooling, but matching them as well as the gradient guides an optimisation
(feature inversion, as in Kariyappa et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .analytic import dense_input
from .observation import Observation


@dataclass(frozen=True)
class Features:
    """Known features of the images behind an observation."""

    value: Tensor
    """ĥ (F,), or (B, F) for a batch in order."""
    std: Tensor
    """Like ĥ: error of ĥ from the noise and rounding on the gradient."""
    function: Callable[[Tensor], Tensor]
    """Images (B, C, H, W) -> their features (B, F), differentiable."""


def recover_features(observation: Observation, weight: str, bias: str) -> Features:
    """Features in front of the fully connected layer with these parameters; B = 1.

    The error of ĥ adds that of dW, and that of da scaled by ĥ.
    """
    dw, da = observation.gradients[weight], observation.gradients[bias].double()
    std = observation.stds[weight].double()
    value = dense_input(dw.double(), da, std)
    rows = ((da[:, None] / std) ** 2).sum(0).rsqrt()
    own = float((da * observation.stds[bias].double()).norm() / (da @ da))
    error = (rows**2 + (own * value) ** 2).sqrt()
    return Features(value.to(dw), error.to(dw), feature_function(observation.simulation.model, weight))


class _ReachedError(Exception):
    """Leaves the forward pass: what lies behind has no influence."""

    def __init__(self, features: Tensor) -> None:
        self.features = features


def feature_function(model: nn.Module, weight: str) -> Callable[[Tensor], Tensor]:
    """The map from images to the input of the module that owns the parameter `weight`."""
    owner = model.get_submodule(weight.rpartition(".")[0])

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _ReachedError(args[0])

    def function(images: Tensor) -> Tensor:
        handle = owner.register_forward_pre_hook(stop)
        try:
            model(images)
        except _ReachedError as reached:
            return reached.features.flatten(1)
        finally:
            handle.remove()
        raise RuntimeError(f"the model never reaches {weight}")

    return function


def feature_distance(features: Features, images: Tensor) -> Tensor:
    """‖h(x) − ĥ‖²/‖ĥ‖²."""
    value = features.value
    return ((features.function(images) - value) ** 2).sum() / (value * value).sum().clamp(min=1e-30)


def usable(features: Features) -> bool:
    """The noise leaves at least nine tenths of the features' energy certain."""
    return bool(torch.isfinite(features.std).all()) and float(features.std.norm()) < 0.1 * float(features.value.norm())
