"""The sigmoid LeNet on which gradient leakage was first shown; the easiest victim of gradient inversion."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fedsec.errors import ConfigError
from fedsec.models.base import Backbone, InputSize, Norm, check_size

Init = Literal["uniform", "default"]


class LeNet(Backbone):
    """Sigmoid LeNet, the standard victim of gradient leakage.

    Three 5x5 convolutions with 12 channels (strides 2, 2, 1) and one linear layer. Source: Zhu, Liu & Han 2019.

    Args:
        norm: has no effect, since there are no normalisation layers.
        init: `uniform` draws every weight and bias from U(-0.5, 0.5), the setting in which the attack was shown;
            `default` is the framework's. It decides how well attacks work, so results name it.
    """

    def __init__(
        self, num_classes: int, in_channels: int, image_size: int, norm: Norm = "group", init: Init = "uniform"
    ) -> None:
        super().__init__()
        check_size("lenet", image_size, 8)
        if init not in ("uniform", "default"):
            raise ConfigError(f"lenet: init={init}: write uniform or default")
        self.init = init
        self.input = InputSize(in_channels, image_size, exact=True)
        self.embed_dim = 12 * (-(-image_size // 4)) ** 2
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 12, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, padding=2),
            nn.Sigmoid(),
        )
        self.fc = nn.Linear(self.embed_dim, num_classes)
        if init == "uniform":
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -0.5, 0.5)

    def embed(self, x: Tensor) -> Tensor:
        """Flattened output of the last convolution."""
        return self.features(x).flatten(1)  # type: ignore[no-any-return]

    def head(self, features: Tensor) -> Tensor:
        """The linear layer."""
        return self.fc(features)  # type: ignore[no-any-return]
