"""Which label counts fit an update of several local steps? The client's training is rehearsed on public images.

Over several steps the predictions do not go straight from those of the broadcast model to those of the model after it:
a large rate overshoots, and a moment taken between the two ends is then wrong and sure of itself. So for each vector of
counts, public images with these labels are trained on as the client trains, in random orders, and the gradient of the
head's bias is compared with what came out: a synthetic likelihood (Wood 2010), with Student's t for the few rehearsals.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import vmap

from .local_training import copies, epochs
from .observation import Observation

IMAGE_GRADIENTS = 20_000
"""Image gradients that all rehearsals together may take: about half a second for a small network."""
FEWEST, MOST = 12, 48
"""Rehearsals of each vector of counts."""
AT_ONCE = 2_000_000
"""Gradient entries of rehearsals that are held at once."""


def rehearsals(observation: Observation, vectors: int) -> int:
    """How many of each of so many vectors of counts are affordable; 0 where they would be too few."""
    each = IMAGE_GRADIENTS // max(1, vectors * observation.simulation.steps * _size(observation))
    return 0 if each < FEWEST else min(MOST, each)


@torch.no_grad()
def log_likelihoods(
    observation: Observation, bias: str, vectors: list[list[int]], count: int, generator: torch.Generator
) -> list[float]:
    """Log density of the observed bias gradient under each vector of class counts, up to a common constant.

    Args:
        observation: of several local steps.
        bias: the head's.
        vectors: counts (C,) that sum to B.
        count: rehearsals of each.
        generator: draws images and orders.
    """
    g, noise = observation.gradients[bias].double()[:-1], float(observation.stds[bias].max())
    samples = torch.stack([_rehearse(observation, bias, counts, count, generator)[:, :-1] for counts in vectors])
    pooled = torch.stack([_scatter(rows) for rows in samples]).mean(0)
    return [_log_student(g, rows, pooled, noise) for rows in samples]


def _size(observation: Observation) -> int:
    return min(observation.simulation.batch_size or observation.batch, observation.batch)


def _rehearse(observation: Observation, bias: str, counts: list[int], count: int, generator: torch.Generator) -> Tensor:
    """Bias gradients (count, C) of rehearsals with these class counts, in orders drawn anew for each epoch."""
    prior, size, steps = observation.prior, _size(observation), observation.simulation.steps
    simulation = replace(observation.simulation, order=copies(observation.batch, size, steps))
    labels = torch.tensor([c for c, n in enumerate(counts) for _ in range(n)])
    pools = [(prior.labels.cpu().long() == c).nonzero()[:, 0] for c in range(len(counts))]
    pools = [pool if len(pool) else torch.arange(len(prior.images)) for pool in pools]
    rows, targets = [], []
    for _ in range(count):
        picked = [pools[c][torch.randint(len(pools[c]), (1,), generator=generator)] for c in labels.tolist()]
        chosen = torch.cat(picked)
        orders = [torch.randperm(len(labels), generator=generator) for _ in range(epochs(len(labels), size, steps))]
        rows.append(torch.cat([chosen[order] for order in orders]))
        targets.append(torch.cat([labels[order] for order in orders]))
    position = simulation.names.index(bias)
    x, y = prior.images[torch.stack(rows).to(prior.images.device)], torch.stack(targets).to(prior.images.device)
    walk = vmap(lambda a, b: simulation.parts(a, b)[position], chunk_size=max(1, AT_ONCE // simulation.size))
    found: Tensor = walk(x, y).double()
    return found


def _scatter(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(0)
    return centred.T @ centred / (len(rows) - 1)


def _log_student(g: Tensor, rows: Tensor, pooled: Tensor, noise: float) -> float:
    """Log density of g (D,) under Student's t from these rows (R, D), their scatter shrunk to the pooled one."""
    draws, width = rows.shape
    own = (draws * _scatter(rows) + (width + 1) * pooled) / (draws + width + 1)
    floor = noise**2 + 1e-12 + 1e-6 * float(pooled.diagonal().mean())
    scale = (1 + 1 / draws) * own + floor * torch.eye(width, dtype=own.dtype, device=own.device)
    factor = torch.linalg.cholesky(scale)
    white = torch.linalg.solve_triangular(factor, (g - rows.mean(0))[:, None], upper=False)
    free = draws - 1
    value = -factor.diagonal().log().sum() - (free + width) / 2 * torch.log1p((white**2).sum() / free)
    return float(value) if math.isfinite(float(value)) else -math.inf
