"""Does a reconstruction point at its patient: its rank among images of the same class, against chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedsec.metrics.image import identical, mse, pairwise_mse
from fedsec.metrics.statistics import bootstrap, proportion, weighted_mean
from fedsec.types import Estimate

GALLERY_SIZE = 200
_SAME_DISTANCE = 1e-12


@dataclass(frozen=True)
class Ranks:
    """Where the true image comes among its gallery, ordered by distance to the reconstruction."""

    rank: NDArray[np.float64]
    """(B,) from 1, the nearest; images at equal distance share their mean rank. NaN without candidates."""
    gallery: NDArray[np.int64]
    """(B,) N: the true image and its candidates."""


@dataclass(frozen=True)
class Galleries:
    """For each attacked image those that it has to be told from."""

    truths: Tensor
    """(B, C, H, W) the attacked images."""
    images: Tensor
    """(P, C, H, W)."""
    chosen: tuple[NDArray[np.int64], ...]
    """For each attacked image its candidates, as rows of `images`."""

    def ranks(self, reconstructions: Tensor, embed: Callable[[Tensor], Tensor] | None = None) -> Ranks:
        """Rank of each truth by pixel MSE or, with features (B, F) of images, by their cosine."""
        if embed is None:
            to_truth, to_others = mse(reconstructions, self.truths), pairwise_mse(reconstructions, self.images)
        else:
            directions = (F.normalize(embed(x).double()) for x in (reconstructions, self.truths, self.images))
            guess, truth, others = directions
            to_truth, to_others = 1 - (guess * truth).sum(1), 1 - guess @ others.T
        nearest, distance = to_truth.cpu().numpy(), to_others.cpu().numpy()
        ranks = []
        for row, candidates in enumerate(self.chosen):
            distances = distance[row, candidates]
            equal = np.abs(distances - nearest[row]) < _SAME_DISTANCE
            nearer = (distances < nearest[row]) & ~equal
            ranks.append(1 + nearer.sum() + equal.sum() / 2 if len(candidates) else np.nan)
        return Ranks(np.array(ranks, dtype=np.float64), np.array([len(c) + 1 for c in self.chosen], dtype=np.int64))


def draw_galleries(
    truths: Tensor,
    labels: Tensor,
    gallery_images: Tensor,
    gallery_labels: Tensor,
    *,
    generator: np.random.Generator,
    size: int = GALLERY_SIZE,
) -> Galleries:
    """At most `size` − 1 gallery images of each truth's class, drawn at random; with itself a gallery of `size`.

    Gallery: (P, C, H, W) and (P,) or (P, L); none public, none of an attacked image's patient. Images with the
    truth's very pixels are left out. For several labels, "its class" is the same set of labels.
    """
    same_class = (label_rows(labels)[:, None] == label_rows(gallery_labels)).all(-1)
    allowed = same_class & ~identical(truths, gallery_images)
    chosen = tuple(generator.permutation(np.flatnonzero(row))[: size - 1] for row in allowed.numpy())
    return Galleries(truths, gallery_images, chosen)


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


def identifies(found: Mapping[str, Any]) -> bool:
    """Do the reconstructions point at their patients, in pixels or in features, by the whole of an interval?

    The mean rank must beat both 0.5 and what the public mean image reaches in the same galleries, or the share of
    first places twice its chance: a single lucky hit in 20 would do for once. Several reconstructions that were matched
    with the truth must beat public images that were matched in the same way (by pixels).
    """
    for kind in ("reid_", "reid_encoder_"):
        rank1, auc = found.get(f"{kind}rank1"), found.get(f"{kind}auc")
        null = found.get(f"{kind}prior_auc")
        if rank1 is not None and rank1.low > max(2 * found["reid_chance"], found.get("reid_matched_rank1", 0.0)):
            return True
        beaten = max(0.5, null.value if null is not None else 0.5, found.get("reid_matched_auc", 0.0))
        if auc is not None and auc.low > beaten:
            return True
    return False


def label_rows(labels: Tensor) -> Tensor:
    """Labels (N,) or (N, L) as comparable (N, 1) or (N, L) integers on the CPU; unknown is −1."""
    whole = torch.nan_to_num(labels.cpu().float(), nan=-1).round().long()
    return whole[:, None] if whole.ndim == 1 else whole
