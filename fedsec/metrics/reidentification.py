"""Does a reconstruction point at its patient: its rank among images of the same class, against chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedsec.metrics.image import identical, mse, pairwise_mse
from fedsec.metrics.statistics import bootstrap, proportion, weighted_mean
from fedsec.types import Estimate

GALLERY_SIZE = 200
_SAME_DISTANCE = 1e-12


@dataclass(frozen=True)
class Ranks:
    """Where the true image comes among its gallery, ordered by pixel MSE to the reconstruction."""

    rank: NDArray[np.float64]
    """(B,) from 1, the nearest; images at equal distance share their mean rank. NaN without candidates."""
    gallery: NDArray[np.int64]
    """(B,) N: the true image and its candidates."""


def rank_in_gallery(
    reconstructions: Tensor,
    truths: Tensor,
    labels: Tensor,
    gallery_images: Tensor,
    gallery_labels: Tensor,
    *,
    generator: np.random.Generator,
    size: int = GALLERY_SIZE,
) -> Ranks:
    """Rank of each truth among at most `size` − 1 gallery images of its class, drawn at random, and itself.

    Gallery: (P, C, H, W) and (P,) or (P, L); none public, none of an attacked image's patient. Images with the
    truth's very pixels are left out. For several labels, "its class" is the same set of labels.
    """
    same_class = (label_rows(labels)[:, None] == label_rows(gallery_labels)).all(-1)
    allowed = same_class & ~identical(truths, gallery_images)
    to_truth = mse(reconstructions, truths).cpu().numpy()
    to_others = pairwise_mse(reconstructions, gallery_images).cpu().numpy()
    ranks, sizes = [], []
    for row, candidates in enumerate(allowed.numpy()):
        chosen = generator.permutation(np.flatnonzero(candidates))[: size - 1]
        distances = to_others[row, chosen]
        equal = np.abs(distances - to_truth[row]) < _SAME_DISTANCE
        nearer = (distances < to_truth[row]) & ~equal
        ranks.append(1 + nearer.sum() + equal.sum() / 2 if len(chosen) else np.nan)
        sizes.append(len(chosen) + 1)
    return Ranks(np.array(ranks, dtype=np.float64), np.array(sizes, dtype=np.int64))


def reidentification(
    ranks: Ranks, *, generator: np.random.Generator, draws: int = 10_000, groups: ArrayLike | None = None
) -> dict[str, Estimate | float | int]:
    """Summary of ranks: share at rank 1, AUC and median rank, with their chance levels.

    `reid_rank1` (Wilson interval; `reid_chance`, the mean of 1/N), `reid_auc`, the mean of 1 − (rank − 1)/(N − 1)
    (chance 0.5), `reid_median_rank`, `reid_gallery`, the smallest N. Images without candidates are left out of all
    of them, and counted in `reid_left_out`; a tie for the first place is no identification.
    """
    ranked = ~np.isnan(ranks.rank)
    rank, size = ranks.rank[ranked], ranks.gallery[ranked]
    owners = None if groups is None else np.asarray(groups)[ranked]
    result: dict[str, Estimate | float | int] = {"reid_left_out": int((~ranked).sum())}
    if not len(rank):
        return result
    score = 1 - (rank - 1) / (size - 1)
    return result | {
        "reid_rank1": proportion(rank == 1, owners),
        "reid_chance": float((1 / size).mean()),
        "reid_auc": bootstrap(weighted_mean, score, generator=generator, draws=draws, groups=owners),
        "reid_median_rank": float(np.median(rank)),
        "reid_gallery": int(size.min()),
    }


def label_rows(labels: Tensor) -> Tensor:
    """Labels (N,) or (N, L) as comparable (N, 1) or (N, L) integers on the CPU; unknown is −1."""
    whole = torch.nan_to_num(labels.cpu().float(), nan=-1).round().long()
    return whole[:, None] if whole.ndim == 1 else whole
