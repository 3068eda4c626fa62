"""What all participants know of each other's data before the first round: sizes and shapes, never an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fedsec.data.base import Dataset
from fedsec.errors import ConfigError
from fedsec.types import Task

Patients = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Facts:
    """Enough to build the model and calibrate the defenses on a machine that holds nobody's images."""

    image_shape: tuple[int, int, int]
    num_classes: int
    task: Task
    client_sizes: tuple[int, ...]
    client_patients: tuple[int, ...] | None = None
    """Distinct patients of each client, where the data set knows them."""
    patient_ids: Patients | None = None
    """The patient of each training image, by number."""

    @classmethod
    def of(cls, dataset: Dataset, owned: Sequence[np.ndarray]) -> Self:
        """Of a data set and the rows of its training images that each client owns."""
        patients = dataset.meta.get("patient")
        return cls(
            image_shape=dataset.image_shape,
            num_classes=dataset.num_classes,
            task=dataset.task,
            client_sizes=tuple(len(rows) for rows in owned),
            client_patients=None if patients is None else tuple(len(np.unique(patients[r])) for r in owned),
            patient_ids=patient_ids(patients, owned),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What `to_json` wrote.

        Raises:
            ConfigError: something else.
        """
        try:
            channels, height, width = (int(n) for n in content["image_shape"])
            known, ids = content["client_patients"], content["patient_ids"]
            return cls(
                image_shape=(channels, height, width),
                num_classes=int(content["num_classes"]),
                task=content["task"],
                client_sizes=tuple(int(n) for n in content["client_sizes"]),
                client_patients=None if known is None else tuple(int(n) for n in known),
                patient_ids=None if ids is None else tuple(tuple(int(p) for p in row) for row in ids),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not the facts of a federation: {type(error).__name__}: {error}") from None


planned: ContextVar[Mapping[str, Facts] | None] = ContextVar("planned", default=None)
"""Cell key -> the facts that a deployed federation agreed on, where the server does not hold the hospitals' images."""


def patient_ids(patients: np.ndarray | None, clients: Sequence[np.ndarray]) -> Patients | None:
    """Each client's patients by number, image by image; None where the data set does not know them."""
    if patients is None or any(str(p) == "" for p in np.unique(patients)):
        return None
    codes = np.unique(patients, return_inverse=True)[1]
    return tuple(tuple(int(c) for c in codes[rows]) for rows in clients)
