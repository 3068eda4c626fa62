"""ResNet-18 and ResNet-50 with a choice of normalisation and stem, written so that per-sample gradients work."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from fedsec.models.base import Backbone, InputSize, Norm, norm_layer
from fedsec.models.stem import SMALLEST, Stem, choose_stem


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5, left).

    ReLU and the residual sum are out of place: backward hooks cannot work on tensors that are overwritten.
    """

    expansion: ClassVar[int] = 1
    """Channels out, as a multiple of the width."""

    def __init__(self, before: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm_layer(norm, width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = norm_layer(norm, width)
        self.downsample = shortcut(before, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Residual plus shortcut."""
        short = x if self.downsample is None else self.downsample(x)
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(residual + short)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (He et al. 2016, figure 5, right); the 3x3 has the stride."""

    expansion: ClassVar[int] = 4

    def __init__(self, before: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = norm_layer(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = norm_layer(norm, width)
        self.conv3 = nn.Conv2d(width, self.expansion * width, 1, bias=False)
        self.bn3 = norm_layer(norm, self.expansion * width)
        self.relu = nn.ReLU()
        self.downsample = shortcut(before, self.expansion * width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Residual plus shortcut."""
        short = x if self.downsample is None else self.downsample(x)
        residual = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(self.bn3(self.conv3(residual)) + short)  # type: ignore[no-any-return]


Block = type[BasicBlock] | type[Bottleneck]


def shortcut(before: int, after: int, stride: int, norm: Norm) -> nn.Module | None:
    """What brings a block's input to the shape of its output; None where that is its shape."""
    if stride == 1 and before == after:
        return None
    return nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), norm_layer(norm, after))


class ResNet(Backbone):
    """Residual net of four stages of blocks; state-dict keys are torchvision's."""

    def __init__(
        self,
        name: str,
        block: Block,
        depths: tuple[int, int, int, int],
        num_classes: int,
        in_channels: int,
        image_size: int,
        norm: Norm,
        stem: Stem,
    ) -> None:
        super().__init__()
        kind = choose_stem(name, stem, image_size)
        self.input = InputSize(in_channels, SMALLEST[kind])
        self.embed_dim = 512 * block.expansion
        if kind == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = norm_layer(norm, 64)
        self.relu = nn.ReLU()
        grown = block.expansion
        self.layer1 = stage(block, 64, 64, depths[0], 1, norm)
        self.layer2 = stage(block, 64 * grown, 128, depths[1], 2, norm)
        self.layer3 = stage(block, 128 * grown, 256, depths[2], 2, norm)
        self.layer4 = stage(block, 256 * grown, 512, depths[3], 2, norm)
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


def stage(block: Block, before: int, width: int, depth: int, stride: int, norm: Norm) -> nn.Sequential:
    """A row of blocks; the first one changes width and side."""
    after = block.expansion * width
    return nn.Sequential(block(before, width, stride, norm), *(block(after, width, 1, norm) for _ in range(depth - 1)))


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
    return ResNet("resnet18", BasicBlock, (2, 2, 2, 2), num_classes, in_channels, image_size, norm, stem)


def resnet50(num_classes: int, in_channels: int, image_size: int, norm: Norm = "group", stem: Stem = "auto") -> ResNet:
    """ResNet-50 (23.5M parameters); `stem=small` below 64 pixels.

    Source: He et al. 2016, "Deep residual learning for image recognition", table 1; stride on the 3x3 convolution.
    """
    return ResNet("resnet50", Bottleneck, (3, 4, 6, 3), num_classes, in_channels, image_size, norm, stem)
