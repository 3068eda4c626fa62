"""A small generative prior for model inversion: a variational autoencoder of public images.

What it can draw looks like an image of this kind, so that an attack which searches its latent space returns a plausible
image rather than adversarial noise; that it looks like a patient proves nothing about the training data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 32
"""Largest side of the images that the prior draws; larger ones are scaled up."""


class Prior(nn.Module):
    """A variational autoencoder (Kingma & Welling 2014) on flattened pixels.

    Args:
        shape: (C, H, W) of the images. latent: numbers that describe one.
    """

    def __init__(self, shape: tuple[int, int, int], latent: int = 16, hidden: int = 256) -> None:
        super().__init__()
        self.shape = shape
        self.small = (shape[0], min(shape[1], SIDE), min(shape[2], SIDE))
        size = self.small[0] * self.small[1] * self.small[2]
        self.encoder = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, size), nn.Sigmoid())
        self.latent = latent

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, H, W) images in [0, 1] of latent vectors (B, latent)."""
        return self.resized(self.decoder(z).view(-1, *self.small))

    def resized(self, small: Tensor) -> Tensor:
        """Images of the prior's own size as images of the wanted one."""
        whole: Tensor = F.interpolate(small, self.shape[1:], mode="bilinear", align_corners=False)
        return small if self.small == self.shape else whole

    def loss(self, x: Tensor, noise: Tensor) -> Tensor:
        """Negative evidence bound per image (Gaussian pixels of standard deviation 0.1), averaged.

        Args:
            x: (B, C, h, w) of the prior's own size. noise: (B, latent) standard normal.
        """
        flat = x.flatten(1)
        mean, log_variance = self.encoder(flat).chunk(2, 1)
        drawn = self.decoder(mean + noise * (log_variance / 2).exp())
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        bound: Tensor = (drawn - flat).square().sum(1) / 0.02 + divergence
        return bound.mean()


def trained(images: Tensor, generator: torch.Generator, epochs: int, batch: int = 64) -> Prior:
    """A prior of these public images (N, C, H, W).

    Args:
        generator: of everything random, initial weights too.
    """
    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        prior = Prior(shape)
    small = F.adaptive_avg_pool2d(images, prior.small[1:])
    optimiser = torch.optim.Adam(prior.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(small), generator=generator).split(batch):
            noise = torch.randn(len(rows), prior.latent, generator=generator)
            optimiser.zero_grad(set_to_none=True)
            prior.loss(small[rows], noise).backward()
            optimiser.step()
    return prior.requires_grad_(False)
