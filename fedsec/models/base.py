"""What every architecture has in common: the backbone contract, the normalising wrapper, normalisation layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsec.errors import ConfigError

Norm = Literal["group", "batch", "none"]

MEAN, STD = 0.5, 0.25
"""Public and data-free: the statistics of a data set would be one more release of private data."""


class InputSize(NamedTuple):
    """The images that an architecture accepts."""

    channels: int
    size: int
    """Side in pixels: the smallest, or the only one where `exact`."""
    exact: bool = False


class Backbone(nn.Module, ABC):
    """An architecture in two parts: `embed` gives the features in front of the last layer, `head` is that layer."""

    embed_dim: int
    input: InputSize
    normalisation: ClassVar[tuple[float, float]] = (MEAN, STD)
    """Mean and standard deviation that `Normalised` applies where nobody asks for others."""

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """Features (B, embed_dim) of normalised images (B, C, H, W)."""

    @abstractmethod
    def head(self, features: Tensor) -> Tensor:
        """Logits (B, classes) of features (B, embed_dim)."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of normalised images."""
        return self.head(self.embed(x))

    def unused_parameters(self) -> tuple[str, ...]:
        """Names of parameters without a path to the loss: they are neither trained nor sent."""
        return tuple(name for name, parameter in self.named_parameters() if not parameter.requires_grad)


class Normalised(nn.Module):
    """A backbone that takes images in [0, 1]: (x - mean) / std happens inside, so attacks and exports carry it."""

    normalisation_keys: ClassVar[tuple[str, str]] = ("mean", "std")
    """State-dict keys that belong to the architecture: a federation never shares, averages or noises them."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: Backbone, mean: Sequence[float] | float = MEAN, std: Sequence[float] | float = STD) -> None:
        super().__init__()
        self.net = net
        for name, value in (("mean", mean), ("std", std)):
            channels = torch.as_tensor(value, dtype=torch.float32).expand(net.input.channels)
            self.register_buffer(name, channels.clone().view(1, -1, 1, 1))

    @property
    def embed_dim(self) -> int:
        """Length of the feature vector."""
        return self.net.embed_dim

    @property
    def input(self) -> InputSize:
        """The images that the backbone accepts."""
        return self.net.input

    def normalise(self, x: Tensor) -> Tensor:
        """What the backbone sees of images (B, C, H, W) in [0, 1]."""
        return (x - self.mean) / self.std

    def embed(self, x: Tensor) -> Tensor:
        """Features (B, embed_dim) of images in [0, 1]."""
        return self.net.embed(self.normalise(x))

    def head(self, features: Tensor) -> Tensor:
        """Logits of features."""
        return self.net.head(features)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        return self.net(self.normalise(x))  # type: ignore[no-any-return]


def num_groups(channels: int) -> int:
    """Groups for a GroupNorm: the largest divisor up to 32 that leaves at least two channels a group.

    A group of one channel on a 1x1 map has no variance, and its output would always be zero.
    """
    return next((g for g in range(32, 1, -1) if channels % g == 0 and channels // g >= 2), 1)


def group_norm(channels: int) -> nn.GroupNorm:
    """The GroupNorm that stands in for a BatchNorm of so many channels (Wu & He 2018)."""
    return nn.GroupNorm(num_groups(channels), channels)


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """The normalisation layer of a two-dimensional architecture.

    Raises:
        ConfigError: not a known kind.
    """
    if norm not in ("group", "batch", "none"):
        raise ConfigError(f"norm={norm}: write group, batch or none")
    if norm == "none":
        return nn.Identity()
    return group_norm(channels) if norm == "group" else nn.BatchNorm2d(channels)


def replace_batch_norm(model: nn.Module) -> nn.Module:
    """Put a GroupNorm in the place of every BatchNorm, under the same name.

    The affine parameters are kept, the running statistics go.

    Returns:
        the model, changed in place (a new layer where the model itself is a BatchNorm).
    """
    if isinstance(model, _BatchNorm):
        layer = nn.GroupNorm(num_groups(model.num_features), model.num_features, eps=model.eps, affine=model.affine)
        if model.affine:
            layer.weight, layer.bias = model.weight, model.bias
        return layer.train(model.training)
    for name, child in model.named_children():
        setattr(model, name, replace_batch_norm(child))
    return model


def check_size(name: str, image_size: int, smallest: int, hint: str = "") -> None:
    """Refuse images that the architecture would shrink away.

    Raises:
        ConfigError: the side is below `smallest`.
    """
    if image_size < smallest:
        raise ConfigError(f"{name}: images of {image_size} pixels are too small, it needs {smallest}{hint}")


def last_linear(model: nn.Module) -> str:
    """Name of the fully connected layer that makes the logits: the last one of the model.

    Raises:
        ConfigError: there is none.
    """
    found: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no fully connected layer")
    return found[-1]
