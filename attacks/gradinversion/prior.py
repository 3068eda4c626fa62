"""What X-rays look like to anybody: a Gaussian fitted to public images.

N(μ, C) with C = V·Λ·Vᵀ + τ·I from the principal components of the public images. It regularises a reconstruction from
a noisy update, breaks ties between candidates, and is the answer when the update says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fedsec.findings import PublicData

FLOOR = 1e-3
"""τ as a share of the images' overall pixel variance."""


@dataclass(frozen=True)
class Prior:
    """A Gaussian over images with pixels in [0, 1]; d = C·H·W."""

    mean: Tensor
    """μ (C, H, W)."""
    basis: Tensor
    """V (d, K), orthonormal columns by falling variance."""
    variance: Tensor
    """Λ + τ (K,)."""
    floor: float
    """τ, the variance in every direction outside the basis."""
    level: float
    """Mean pixel."""
    spread: float
    """Standard deviation of all pixels about their level."""
    images: Tensor
    """Some of the public images, (N, C, H, W)."""
    labels: Tensor
    name: str = "none"

    @property
    def rank(self) -> int:
        """K."""
        return self.basis.shape[1]

    def energy(self, images: Tensor) -> Tensor:
        """(x − μ)ᵀC⁻¹(x − μ) of each image, (B,)."""
        deviation = (images - self.mean).flatten(1)
        inside = deviation @ self.basis
        outside = (deviation**2).sum(1) - (inside**2).sum(1)
        return (inside**2 / self.variance).sum(1) + outside.clamp(min=0) / self.floor

    def synthesise(self, coordinates: Tensor) -> Tensor:
        """μ + V·z for coordinates z (B, k ≤ K): images (B, C, H, W)."""
        offset = coordinates @ self.basis[:, : coordinates.shape[1]].T
        return self.mean + offset.view(-1, *self.mean.shape)

    def coordinates(self, images: Tensor, rank: int) -> Tensor:
        """z = Vᵀ(x − μ) of images (B, C, H, W), the first `rank` of them."""
        return (images - self.mean).flatten(1) @ self.basis[:, :rank]

    def to(self, device: torch.device) -> Prior:
        """The same on another device."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.type == "Tensor"}
        return replace(self, **tensors)


def widen(coordinates: Tensor, rank: int) -> Tensor:
    """Coordinates (B, k) with zeros up to `rank`."""
    missing = max(0, rank - coordinates.shape[1])
    return torch.cat([coordinates, coordinates.new_zeros(len(coordinates), missing)], 1)


def fit_prior(public: PublicData, max_rank: int = 1024, max_images: int = 2000) -> Prior:
    """Fit the Gaussian to at most `max_images` public images, keeping at most `max_rank` components.

    The basis is complete (K = d) where d ≤ `max_rank`. With a single public image, or none, the variance is that of
    a uniform pixel and the mean is grey.
    """
    images = public.images[:max_images].float()
    shape = images.shape[1:]
    d = int(torch.tensor(shape).prod())
    flat = images.flatten(1).double()
    mean = flat.mean(0)
    total = float((flat - mean).pow(2).mean()) if len(flat) > 1 else 1 / 12
    floor = FLOOR * max(total, 1e-6)
    spread = max(float(flat.std(correction=0)), 1e-3) if len(flat) > 1 else 12**-0.5
    if d <= max_rank:
        values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / max(1, len(flat) - 1))
        order = values.argsort(descending=True)
        values, vectors = values[order], vectors[:, order]
    else:
        _, singular, rows = torch.linalg.svd(flat - mean, full_matrices=False)
        kept = min(len(flat) - 1, max_rank)
        values, vectors = (singular**2 / max(1, len(flat) - 1))[:kept], rows[:kept].T
    return Prior(
        mean=mean.float().view(shape),
        basis=vectors.float().contiguous(),
        variance=(values.clamp(min=0) + floor).float(),
        floor=floor,
        level=float(mean.mean()),
        spread=spread,
        images=images,
        labels=public.labels[:max_images],
        name=public.name,
    )
