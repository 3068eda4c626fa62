"""The fusion block of HEMF: local, global and earlier fused features, weighed by three kinds of attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.models.base import Norm, norm_layer
from fedsec.models.hemf_pyramid import HEADS, ChannelNorm

SLOTS = 64
REDUCTION = 16


class ExternalAttention(nn.Module):
    """Tokens read from 64 memory slots that all heads share (Guo et al. 2021, with the heads of HEMF)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.key = nn.Linear(width // HEADS, SLOTS, bias=False)
        self.value = nn.Linear(SLOTS, width // HEADS, bias=False)
        nn.init.normal_(self.key.weight, std=1e-3)
        nn.init.normal_(self.value.weight, std=1e-3)

    def weights(self, x: Tensor) -> Tensor:
        """(B, heads, tokens, slots): a softmax over the tokens, then shares of the slots, which sum to 1."""
        tokens = x.unflatten(1, (HEADS, -1)).flatten(3).transpose(2, 3)
        over_tokens = torch.softmax(self.key(tokens), dim=2)
        return over_tokens / over_tokens.sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, d, H, W)."""
        read = self.value(self.weights(x)).transpose(2, 3)
        return read.reshape(x.shape)  # type: ignore[no-any-return]


class SpatialAttention(nn.Module):
    """A weight for every pixel, from mean and maximum of its channels (Woo et al. 2018, equation 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W)."""
        return torch.sigmoid(self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)))


class ChannelAttention(nn.Module):
    """A weight for every channel, from its mean and its maximum (Woo et al. 2018, equation 4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, width // REDUCTION, 1, bias=False)
        self.expand = nn.Conv2d(width // REDUCTION, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, d, 1, 1)."""
        pooled = (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
        mean, largest = (self.expand(F.relu(self.squeeze(p))) for p in pooled)
        return torch.sigmoid(mean + largest)


class Weighing(nn.Module):
    """The three attentions one after the other, each as a factor; the normalisation is applied twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.external = ExternalAttention(width)
        self.spatial = SpatialAttention()
        self.channel = ChannelAttention(width)

    def forward(self, z: Tensor) -> Tensor:
        """(B, d, H, W)."""
        z = self.norm(z)
        z = self.norm(z * self.external(z))
        z = z * self.spatial(z)
        return z * self.channel(z)  # type: ignore[no-any-return]


class SIRMLP(nn.Module):
    """Residual inverted bottleneck from 3d to d channels. 20d² + 7d parameters."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.reduce, self.norm1 = nn.Conv2d(3 * width, width, 1), norm_layer(norm, width)
        self.conv, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm_layer(norm, width)
        self.widen = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.narrow, self.norm3 = nn.Conv2d(4 * width, width, 1, bias=False), norm_layer(norm, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3d, H, W) -> (B, d, H, W)."""
        s = self.norm1(self.reduce(x))
        u = self.norm2(F.gelu(self.conv(s)) + s)
        return self.norm3(self.narrow(F.gelu(self.widen(u))))  # type: ignore[no-any-return]


def mixer(parts: int, width: int, norm: Norm) -> nn.ModuleDict:
    """What makes one feature map of several concatenated ones."""
    return nn.ModuleDict(
        {
            "norm": ChannelNorm(parts * width),
            "conv": nn.Conv2d(parts * width, width, 1),
            "after": norm_layer(norm, width),
        }
    )


class Fusion(nn.Module):
    """One fusion block. 27.75d² + 74d + 196 parameters with both ways to begin, of which a block uses one.

    Args:
        width: d. first: it has no fused features in front of it.
        prune: leave the way out that it does not use; else its parameters are kept as they are, without gradient.
    """

    def __init__(self, width: int, first: bool, norm: Norm, prune: bool) -> None:
        super().__init__()
        self.first = first
        self.local = nn.Sequential(nn.Conv2d(width, width, 1), norm_layer(norm, width))
        self.other = nn.Sequential(nn.Conv2d(width, width, 1), norm_layer(norm, width))
        if not (first and prune):
            self.before = nn.Sequential(nn.Conv2d(width // 2, width, 1), norm_layer(norm, width))
            self.mix3 = mixer(3, width, norm)
        if first or not prune:
            self.mix2 = mixer(2, width, norm)
        self.weigh_local, self.weigh_other = Weighing(width), Weighing(width)
        self.norm = ChannelNorm(3 * width)
        self.mlp = SIRMLP(width, norm)
        for module in self.unused():
            module.requires_grad_(False)

    def unused(self) -> list[nn.Module]:
        """Layers without a path to the loss."""
        names = ("before", "mix3") if self.first else ("mix2",)
        return [getattr(self, name) for name in names if hasattr(self, name)]

    def forward(self, local: Tensor, other: Tensor, fused: Tensor | None) -> Tensor:
        """(B, d, H, W) of local and global features of that shape and fused ones (B, d/2, 2H, 2W)."""
        near, far = self.local(local), self.other(other)
        if self.first or fused is None:
            short: Tensor | float = 0.0
            parts, mix = [near, far], self.mix2
        else:
            short = F.avg_pool2d(F.relu(self.before(fused)), 2)
            parts, mix = [short, near, far], self.mix3
        mixed = F.gelu(mix["after"](mix["conv"](mix["norm"](torch.cat(parts, dim=1)))))
        weighed = [self.weigh_other(far), self.weigh_local(near), mixed]
        return short + self.mlp(self.norm(torch.cat(weighed, dim=1)))  # type: ignore[no-any-return]
