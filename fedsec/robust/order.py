"""Order statistics across clients, coordinate by coordinate: what median and trimmed mean are made of.

Up to `NETWORK_LIMIT` rows a sorting network of element-wise minima and maxima works on blocks that stay in the cache;
every comparator that the wanted ranks do not depend on is left out. More rows are transposed block by block and sorted
along the short, contiguous axis. Sorting along the first axis of an (n, d) matrix, as is customary, is some ten times
slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

NETWORK_LIMIT = 32
BLOCK = 2**19
"""Floats of scratch in which a network works."""


class Comparator(NamedTuple):
    """Puts the smaller of two rows at `low` and the larger at `high`; `keeps` says which of them is still needed."""

    low: int
    high: int
    keeps: Literal["both", "low", "high"]


@cache
def network(count: int, ranks: tuple[int, ...]) -> tuple[Comparator, ...]:
    """Batcher's odd–even merge sort (1968) for any number of rows, pruned to what the wanted ranks need.

    Args:
        count: rows. ranks: positions in ascending order that must come out right, 0-based.
    """
    needed = set(ranks)
    kept: list[Comparator] = []
    for low, high in reversed(list(_odd_even_merge(count))):
        wanted = (low in needed, high in needed)
        if any(wanted):
            kept.append(Comparator(low, high, "both" if all(wanted) else "low" if wanted[0] else "high"))
            needed |= {low, high}
    return tuple(reversed(kept))


def _odd_even_merge(count: int) -> list[tuple[int, int]]:
    pairs = []
    span = 1
    while span < count:
        step = span
        while step >= 1:
            for start in range(step % span, count - step, 2 * step):
                stop = min(start + step, count - step)
                pairs += [(i, i + step) for i in range(start, stop) if i // (2 * span) == (i + step) // (2 * span)]
            step //= 2
        span *= 2
    return pairs


Blocks = Callable[[int, Tensor], None]
"""Fills a block (k, width) with the columns from a start on."""


def order_mean(fill: Blocks, count: int, length: int, ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """Mean over the wanted ranks of each coordinate.

    Args:
        fill: writes the rows' columns from a start on into a block (count, width).
        count: rows. length: coordinates d. ranks: 0-based positions in ascending order. No value may be NaN.
        device: of the result.

    Returns:
        (d,) float32.
    """
    out = torch.empty(length, dtype=torch.float32, device=device)
    width = min(length, max(2048, min(16_384, BLOCK // (count + 1))))
    scratch = torch.empty(count, width, dtype=torch.float32, device=device)
    spare = torch.empty(width, dtype=torch.float32, device=device)
    small = count <= NETWORK_LIMIT or device.type != "cpu"
    for start in range(0, length, width):
        stop = min(start + width, length)
        block, target = scratch[:, : stop - start], out[start:stop]
        fill(start, block)
        if small:
            _by_network(list(block), spare[: stop - start], ranks, target)
        else:
            ordered = np.sort(np.ascontiguousarray(block.numpy().T), axis=1)
            np.mean(ordered[:, ranks[0] : ranks[-1] + 1], axis=1, out=target.numpy())
    return out


def _by_network(rows: list[Tensor], spare: Tensor, ranks: tuple[int, ...], target: Tensor) -> None:
    for low, high, keeps in network(len(rows), ranks):
        a, b = rows[low], rows[high]
        if keeps == "low":
            torch.minimum(a, b, out=a)
        elif keeps == "high":
            torch.maximum(a, b, out=b)
        else:
            torch.minimum(a, b, out=spare)
            torch.maximum(a, b, out=b)
            rows[low], spare = spare, a
    target.copy_(rows[ranks[0]])
    for rank in ranks[1:]:
        target.add_(rows[rank])
    if len(ranks) > 1:
        target.div_(len(ranks))


def closest_mean(fill: Blocks, count: int, length: int, keep: int, device: torch.device) -> Tensor:
    """Mean of the `keep` values that lie closest to each coordinate's median: they are neighbours in sorted order.

    Args:
        fill, count, length, device: as for `order_mean`. keep: values, at least 1.
    """
    out = torch.empty(length, dtype=torch.float32, device=device)
    width = min(length, max(2048, min(16_384, BLOCK // (count + 1))))
    scratch = torch.empty(count, width, dtype=torch.float32, device=device)
    for start in range(0, length, width):
        stop = min(start + width, length)
        block = scratch[:, : stop - start]
        fill(start, block)
        ordered = torch.from_numpy(np.sort(np.ascontiguousarray(block.cpu().numpy().T), axis=1)).T
        centre = ordered[list(middle(count))].mean(0)
        sums = torch.cumsum(ordered.double(), 0)
        best, target = torch.full_like(centre, torch.inf), torch.empty_like(centre)
        for first in range(count - keep + 1):
            reach = torch.maximum(centre - ordered[first], ordered[first + keep - 1] - centre)
            total = sums[first + keep - 1] - (sums[first - 1] if first else 0)
            better = reach < best
            best = torch.where(better, reach, best)
            target = torch.where(better, (total / keep).float(), target)
        out[start:stop] = target.to(device)
    return out


def middle(count: int) -> tuple[int, ...]:
    """Ranks of the median: one, or two of which the mean is taken."""
    return (count // 2,) if count % 2 else (count // 2 - 1, count // 2)


def columns_of(rows: Sequence[Tensor], factors: Sequence[float]) -> Blocks:
    """Reads blocks off flat vectors, each scaled by its factor."""
    scaled = [(i, f) for i, f in enumerate(factors) if f != 1.0]

    def fill(start: int, block: Tensor) -> None:
        for i, row in enumerate(rows):
            block[i].copy_(row[start : start + block.shape[1]])
        for i, factor in scaled:
            block[i].mul_(factor)

    return fill
