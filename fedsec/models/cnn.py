"""The default federated model: a small convolutional net that trains on a CPU and under differential privacy."""

from __future__ import annotations

from torch import Tensor, nn

from fedsec.models.base import Backbone, InputSize, Norm, check_size, norm_layer

GROUPS = 8


class CNN(Backbone):
    """Small convolutional net (57k parameters), the default.

    Three blocks of 3x3 convolution (32, 64, 64 channels), normalisation (GroupNorm in 8 groups by default), ReLU and
    max pooling; adaptive average pooling to 3x3; one linear layer.
    """

    def __init__(self, num_classes: int, in_channels: int, image_size: int, norm: Norm = "group") -> None:
        super().__init__()
        check_size("cnn", image_size, 16)
        self.input = InputSize(in_channels, 16)
        self.embed_dim = 64 * 3 * 3
        layers: list[nn.Module] = []
        before = in_channels
        for width in (32, 64, 64):
            layer = nn.GroupNorm(GROUPS, width) if norm == "group" else norm_layer(norm, width)
            layers += [nn.Conv2d(before, width, 3, padding=1), layer, nn.ReLU(), nn.MaxPool2d(2)]
            before = width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3))
        self.fc = nn.Linear(self.embed_dim, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        """Flattened 3x3 map of 64 channels."""
        return self.features(x).flatten(1)  # type: ignore[no-any-return]

    def head(self, features: Tensor) -> Tensor:
        """The linear layer."""
        return self.fc(features)  # type: ignore[no-any-return]
