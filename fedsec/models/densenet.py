"""DenseNet-121 with a choice of normalisation and stem, written so that per-sample gradients work."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.models.base import Backbone, InputSize, Norm, norm_layer
from fedsec.models.resnet import initialise
from fedsec.models.stem import SMALLEST, Stem, choose_stem

GROWTH = 32
BOTTLENECK = 4 * GROWTH


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution: 32 new channels (Huang et al. 2017, section 3)."""

    def __init__(self, before: int, norm: Norm) -> None:
        super().__init__()
        self.norm1 = norm_layer(norm, before)
        self.conv1 = nn.Conv2d(before, BOTTLENECK, 1, bias=False)
        self.norm2 = norm_layer(norm, BOTTLENECK)
        self.conv2 = nn.Conv2d(BOTTLENECK, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The input with the new channels behind it."""
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, new], dim=1)


def transition(before: int, norm: Norm) -> nn.Sequential:
    """Halve the channels and the side."""
    return nn.Sequential(
        OrderedDict(
            norm=norm_layer(norm, before),
            relu=nn.ReLU(),
            conv=nn.Conv2d(before, before // 2, 1, bias=False),
            pool=nn.AvgPool2d(2),
        )
    )


class DenseNet(Backbone):
    """Densely connected net; state-dict keys are torchvision's."""

    def __init__(
        self, blocks: tuple[int, ...], num_classes: int, in_channels: int, image_size: int, norm: Norm, stem: Stem
    ) -> None:
        super().__init__()
        kind = choose_stem("densenet121", stem, image_size)
        self.input = InputSize(in_channels, SMALLEST[kind])
        features = nn.Sequential()
        if kind == "imagenet":
            features.add_module("conv0", nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False))
        else:
            features.add_module("conv0", nn.Conv2d(in_channels, 64, 3, padding=1, bias=False))
        features.add_module("norm0", norm_layer(norm, 64))
        features.add_module("relu0", nn.ReLU())
        features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1) if kind == "imagenet" else nn.Identity())
        channels = 64
        for number, depth in enumerate(blocks, start=1):
            layers = {f"denselayer{i + 1}": DenseLayer(channels + i * GROWTH, norm) for i in range(depth)}
            features.add_module(f"denseblock{number}", nn.Sequential(OrderedDict(layers)))
            channels += depth * GROWTH
            if number < len(blocks):
                features.add_module(f"transition{number}", transition(channels, norm))
                channels //= 2
        features.add_module("norm5", norm_layer(norm, channels))
        self.features = features
        self.embed_dim = channels
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self, "fan_in")

    def embed(self, x: Tensor) -> Tensor:
        """Globally averaged output of the last block."""
        return F.adaptive_avg_pool2d(F.relu(self.features(x)), 1).flatten(1)

    def head(self, features: Tensor) -> Tensor:
        """The linear layer."""
        return self.classifier(features)  # type: ignore[no-any-return]


def densenet121(
    num_classes: int, in_channels: int, image_size: int, norm: Norm = "group", stem: Stem = "auto"
) -> DenseNet:
    """DenseNet-121 (7.0M parameters), the usual net for chest X-rays; `stem=small` below 64 pixels.

    Source: Huang et al. 2017, "Densely connected convolutional networks", table 1.
    """
    return DenseNet((6, 12, 24, 16), num_classes, in_channels, image_size, norm, stem)
