"""What a model's answer to an image says about its training: true-class confidence from logits, in double precision.

Rounded probabilities saturate at 1 and cannot rank the surest images, which are the most exposed ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsec.types import Task

Array = NDArray[np.float64]
BATCH = 512


@dataclass(frozen=True)
class Signals:
    """Of one model on (N,) images."""

    phi: Array
    """(N,) logit-scaled confidence ln p/(1 − p) (Carlini et al. 2022, section IV-C)."""
    log_p: Array
    """(N,) log-probability of the true label: minus the loss."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode without gradients; then in the mode it was in."""
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(before)


def logits_of(model: nn.Module, images: Tensor, device: torch.device | None = None) -> Array:
    """(N, C) float64 logits of images (N, C, H, W) in [0, 1]; queries are float32, in evaluation mode."""
    where = device or torch.device("cpu")
    with evaluating(model):
        parts = [model(x.to(where, torch.float32)).double().cpu() for x in images.split(BATCH)]
    return torch.cat(parts).numpy()


def signals(logits: Array, labels: Array, task: Task) -> Signals:
    """Confidence in the true labels.

    Args:
        logits: (N, C).
        labels: (N,) classes, or (N, L) of 0/1 with NaN where unknown. With several labels p = e^(−mean loss over the
            known ones), and φ is the mean of ±logit.
    """
    logits = np.asarray(logits, dtype=np.float64)
    labels = np.asarray(labels)
    if task == "multilabel":
        known = ~np.isnan(labels)
        signed = np.where(labels > 0.5, logits, -logits)
        count = np.maximum(known.sum(1), 1)
        log_p = -(np.logaddexp(0, -signed) * known).sum(1) / count
        return Signals((signed * known).sum(1) / count, log_p)
    rows = np.arange(len(logits))
    own = logits[rows, labels.astype(np.int64)]
    others = logits.copy()
    others[rows, labels.astype(np.int64)] = -np.inf
    top = others.max(1)
    rest = top + np.log(np.exp(others - top[:, None]).sum(1))
    phi = own - rest
    return Signals(phi, -np.logaddexp(0, -phi))
