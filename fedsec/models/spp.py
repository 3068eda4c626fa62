"""A small convolutional net with spatial pyramid pooling, which takes images of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.errors import ConfigError
from fedsec.models.base import Backbone, InputSize, Norm, check_size, norm_layer

GROUPS = 8
WIDTHS = (32, 64, 128)
HIDDEN = 128


class SPPCNN(Backbone):
    """Convolutional net with spatial pyramid pooling (437k parameters), for images of any size.

    Three 3x3 convolutions (32, 64, 128 channels) with normalisation and ReLU, max pooling after the first two, a
    pyramid of adaptive max pools, and two linear layers. Sources: He et al. 2015, "Spatial pyramid pooling in deep
    convolutional networks"; FedSGDCOVID's abstract (Ho et al. 2022), of which widths and levels are a reconstruction.

    Args:
        levels: sides of the pooled maps, joined with "-".
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        norm: Norm = "group",
        levels: str = "1-2-4",
    ) -> None:
        super().__init__()
        check_size("cnn_spp", image_size, 16)
        try:
            self.levels = tuple(int(level) for level in str(levels).split("-"))
        except ValueError:
            self.levels = ()
        if not self.levels or min(self.levels) < 1:
            raise ConfigError(f"cnn_spp: levels={levels}: write sides joined with '-', such as 1-2-4")
        self.input = InputSize(in_channels, 16)
        self.embed_dim = HIDDEN
        layers: list[nn.Module] = []
        before = in_channels
        for number, width in enumerate(WIDTHS):
            layer = nn.GroupNorm(GROUPS, width) if norm == "group" else norm_layer(norm, width)
            layers += [nn.Conv2d(before, width, 3, padding=1), layer, nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if number < len(WIDTHS) - 1 else []
            before = width
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(before * sum(side * side for side in self.levels), HIDDEN)
        self.fc = nn.Linear(HIDDEN, num_classes)

    def pyramid(self, features: Tensor) -> Tensor:
        """(B, C · Σ side²) maxima of ever finer grids; the same length for every size of image."""
        return torch.cat([F.adaptive_max_pool2d(features, side).flatten(1) for side in self.levels], dim=1)

    def embed(self, x: Tensor) -> Tensor:
        """Output of the hidden layer."""
        return F.relu(self.hidden(self.pyramid(self.features(x))))

    def head(self, features: Tensor) -> Tensor:
        """The linear layer."""
        return self.fc(features)  # type: ignore[no-any-return]
