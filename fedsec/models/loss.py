"""The training loss of each task; clients and attackers must use the same one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsec.types import Task


def masked_bce(logits: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy over the known labels (NaN is unknown), summed and divided by their number.

    Args:
        logits: (B, L). y: (B, L) in [0, 1] or NaN. A batch with no known label has loss 0 and a zero gradient.
    """
    known = ~torch.isnan(y)
    losses = F.binary_cross_entropy_with_logits(logits, torch.nan_to_num(y), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


def task_loss(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean loss of a batch: cross-entropy on (B, C) logits and (B,) classes, or `masked_bce`."""
    return masked_bce if task == "multilabel" else F.cross_entropy


def probabilities(logits: Tensor, task: Task) -> Tensor:
    """Scores in [0, 1]: a softmax over classes, or a sigmoid for each label."""
    return torch.sigmoid(logits) if task == "multilabel" else torch.softmax(logits, dim=1)
