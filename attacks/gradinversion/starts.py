"""Where does an optimisation begin?"""

from __future__ import annotations

import torch
from torch import Tensor

from .observation import Observation

PRIOR_SPREAD = 0.3
"""Spread of a batch's start in prior units: images must not start equal, or they never separate."""


def noise_start(observation: Observation, generator: torch.Generator, restarts: int) -> Tensor:
    """(R, B, C, H, W): independent Gaussian pixels with the level and spread of public images.

    Unlike images that start equal, these separate: at B > 1 equal starts receive equal gradients for ever.
    """
    prior = observation.prior
    draw = torch.randn(restarts, observation.batch, *observation.image_shape, generator=generator)
    return prior.level + prior.spread * draw.to(prior.mean)


def prior_start(observation: Observation, generator: torch.Generator) -> Tensor:
    """(B, C, H, W): the public mean for one image; for a batch, draws about it that are 0.3 of the prior wide."""
    prior = observation.prior
    rank = min(64, prior.rank)
    if observation.batch == 1 or rank == 0:
        return prior.mean[None].clone() if observation.batch == 1 else noise_start(observation, generator, 1)[0]
    draw = torch.randn(observation.batch, rank, generator=generator).to(prior.mean)
    return prior.synthesise(PRIOR_SPREAD * draw * prior.variance[:rank].sqrt())


def check_distinct(start: Tensor, spread: float) -> None:
    """Refuse a batch (B, C, H, W) in which two images start closer than 0.1 of the public spread.

    Raises:
        ValueError: names the pair.
    """
    flat = start.flatten(1)
    distance = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    distance.fill_diagonal_(torch.inf)
    if len(start) > 1 and float(distance.min()) < 0.1 * spread:
        first, second = divmod(int(distance.argmin()), len(start))
        raise ValueError(f"images {first} and {second} start equal and can never separate: start them apart")
