"""Canaries: what is planted into a training by fair coins, so that the trained model tells how large ε really is.

They take the code path of real images or clients: same sampling, same clipping, same noise. What the training shows of
the planted ones beside the others bounds ε from below (Steinke, Nasr & Jagielski 2023). Five kinds:

`mislabelled`: images with a wrong label; the auditor sees the released model's outputs alone.
`dirac`, `random`: images whose gradient is replaced by a coordinate or a random direction; the auditor sees every step
of the training, as the proof of DP-SGD grants (Nasr et al. 2023).
`client_dirac`, `client_random`: further clients that send one such vector in every round; the auditor sees the released
model and the initial one (Andrew et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedsec.data.base import Dataset
from fedsec.data.digest import fingerprint
from fedsec.data.partition import Partition
from fedsec.errors import ConfigError
from fedsec.types import RoundContext

CanaryKind = Literal["mislabelled", "dirac", "random", "client_dirac", "client_random"]
FEWEST = 20
TESTS = {"sample": ("sample", "patient"), "client": ("client", "client (central)")}
"""Unit of a canary -> units of the claims that it can refute: who protects patients protects each of their images."""


@dataclass(frozen=True)
class Canaries:
    """Which images or clients are canaries, and which of them were trained on. Drawn before training."""

    rows: NDArray[np.int64]
    """(m,) data set rows; -1 of canaries that are clients."""
    included: NDArray[np.bool_]
    """(m,)."""
    share: float
    """Of all training images, or clients."""
    kind: CanaryKind = "mislabelled"

    @property
    def unit(self) -> Literal["sample", "client"]:
        """What one canary stands for."""
        return "client" if self.kind.startswith("client") else "sample"

    @property
    def planted(self) -> NDArray[np.int64]:
        """Data set rows that stand in the clients' training sets as canaries."""
        return self.rows[self.included & (self.rows >= 0)]

    def check_unit(self, unit: str) -> None:
        """Canaries are as large as what a claim protects, or smaller; never larger.

        Raises:
            ConfigError: they say nothing about this claim.
        """
        if unit not in TESTS[self.unit]:
            what = "--canary client_dirac" if unit in TESTS["client"] else "--canary mislabelled or dirac"
            raise ConfigError(
                f"the claim protects a {unit}, {self.kind} canaries test a {self.unit}: no comparison; use {what}"
            )

    @property
    def commitment(self) -> str:
        """Hash of the coins."""
        return fingerprint("canaries", self.kind, self.rows, self.included)


def plant(
    dataset: Dataset, dealt: Partition, count: int, seed: int, kind: CanaryKind = "mislabelled"
) -> tuple[Dataset, Partition, Canaries]:
    """Choose `count` canaries, and take away those whose coin says so.

    Raises:
        ConfigError: wrong labels where an image has several, or more canaries than half of the images.
    """
    owned = np.concatenate(dealt.clients)
    draw = RoundContext(seed, 0, 0).numpy("canaries")
    if kind.startswith("client"):
        if count < FEWEST:
            raise ConfigError(f"canaries={count}: give {FEWEST} at least")
        rows, included = np.full(count, -1, dtype=np.int64), draw.random(count) < 0.5
        return dataset, dealt, Canaries(rows, included, count / (count + len(dealt.clients)), kind)
    if kind == "mislabelled" and dataset.task == "multilabel":
        raise ConfigError(
            "canaries: a wrong label needs exclusive classes; this task has several labels an image: --canary dirac"
        )
    if not FEWEST <= count <= len(owned) // 2:
        raise ConfigError(f"canaries={count}: give {FEWEST} to {len(owned) // 2:,}, half of the training images")
    rows = np.sort(draw.choice(owned, count, replace=False))
    included = draw.random(count) < 0.5
    if kind == "mislabelled":
        labels = np.array(dataset.labels)
        labels[rows] = (labels[rows] + draw.integers(1, dataset.num_classes, count)) % dataset.num_classes
        dataset = replace(dataset, labels=labels)
    clients = tuple(own[~np.isin(own, rows[~included])] for own in dealt.clients)
    return dataset, replace(dealt, clients=clients), Canaries(rows, included, count / len(owned), kind)
