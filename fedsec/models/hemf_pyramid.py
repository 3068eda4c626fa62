"""The two pyramids of HEMF: local features by convolutions, global ones by decayed attention along rows and columns."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = 8
EPS = 1e-6


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel of (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ELF(nn.Module):
    """Local features: x + GELU(1x1(depthwise 3x3(norm(3x3 x)))). 10d² + 14d parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = ChannelNorm(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.pointwise = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, d, H, W)."""
        return x + F.gelu(self.pointwise(self.depthwise(self.norm(self.conv(x)))))


class DecayedAttention(nn.Module):
    """Attention along rows, then along columns; weights decay with the distance in pixels, faster in some heads.

    Source: Fan et al. 2024 (RMT), "RMT: retentive networks meet vision transformers", section 3.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.local = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d)."""
        height, depth = x.shape[1], x.shape[-1] // HEADS
        q, k, v = (
            t(x).unflatten(-1, (HEADS, depth)).permute(0, 3, 1, 2, 4) for t in (self.query, self.key, self.value)
        )
        q, k = rotated(q), rotated(k * depth**-0.5)
        bias = decay(height, x)
        v = attend(q, k, v, bias)
        q, k, v = (t.transpose(2, 3) for t in (q, k, v))
        v = attend(q, k, v, bias).transpose(2, 3)
        local = self.local(self.value(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.out(v.permute(0, 2, 3, 1, 4).flatten(3) + local)  # type: ignore[no-any-return]


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(q kᵀ + M) v along the last but one axis of (B, heads, lines, length, D); M is (heads, length, length)."""
    return torch.softmax(query @ key.transpose(-1, -2) + bias[:, None], dim=-1) @ value


def decay(side: int, like: Tensor) -> Tensor:
    """M (8, side, side): |i − j| ln γ with γ = 1 − 2^(−1 − 3n/8) for head n."""
    place = torch.arange(side, dtype=like.dtype, device=like.device)
    rates = torch.tensor([math.log(1 - 2 ** (-1 - 3 * n / HEADS)) for n in range(HEADS)], dtype=like.dtype)
    return (place[:, None] - place).abs() * rates.to(like.device)[:, None, None]


def rotated(x: Tensor) -> Tensor:
    """Neighbouring components of (B, heads, H, W, D) turned by ω_i · (h W + w), the index of the pixel."""
    height, width, depth = x.shape[2:]
    pairs = torch.arange(depth // 2, dtype=x.dtype, device=x.device)
    frequencies = 10000 ** (-pairs / max(1, depth // 2 - 1))
    pixel = torch.arange(height * width, dtype=x.dtype, device=x.device).view(height, width, 1)
    cos, sin = (pixel * frequencies).cos(), (pixel * frequencies).sin()
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


class EGF(nn.Module):
    """Global features: layers of attention and a linear map, each with a residual sum and a normalisation.

    The two normalisations are shared by all layers. n(5d² + 31d) + 4d parameters for n layers.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.attention = nn.ModuleList(DecayedAttention(width) for _ in range(layers))
        self.feed = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, d, H, W)."""
        x = x.permute(0, 2, 3, 1)
        for attention, feed in zip(self.attention, self.feed, strict=True):
            x = self.norm1(x + attention(x))
            x = self.norm2(x + feed(x))
        return x.permute(0, 3, 1, 2)


class Pyramid(nn.Module):
    """Four stages at a quarter, an eighth, a sixteenth and a thirty-second of the side."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], stages: list[nn.Module]) -> None:
        super().__init__()
        first = nn.Sequential(nn.Conv2d(in_channels, widths[0], 4, stride=4), ChannelNorm(widths[0]))
        halves = [
            nn.Sequential(ChannelNorm(before), nn.Conv2d(before, after, 2, stride=2))
            for before, after in itertools.pairwise(widths)
        ]
        self.down = nn.ModuleList([first, *halves])
        self.stages = nn.ModuleList(stages)
        self.apply(start)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The output of every stage."""
        outputs = []
        for down, stage in zip(self.down, self.stages, strict=True):
            x = stage(down(x))
            outputs.append(x)
        return outputs


def start(module: nn.Module) -> None:
    """The released initialisation: truncated normal weights, 0.02 for linear layers and 0.2 for convolutions."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02 if isinstance(module, nn.Linear) else 0.2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
