"""What networks that restore images have in common, and how one of them takes a place among the classifiers.

With `num_classes=0` they map degraded images to clean ones, which is what they were published for. With classes, a
linear layer reads the restored image through an 8x8 grid of averages: attacks, defenses and strategies then apply as
to every model. That classifier is ours and is no published network.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.errors import ConfigError
from fedsec.models.base import Backbone, InputSize
from fedsec.models.film import REFERENCE_PROTOCOL, Film, FilmInit, HyperNetwork

GRID = 8
CONV_STD = 0.01
"""Of the released initialisation (Yang et al. 2022)."""


class Restorer(Backbone):
    """A network from images to images in [0, ∞), alone or in front of a linear classifier.

    Args:
        num_classes: 0 for images out; else logits.
        in_channels: of images in and out.
        smallest: side in pixels; the only one where `exact`.
        film: how many features a hypernetwork scales and shifts; None: it has no hypernetwork.
        init: of the hypernetwork.
        dropout: of the hypernetwork.
    """

    normalisation: ClassVar[tuple[float, float]] = (0.0, 1.0)
    """Residual sums and the last ReLU mean intensities, not standardised values."""
    protocol: Tensor
    """(7,) of the hospital that this copy of the model stands at. No buffer: it is neither sent, averaged nor noised,
    and whoever trains sets it."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        smallest: InputSize,
        film: int | None = None,
        init: FilmInit = "identity",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if init not in ("identity", "reference"):
            raise ConfigError(f"init={init}: write identity or reference")
        self.input = smallest
        self.embed_dim = in_channels * GRID * GRID
        self.hyper = None if film is None else HyperNetwork(film, init=init, dropout=dropout)
        self.protocol = torch.tensor(REFERENCE_PROTOCOL)
        self.fc = nn.Linear(self.embed_dim, num_classes) if num_classes else None

    def film(self, x: Tensor, protocol: Tensor | None = None) -> Film | None:
        """Scales and shifts for a batch x (B, C, H, W); None without a hypernetwork.

        Args:
            protocol: (7,) or (B, 7); the hospital's own, `self.protocol`, where not given.
        """
        if self.hyper is None:
            return None
        own: Tensor = self.protocol if protocol is None else protocol
        # A row for each image: per-sample gradients need the batch dimension in every layer.
        film: Film = self.hyper(own.to(x).expand(len(x), -1))
        return film

    @abstractmethod
    def restore(self, x: Tensor, film: Film | None) -> Tensor:
        """Clean images (B, C, H, W) from degraded ones."""

    def embed(self, x: Tensor) -> Tensor:
        """An 8x8 grid of averages of the restored image."""
        return F.adaptive_avg_pool2d(self.restore(x, self.film(x)), GRID).flatten(1)

    def head(self, features: Tensor) -> Tensor:
        """The linear layer."""
        if self.fc is None:
            raise ConfigError("this model restores images and has no classes")
        return self.fc(features)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or restored images where there are no classes."""
        return self.restore(x, self.film(x)) if self.fc is None else self.head(self.embed(x))


def start_small(module: nn.Module) -> None:
    """Convolution weights from N(0, 0.01²) and no biases, as the released code has it."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, std=CONV_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
