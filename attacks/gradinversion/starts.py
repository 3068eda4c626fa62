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
    """(B, C, H, W): the public mean for one image; for a batch, draws about it that are 0.3 of the prior wide.

    Where two of them are nearly equal (they are many, or public images are much alike) the draws are as wide as the
    prior; and where that is not enough, noise, whose images never are equal.
    """
    prior = observation.prior
    rank = min(64, prior.rank)
    if observation.batch == 1 or rank == 0:
        return prior.mean[None].clone() if observation.batch == 1 else noise_start(observation, generator, 1)[0]
    draw = torch.randn(observation.batch, rank, generator=generator).to(prior.mean)
    for width in (PRIOR_SPREAD, 1.0):
        start = prior.synthesise(width * draw * prior.variance[:rank].sqrt())
        if equal_pair(start, prior.spread) is None:
            return start
    return noise_start(observation, generator, 1)[0]


def public_mixtures(shares: Tensor, target: Tensor, batch: int, generator: torch.Generator, tries: int) -> list[Tensor]:
    """Which B public images would together have caused an update most like the observed one?

    From random choices, one image after the other is exchanged for the best one until none is better.

    Args:
        shares: (N, P) what each public image would add to the update.
        target: (P,) the update.
        batch: B.
        generator: draws the first choices.
        tries: first choices.

    Returns:
        different local optima, the nearest first: rows of `shares`, (B,) each.
    """
    products, wanted = shares @ shares.T, shares @ target
    found: dict[tuple[int, ...], float] = {}
    for _ in range(tries):
        chosen = torch.randperm(len(shares), generator=generator)[:batch].tolist()
        for _ in range(4 * batch):
            before = list(chosen)
            for i in range(batch):
                others = products[:, chosen[:i] + chosen[i + 1 :]].sum(1)
                cost = products.diagonal() - 2 * wanted + 2 * others
                cost[chosen[:i] + chosen[i + 1 :]] = torch.inf  # images that start equal never separate
                chosen[i] = int(cost.argmin())
            if chosen == before:
                break
        rows = sorted(chosen)
        found[tuple(rows)] = float(products[rows][:, rows].sum() - 2 * wanted[rows].sum())
    return [torch.tensor(rows) for rows in sorted(found, key=lambda rows: found[rows])]


def equal_pair(start: Tensor, spread: float) -> tuple[int, int] | None:
    """Two images of a batch (B, C, H, W) that are closer than 0.1 of the public spread (root mean square)."""
    flat = start.flatten(1)
    distance = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    distance.fill_diagonal_(torch.inf)
    if len(start) < 2 or float(distance.min()) >= 0.1 * spread:
        return None
    return divmod(int(distance.argmin()), len(start))


def check_distinct(start: Tensor, spread: float) -> None:
    """Refuse a batch (B, C, H, W) with an `equal_pair`.

    Raises:
        ValueError: names the pair.
    """
    pair = equal_pair(start, spread)
    if pair is not None:
        first, second = pair
        raise ValueError(f"images {first} and {second} start equal and can never separate: start them apart")
