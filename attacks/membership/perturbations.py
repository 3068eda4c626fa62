"""The fixed small changes whose effect on a decision tells how firmly it was learned (label-only attack)."""

from __future__ import annotations

import torch
from torch import Tensor

COPIES = 32
NOISE = (0.02, 0.04, 0.06, 0.08, 0.1)
"""Standard deviations of the Gaussian noise, in units of the pixel range."""


def perturbed(images: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Copy `number` of 0 … 31 of images (B, C, H, W): shifted by up to 3 pixels, up to 20 % brighter, or noisy."""
    draw = torch.Generator().manual_seed(number)
    kind = number % 3
    if kind == 0:
        dx, dy = (int(v) for v in torch.randint(-3, 4, (2,), generator=draw))
        padded = torch.nn.functional.pad(images, (3, 3, 3, 3), mode="replicate")
        height, width = images.shape[-2:]
        return padded[..., 3 + dy : 3 + dy + height, 3 + dx : 3 + dx + width]
    if kind == 1:
        return (images * (0.8 + 0.4 * float(torch.rand((), generator=draw)))).clamp(0, 1)
    noise = torch.randn(images.shape, generator=generator)
    return (images + NOISE[(number // 3) % len(NOISE)] * noise).clamp(0, 1)
