"""Canaries: images with a wrong label, each of which a fair coin puts into the training or keeps out of it.

They take the code path of real images: same clipping, same sampling, same noise. What the trained model then says about
the planted ones beside the others bounds ε from below (Steinke, Nasr & Jagielski 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedsec.data.base import Dataset
from fedsec.data.digest import fingerprint
from fedsec.data.partition import Partition
from fedsec.errors import ConfigError
from fedsec.types import RoundContext


@dataclass(frozen=True)
class Canaries:
    """Which images are canaries, and which of them were trained on. Drawn before training."""

    rows: NDArray[np.int64]
    """(m,) data set rows; their labels are wrong."""
    included: NDArray[np.bool_]
    """(m,)."""
    share: float
    """Of all training images."""

    @property
    def commitment(self) -> str:
        """Hash of the coins."""
        return fingerprint("canaries", self.rows, self.included)


def plant(dataset: Dataset, dealt: Partition, count: int, seed: int) -> tuple[Dataset, Partition, Canaries]:
    """Give `count` of the clients' images a wrong label, and take away those whose coin says so.

    Raises:
        ConfigError: several labels an image, or more canaries than images.
    """
    owned = np.concatenate(dealt.clients)
    if dataset.task == "multilabel":
        raise ConfigError("canaries: a wrong label needs exclusive classes; this task has several labels an image")
    if not 20 <= count <= len(owned) // 2:
        raise ConfigError(f"canaries={count}: give 20 to {len(owned) // 2:,}, half of the training images")
    draw = RoundContext(seed, 0, 0).numpy("canaries")
    rows = np.sort(draw.choice(owned, count, replace=False))
    included = draw.random(count) < 0.5
    labels = np.array(dataset.labels)
    labels[rows] = (labels[rows] + draw.integers(1, dataset.num_classes, count)) % dataset.num_classes
    out = rows[~included]
    clients = tuple(own[~np.isin(own, out)] for own in dealt.clients)
    return (
        replace(dataset, labels=labels),
        replace(dealt, clients=clients),
        Canaries(rows, included, count / len(owned)),
    )
