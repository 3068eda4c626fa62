"""How many images of each class are in a batch? The posterior of the counts, given the head's bias gradient.

Σ_i (p_i − e_{y_i}) is observed; with the moments of an image's part by class, the counts n have a Gaussian likelihood
of mean Σ_c n_c·m_c and covariance Σ_c n_c·C_c, and a multinomial prior. All in float64.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

COVERAGE = 0.95
MOST = 3000
"""Count vectors that a search looks at."""
NEGLIGIBLE = 9.0
"""Log odds below the best vector from which neighbours are not opened."""


@dataclass(frozen=True)
class Moments:
    """Mean (C, C−1) and covariance (C, C−1, C−1) of an image's contribution by its class; the last entry follows."""

    mean: Tensor
    covariance: Tensor
    spread: float = 0.0
    """Variance of an image's share in the total about its mean of 1, over the orders of a local training."""


def log_posterior(counts: list[int], total: Tensor, moments: Moments, noise: float, rates: Tensor) -> float:
    """Gaussian likelihood of Σ_i (p_i − e_{y_i}) = `total` (C−1,) with a multinomial prior on the counts."""
    n = torch.tensor(counts, dtype=torch.float64, device=total.device)
    mean = n @ moments.mean
    covariance = (1 + moments.spread) * torch.einsum("c,cij->ij", n, moments.covariance)
    if moments.spread and n.sum() > 1:  # shares are dealt out at random, and sum to the number of images
        between = moments.mean.T @ (n[:, None] * moments.mean) - torch.outer(mean, mean) / n.sum()
        covariance = covariance + moments.spread * n.sum() / (n.sum() - 1) * between
    covariance = covariance + (noise**2 + 1e-8 + 1e-6 * float(covariance.diagonal().mean())) * torch.eye(
        len(total), dtype=torch.float64, device=total.device
    )
    factor = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, (total - mean)[:, None], upper=False)
    likelihood = float(-0.5 * (white**2).sum() - factor.diagonal().log().sum())
    return likelihood + log_prior(counts, rates)


def log_prior(counts: list[int], rates: Tensor) -> float:
    """Multinomial, up to a constant."""
    n = torch.tensor(counts, dtype=torch.float64, device=rates.device)
    return float((n * (rates / rates.sum()).log()).sum() - torch.lgamma(n + 1).sum())


def credible_counts(
    total: Tensor, batch: int, moments: Moments, noise: float, rates: Tensor
) -> list[tuple[float, list[int]]]:
    """(probability, counts) by falling probability until 95 % are covered.

    Two classes: all B + 1 counts. More: the vectors around the best one that a search meets, best first, until those
    left over are too improbable to matter or `MOST` have been seen.
    """
    classes = len(rates)

    def score(counts: tuple[int, ...]) -> float:
        return log_posterior(list(counts), total, moments, noise, rates)

    if classes == 2 or batch == 1:
        visited = {c: score(c) for c in all_counts(classes, batch)}
    else:
        full = torch.cat([total, -total.sum()[None]])
        start = tuple(largest_remainder(expected_sum(moments, batch, rates) - full, batch))
        visited = _search(start, score)
    return credible(visited)


def credible(scores: Mapping[tuple[int, ...], float]) -> list[tuple[float, list[int]]]:
    """Log posteriors, up to a constant, of count vectors -> (probability, counts) until 95 % are covered."""
    top = max(scores.values())
    mass = {c: math.exp(s - top) for c, s in scores.items()}
    norm = sum(mass.values())
    chosen: list[tuple[float, list[int]]] = []
    for counts in sorted(mass, key=lambda c: -mass[c]):
        chosen.append((mass[counts] / norm, list(counts)))
        if sum(p for p, _ in chosen) >= COVERAGE:
            break
    return chosen


def _search(start: tuple[int, ...], score: Callable[[tuple[int, ...]], float]) -> dict[tuple[int, ...], float]:
    """Scores of the vectors around the maximum: always the best one met so far is opened next."""
    visited = {start: score(start)}
    best, queue = visited[start], [(-visited[start], start)]
    while queue and len(visited) < MOST:
        value, current = heapq.heappop(queue)
        if -value < best - NEGLIGIBLE:
            break
        for counts in _neighbours(current):
            if counts not in visited:
                visited[counts] = score(counts)
                best = max(best, visited[counts])
                heapq.heappush(queue, (-visited[counts], counts))
    return visited


def expected_sum(moments: Moments, batch: int, rates: Tensor) -> Tensor:
    """Σ_i p_ic, as expected of a batch with the public class mix; (C,)."""
    classes = len(rates)
    share = rates / rates.sum()
    p = moments.mean + torch.eye(classes, dtype=torch.float64, device=rates.device)[:, :-1]
    inner = share @ p
    return batch * torch.cat([inner, (1 - inner.sum())[None]])


def all_counts(classes: int, batch: int) -> Iterator[tuple[int, ...]]:
    """Every count vector of two classes, or of one image."""
    if classes == 2:
        yield from ((k, batch - k) for k in range(batch + 1))
    else:
        yield from (tuple(int(c == k) for c in range(classes)) for k in range(classes))


def _neighbours(counts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for a, b in itertools.permutations(range(len(counts)), 2):
        if counts[a] > 0:
            moved = list(counts)
            moved[a] -= 1
            moved[b] += 1
            yield tuple(moved)


def expand(counts: list[int], device: torch.device) -> Tensor:
    """(2, 0, 1) -> (0, 0, 2): labels with these counts; their order carries no meaning."""
    return torch.tensor([c for c, n in enumerate(counts) for _ in range(n)], device=device)


def largest_remainder(shares: Tensor, total: int) -> list[int]:
    """Non-negative integers near `shares` that sum to `total`."""
    shares = shares.double().clamp(min=0)
    if float(shares.sum()) < 1e-12:
        shares = torch.ones_like(shares)
    shares = shares * (total / shares.sum())
    counts = shares.floor()
    order = (shares - counts).argsort(descending=True)
    counts[order[: total - int(counts.sum())]] += 1
    return [int(n) for n in counts]
