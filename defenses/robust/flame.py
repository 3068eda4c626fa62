"""FLAME: keep the one large cluster of directions, clip to the median norm, add a little noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedsec.robust.rule import Seen, Weighing, WeightRule

if TYPE_CHECKING:
    from torch import Tensor

    from fedsec.robust.geometry import Matrix
    from fedsec.types import RoundContext


def main_cluster(cosine_distances: Matrix) -> list[int]:
    """The rows of (scikit-learn's) HDBSCAN's cluster of more than half of all; every row where it finds none."""
    from sklearn.cluster import HDBSCAN

    n = len(cosine_distances)
    if n < 3:
        return list(range(n))
    clustering = HDBSCAN(
        min_cluster_size=n // 2 + 1, min_samples=1, allow_single_cluster=True, metric="precomputed", copy=True
    ).fit(cosine_distances)
    kept = [i for i, label in enumerate(clustering.labels_) if label >= 0]
    return kept or list(range(n))


@dataclass(frozen=True)
class FLAME(WeightRule):
    """Clusters cosine distances of updates, clips to the median norm and adds noise (Nguyen et al. 2022, 2101.02281).

    The paper clusters whole models and leaves normalisation layers without noise; here updates are clustered, and
    every shared parameter gets noise of λ times the median norm. λ = 0.001 was not verified against the paper.
    """

    name: ClassVar[str] = "flame"
    protects: ClassVar[str] = "keeps the large cluster of directions, clips to the median norm, adds a little noise"
    requirement: ClassVar[str] = "n ≥ 3"

    noise: Annotated[float, Field(ge=0, description="λ: standard deviation in units of the median norm")] = 1e-3

    def feasible(self, n: int, f: int) -> bool:
        """A cluster needs neighbours."""
        return n >= 3

    def weigh(self, seen: Seen) -> Weighing:
        """Clipped and equal on the cluster."""
        cosine = seen.geometry.cosine_distances
        kept = main_cluster(cosine)
        norms = seen.geometry.norms
        limit = float(np.median(norms))
        coefficients = np.zeros(seen.n)
        coefficients[kept] = np.minimum(1.0, limit / np.maximum(norms[kept], 1e-300)) / len(kept)
        flags = ("flame: no cluster was found, all clients were kept",) if len(kept) == seen.n else ()
        return Weighing(coefficients, cosine[:, kept].mean(1), flags)

    def finish(self, delta: Tensor, seen: Seen, ctx: RoundContext) -> Tensor:
        """Gaussian noise."""
        import torch

        if self.noise == 0:
            return delta
        std = self.noise * float(np.median(seen.geometry.norms[: seen.n]))
        draw = torch.randn(delta.shape, generator=ctx.generator("flame", delta.device), device=delta.device)
        return delta + std * draw
