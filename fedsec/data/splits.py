"""Which patients train, validate and test, where the source does not say or its own answer leaks."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedsec.data.base import Dataset, Texts
from fedsec.data.digest import PARTS, fingerprint, image_digests
from fedsec.data.report import with_contents
from fedsec.errors import ConfigError

Ints = npt.NDArray[np.int64]
SHARES = (0.7, 0.1, 0.2)
VALIDATED = (0.9, 0.0, 0.1)
NONE = -1
"""The class of a group without any positive label."""


def rarest_label(labels: npt.NDArray[Any]) -> Ints:
    """(N,) each image's class; multi-label: its positive label with the fewest images, -1 where it has none."""
    if labels.ndim == 1:
        return labels.astype(np.int64)
    positive = np.nan_to_num(labels) >= 0.5
    order = np.argsort(positive.sum(0), kind="stable")
    ranked = positive[:, order]
    return np.where(ranked.any(1), order[ranked.argmax(1)], NONE).astype(np.int64)


def group_classes(classes: Ints, group: Ints, num_groups: int) -> Ints:
    """(G,) for each group, the rarest class among its images; -1 loses against every class.

    Args:
        classes: (N,) of `rarest_label`.
        group: (N,) group number of each image, in 0 … G-1.
        num_groups: G.
    """
    values, sizes = np.unique(classes, return_counts=True)
    sizes = np.where(values == NONE, len(classes) + 1, sizes)
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.argsort(sizes, kind="stable")] = np.arange(len(values))
    best = np.full(num_groups, len(values), dtype=np.int64)
    np.minimum.at(best, group, rank[np.searchsorted(values, classes)])
    return values[np.argsort(rank)][best]


def derived_split(
    groups: Texts,
    labels: npt.NDArray[Any],
    sites: Texts | None = None,
    *,
    seed: int = 0,
    shares: tuple[float, float, float] = SHARES,
) -> Texts:
    """A split by group, a pure function of the seed, the group ids, their labels and sites; row order is irrelevant.

    A group's stratum is its site and its rarest class. Inside a stratum groups are ordered by a hash of (seed, id);
    the first go to train, the next to val, the rest to test, rounded by largest remainder over all strata, so that
    each part is within one group of its share. Then every class with three groups or more gets one in train and test.

    Args:
        groups: (N,) group ids.
        labels: (N,) classes or (N, L) labels.
        sites: (N,) or None.
        seed: changes which groups go where.
        shares: of train, val and test; their sum is 1.

    Returns:
        (N,) `train`, `val` or `test`.
    """
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"shares={shares}: train, val and test shares must be at least 0 and add up to 1")
    ids, group = np.unique(groups, return_inverse=True)
    classes = group_classes(rarest_label(labels), group, len(ids))
    site = np.zeros(len(ids), dtype=np.int64)
    if sites is not None:
        names, numbers = np.unique(sites, return_inverse=True)
        site[:] = len(names)
        np.minimum.at(site, group, numbers)
    order = np.array([_hash(seed, text) for text in ids.tolist()], dtype=np.uint64)
    _, stratum = np.unique(np.stack([site, classes], axis=1), axis=0, return_inverse=True)
    quota = _quotas(np.bincount(stratum), shares)
    part = np.empty(len(ids), dtype=np.int64)
    for s, takes in enumerate(quota):
        members = np.flatnonzero(stratum == s)
        part[members[np.argsort(order[members], kind="stable")]] = np.repeat(np.arange(3), takes)
    has = np.zeros((len(ids), _width(labels)), dtype=bool)
    if labels.ndim == 2:
        np.logical_or.at(has, group, np.nan_to_num(labels) >= 0.5)
    else:
        has[group, labels] = True
    _cover_classes(part, has, order)
    return np.array(PARTS)[part][group]


def complete_parts(
    split: Texts, groups: Texts, labels: npt.NDArray[Any], sites: npt.NDArray[Any] | None
) -> tuple[Texts, Literal["official", "derived"], str]:
    """The parts that a run needs, where the source gives none or not all three.

    Without any: 70/10/20 by group. Without a test part: the published validation part tests, since it is the one that
    its publisher held out. Then without a validation part: a tenth of the training groups validates.

    Returns:
        (N,) parts; whether they are the published ones; what was done, or empty text.
    """
    if not np.any(split != ""):
        return derived_split(groups, labels, sites), "derived", ""
    split, done = split.copy(), []
    if not np.any(split == "test") and np.any(split == "val"):
        split[split == "val"] = "test"
        done.append("the published validation part tests")
    train = split == "train"
    if not np.any(split == "val") and train.sum() > 1:
        part = derived_split(groups[train], labels[train], None if sites is None else sites[train], shares=VALIDATED)
        split[train] = np.where(part == "test", "val", "train")
        if np.any(part == "test"):
            done.append("a tenth of the training groups validates")
    if np.any(split == ""):
        done.append(f"{int((split == '').sum()):,} images are in no published part and stay out of all three")
    return split, "official", "; ".join(done)


def resplit(dataset: Dataset, how: Literal["derived", "safe"], seed: int = 0) -> Dataset:
    """The data set with new parts by group; `safe` also leaves out copies of an image of an earlier part.

    Args:
        dataset: any; its old parts are ignored.
        how: `derived` or `safe`.
        seed: of the split.
    """
    split = derived_split(dataset.groups(), dataset.labels, dataset.meta.get("site"), seed=seed)
    digests = image_digests(dataset.images)
    repeated = np.zeros(len(dataset), dtype=bool)
    for i, part in enumerate(PARTS if how == "safe" else ()):
        repeated |= (split == part) & np.isin(digests, digests[np.isin(split, PARTS[:i])])
    left_out = dict(dataset.report.left_out)
    if repeated.any():
        left_out["copies of an image of an earlier part (splits=safe)"] = int(repeated.sum())
    report = dataclasses.replace(
        dataset.report, left_out=left_out, policy={**dataset.report.policy, "splits": how, "split_seed": seed}
    )
    result = dataclasses.replace(
        dataset, split=split, split_origin="derived", fingerprint=fingerprint(dataset.fingerprint, how, seed)
    ).select(~repeated)
    report = with_contents(
        report,
        digests=digests[~repeated],
        labels=result.labels,
        class_names=result.class_names,
        split=result.split,
        groups=result.groups(),
        official=False,
    )
    return dataclasses.replace(result, report=report)


def _hash(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest(), "big")


def _quotas(sizes: Ints, shares: tuple[float, float, float]) -> Ints:
    """(S, 3) groups of each stratum for each part; columns and rows add up exactly."""
    ideal = sizes[:, None] * np.asarray(shares)
    takes: Ints = np.floor(ideal + 1e-9).astype(np.int64)
    total = sizes.sum() * np.asarray(shares)
    target = np.floor(total + 1e-9).astype(np.int64)
    target[np.argsort(target - total, kind="stable")[: sizes.sum() - target.sum()]] += 1
    left, deficit = sizes - takes.sum(1), target - takes.sum(0)
    by_remainder = np.argsort((takes - ideal).ravel(), kind="stable")
    while left.any():
        for s, p in zip(*np.unravel_index(by_remainder, ideal.shape), strict=True):
            if left[s] and deficit[p]:
                takes[s, p] += 1
                left[s] -= 1
                deficit[p] -= 1
    return takes


def _cover_classes(part: Ints, has: npt.NDArray[np.bool_], order: npt.NDArray[np.uint64]) -> None:
    """Swap groups in place until every class with three groups or more lies in train (0) and in test (2).

    Args:
        part: (G,) part of each group. has: (G, L) classes of each group. order: (G,) hash of each group.
    """
    count = np.stack([has[part == p].sum(0) for p in range(3)])

    def spare(candidates: npt.NDArray[np.bool_]) -> Ints:
        """Those that can leave their part without taking its last image of a class along."""
        safe = (part == 1) | (~has | (count[part] > 1)).all(1)
        return np.flatnonzero(candidates & safe)

    def move(g: int, to: int) -> None:
        count[part[g]] -= has[g]
        count[to] += has[g]
        part[g] = to

    for c in np.argsort(count.sum(0), kind="stable"):
        for p in (0, 2):
            if count[p, c] or count[:, c].sum() < 3:
                continue
            donors = spare(has[:, c])
            if not len(donors):
                continue
            g = int(donors[order[donors].argmax()])
            source = int(part[g])
            move(g, p)
            back = spare((part == p) & ~has[:, c])
            if len(back):
                move(int(back[order[back].argmax()]), source)


def _width(labels: npt.NDArray[Any]) -> int:
    return int(labels.shape[1]) if labels.ndim == 2 else int(labels.max(initial=0)) + 1
