"""In what order does a client walk through its images? The server does not know, and must try or reconstruct it.

An order gives the image numbers of each local step. With one epoch an order is a choice of names, since images come in
no order, except that images of different classes cannot trade places. With more epochs it is unknown how the later
ones shuffle the images of the first: few images leave few different orders, which can all be tried; for many, every
epoch gets copies of its own, which are matched afterwards.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import islice

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Order = tuple[tuple[int, ...], ...]
"""The image numbers of each local step."""


def batches_per_epoch(images: int, size: int) -> int:
    """⌈N/b⌉: the last batch may be short."""
    return -(-images // size)


def epochs(images: int, size: int, steps: int) -> int:
    """Epochs that so many steps take, the last one perhaps unfinished."""
    return -(-steps // batches_per_epoch(images, size))


def fixed_order(images: int, size: int, steps: int) -> Order:
    """Every epoch in the order of the numbers."""
    parts = _parts(range(images), size)
    return tuple(parts[t % len(parts)] for t in range(steps))


def copies(images: int, size: int, steps: int) -> Order:
    """The same with images of its own for each epoch: epoch e walks through numbers e·N to (e + 1)·N − 1."""
    chunks = batches_per_epoch(images, size)
    return tuple(
        tuple(t // chunks * images + i for i in part) for t, part in enumerate(fixed_order(images, size, steps))
    )


def distinct_orders(kinds: Sequence[Hashable], size: int, steps: int, limit: int) -> list[Order] | None:
    """Every order that differs by more than a renaming of images of one kind; None where there are more than `limit`.

    Args:
        kinds: what is known of each image, such as its label; with a kind of its own for each, no two orders are equal.
        size: images in a local step. steps: local steps.
        limit: orders at most.

    Two orders are the same if a permutation of images within kinds turns one into the other, so each is a table of how
    many images of a kind are in which batch of the first epoch, of these in which batch of the second, and so on.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(number)
    walks = _walks([tuple(g) for g in groups.values()], len(kinds), size, epochs(len(kinds), size, steps))
    found = [tuple(part for epoch in walk for part in epoch)[:steps] for walk in islice(walks, limit + 1)]
    return None if len(found) > limit else sorted(set(found))


def matched_order(images: Tensor, count: int, size: int, steps: int) -> tuple[Tensor, Order]:
    """Images that were optimised as `copies`, matched across epochs.

    Args:
        images: (E·N, C, H, W). count: N.

    Returns:
        (N, C, H, W), the mean of each image's copies; the order in which the epochs walk through them. Matched by least
        total squared difference to the first epoch (Kuhn 1955).
    """
    stacks = list(images.split(count))
    first = stacks[0].flatten(1)
    order, total = list(fixed_order(count, size, steps)), stacks[0].clone()
    chunks = batches_per_epoch(count, size)
    for e, stack in enumerate(stacks[1:], 1):
        cost = ((stack.flatten(1)[:, None] - first[None]) ** 2).mean(2)
        rows, columns = linear_sum_assignment(cost.detach().cpu().numpy())
        name = dict(zip(rows.tolist(), columns.tolist(), strict=True))
        total = total + stack[torch.tensor(rows[columns.argsort()], device=stack.device)]
        for t in range(e * chunks, min((e + 1) * chunks, steps)):
            order[t] = tuple(name[i] for i in order[t])
    return total / len(stacks), tuple(order)


def _parts(numbers: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(numbers[i : i + size]) for i in range(0, len(numbers), size)]


def _walks(
    groups: list[tuple[int, ...]], images: int, size: int, left: int
) -> Iterator[tuple[tuple[tuple[int, ...], ...], ...]]:
    """Epochs as tuples of batches; images of one group have been treated alike so far."""
    if left == 0:
        yield ()
        return
    capacities = tuple(len(part) for part in _parts(range(images), size))
    for split in _splits(groups, capacities):
        epoch = tuple(tuple(sorted(i for part in split for i in part[b])) for b in range(len(capacities)))
        finer = [part[b] for part in split for b in range(len(capacities)) if part[b]]
        for rest in _walks(finer, images, size, left - 1):
            yield (epoch, *rest)


def _splits(
    groups: list[tuple[int, ...]], capacities: tuple[int, ...]
) -> Iterator[tuple[tuple[tuple[int, ...], ...], ...]]:
    """Each group cut into one piece a batch, so that the batches are filled exactly."""
    if not groups:
        yield ()
        return
    for sizes in _compositions(len(groups[0]), capacities):
        left = tuple(c - n for c, n in zip(capacities, sizes, strict=True))
        pieces, at = [], 0
        for n in sizes:
            pieces.append(groups[0][at : at + n])
            at += n
        for rest in _splits(groups[1:], left):
            yield (tuple(pieces), *rest)


def _compositions(total: int, capacities: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Ways to write `total` as a sum of numbers from 0 to each capacity."""
    if not capacities:
        if total == 0:
            yield ()
        return
    for n in range(max(0, total - sum(capacities[1:])), min(total, capacities[0]) + 1):
        for rest in _compositions(total - n, capacities[1:]):
            yield (n, *rest)
