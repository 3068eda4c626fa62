"""Which true image does each reconstruction stand for, and which labels were found?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsec.findings import Reconstruction
from fedsec.metrics.image import match, replace_missing
from fedsec.metrics.reidentification import label_rows
from fedsec.metrics.statistics import proportion


@dataclass(frozen=True)
class Pairs:
    """Every attacked image beside the reconstruction matched to it."""

    images: Tensor
    """(N, C, H, W) clamped; the prior where nothing was recovered."""
    truths: Tensor
    labels: Tensor
    victim: NDArray[np.int64]
    """(N,) the victim batch of each image."""
    missing: NDArray[np.bool_]
    label_right: NDArray[np.bool_]
    """(N,) the matched reconstruction carries the true label."""
    labels_found: NDArray[np.bool_]
    """(N,) as many hits in each batch as true labels are in its recovered multiset."""
    surplus: int
    """Reconstructions that no true image was left for."""


def pair_up(
    reconstructions: Sequence[Reconstruction], truths: Sequence[Tensor], labels: Sequence[Tensor], prior: Tensor
) -> Pairs:
    """Match each victim batch with its reconstruction; `prior` (C, H, W) stands in for what is missing."""
    if not len(reconstructions) == len(truths) == len(labels) or not truths:
        raise ValueError(
            f"{len(reconstructions)} reconstructions and {len(labels)} label sets for {len(truths)} victim batches; "
            "give one of each for every batch, and at least one batch"
        )
    images, missing, right, found, surplus = [], [], [], [], 0
    for guess, truth, label in zip(reconstructions, truths, labels, strict=True):
        if guess.images.shape[1:] != truth.shape[1:]:
            raise ValueError(
                f"{guess.method} returned images of shape {tuple(guess.images.shape[1:])}, not {tuple(truth.shape[1:])}"
            )
        repaired, broken = replace_missing(guess.images.detach().double().cpu(), prior)
        assigned = match(repaired, truth.cpu())
        wanted, offered = _as_tuples(label), _as_tuples(guess.labels)
        hits = (Counter(wanted) & Counter(offered)).total()
        images.append(torch.stack([prior.clamp(0, 1) if a is None else repaired[a] for a in assigned]))
        missing += [a is None or bool(broken[a]) for a in assigned]
        right += [a is not None and offered[a] == w for a, w in zip(assigned, wanted, strict=True)]
        found += [position < hits for position in range(len(wanted))]
        surplus += max(0, len(repaired) - len(truth))
    return Pairs(
        torch.cat(images),
        torch.cat([truth.detach().double().cpu() for truth in truths]),
        torch.cat([label.cpu() for label in labels]),
        np.repeat(np.arange(len(truths)), [len(truth) for truth in truths]),
        np.array(missing),
        np.array(right),
        np.array(found),
        surplus,
    )


def label_recovery(reconstructions: Sequence[Reconstruction], labels: Sequence[Tensor], pairs: Pairs) -> dict[str, Any]:
    """`label_accuracy`, `label_exact`, `label_accuracy_matched`; `label_set_*` where an attack hands in a set.

    `label_set_coverage` is the share of batches whose true multiset of labels is among those that were tried,
    `label_set_size` the mean number of these.
    """
    result: dict[str, Any] = {
        "label_accuracy": proportion(pairs.labels_found, pairs.victim),
        "label_exact": proportion([pairs.labels_found[pairs.victim == v].all() for v in np.unique(pairs.victim)]),
        "label_accuracy_matched": proportion(pairs.label_right, pairs.victim),
    }
    if any(item.label_set for item in reconstructions):
        sets = [item.label_set or (item.labels,) for item in reconstructions]
        wanted = [Counter(_as_tuples(label)) for label in labels]
        covered = [any(Counter(_as_tuples(y)) == w for y in tried) for tried, w in zip(sets, wanted, strict=True)]
        result["label_set_coverage"] = proportion(covered)
        result["label_set_size"] = float(np.mean([len(tried) for tried in sets]))
    return result


def _as_tuples(labels: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in label_rows(labels).tolist()]
