"""ResNet-18 with a choice of normalisation and stem, written so that per-sample gradients work."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fedsec.models.base import Backbone, InputSize, Norm, norm_layer
from fedsec.models.stem import SMALLEST, Stem, choose_stem


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5, left).

    ReLU and the residual sum are out of place: backward hooks cannot work on tensors that are overwritten.
    """

    def __init__(self, before: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm_layer(norm, width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = norm_layer(norm, width)
        self.downsample: nn.Module | None = None
        if stride != 1 or before != width:
            shortcut = nn.Conv2d(before, width, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, norm_layer(norm, width))

    def forward(self, x: Tensor) -> Tensor:
        """Residual plus shortcut."""
        shortcut = x if self.downsample is None else self.downsample(x)
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(residual + shortcut)  # type: ignore[no-any-return]


class ResNet(Backbone):
    """Residual net of four stages of basic blocks; state-dict keys are torchvision's."""

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        num_classes: int,
        in_channels: int,
        image_size: int,
        norm: Norm,
        stem: Stem,
    ) -> None:
        super().__init__()
        kind = choose_stem("resnet18", stem, image_size)
        self.input = InputSize(in_channels, SMALLEST[kind])
        self.embed_dim = 512
        if kind == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = norm_layer(norm, 64)
        self.relu = nn.ReLU()
        self.layer1 = stage(64, 64, blocks[0], 1, norm)
        self.layer2 = stage(64, 128, blocks[1], 2, norm)
        self.layer3 = stage(128, 256, blocks[2], 2, norm)
        self.layer4 = stage(256, 512, blocks[3], 2, norm)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.embed_dim, num_classes)
        initialise(self, "fan_out")

    def embed(self, x: Tensor) -> Tensor:
        """Globally averaged output of the last stage."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)  # type: ignore[no-any-return]

    def head(self, features: Tensor) -> Tensor:
        """The linear layer."""
        return self.fc(features)  # type: ignore[no-any-return]


def stage(before: int, width: int, depth: int, stride: int, norm: Norm) -> nn.Sequential:
    """A row of blocks; the first one changes width and side."""
    return nn.Sequential(
        BasicBlock(before, width, stride, norm), *(BasicBlock(width, width, 1, norm) for _ in range(depth - 1))
    )


def initialise(model: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """Kaiming-normal convolutions (He et al. 2015) and a zero bias in front of the logits; the rest is the default."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def resnet18(num_classes: int, in_channels: int, image_size: int, norm: Norm = "group", stem: Stem = "auto") -> ResNet:
    """ResNet-18 (11.2M parameters); `stem=small` below 64 pixels.

    Source: He et al. 2016, "Deep residual learning for image recognition", table 1.
    """
    return ResNet((2, 2, 2, 2), num_classes, in_channels, image_size, norm, stem)
