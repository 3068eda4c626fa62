"""Where does an optimisation begin?"""

from __future__ import annotations

import torch
from torch import Tensor

from .observation import Observation


def noise_start(observation: Observation, generator: torch.Generator, restarts: int) -> Tensor:
    """(R, B, C, H, W): independent Gaussian pixels with the level and spread of public images.

    Unlike images that start equal, these separate: at B > 1 equal starts receive equal gradients for ever.
    """
    prior = observation.prior
    draw = torch.randn(restarts, observation.batch, *observation.image_shape, generator=generator)
    return prior.level + prior.spread * draw.to(prior.mean)


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
