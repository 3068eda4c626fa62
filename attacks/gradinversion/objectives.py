"""How far is a simulated gradient from the observed one, and how rough is an image? For any number of channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def squared_error(simulated: Sequence[Tensor], observed: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Σ w·(φ − g)². Zhu, Liu and Han 2019 with w = 1."""
    difference = [a - b for a, b in zip(simulated, observed, strict=True)]
    return _dot([d * w for d, w in zip(difference, weights, strict=True)], difference)


def cosine_distance(simulated: Sequence[Tensor], observed: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """1 − ⟨φ, g⟩_w/(‖φ‖_w·‖g‖_w), in [0, 2]. Geiping et al. 2020, equation 4. Blind to scale."""
    weighted = [a * w for a, w in zip(simulated, weights, strict=True)]
    target = _dot([b * w for b, w in zip(observed, weights, strict=True)], observed)
    norm = (_dot(weighted, simulated) * target).clamp(min=1e-30).sqrt()
    return 1 - _dot(weighted, observed) / norm


def total_variation(images: Tensor) -> Tensor:
    """Mean |vertical difference| + mean |horizontal difference| over images (…, H, W). Rudin, Osher and Fatemi 1992."""
    return images.diff(dim=-2).abs().mean() + images.diff(dim=-1).abs().mean()


def best_scale(simulated: Tensor, observed: Tensor) -> float:
    """κ = ⟨φ, g⟩/⟨φ, φ⟩, the factor on φ that fits g best; negative: the update's sign is wrong."""
    return float((simulated.double() @ observed.double()) / (simulated.double() @ simulated.double()).clamp(min=1e-300))
