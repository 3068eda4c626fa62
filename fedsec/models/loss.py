"""The training loss of each task; clients and attackers must use the same one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
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


class Penalised(nn.Module):
    """A layer that adds a term of its own to the loss, such as a divergence from a prior."""

    terms: list[Tensor] | None = None

    def add_penalty(self, term: Tensor) -> None:
        """To be called in `forward`; `term` is a mean over the batch, and is dropped where nobody trains."""
        if self.terms is not None:
            self.terms.append(term)


@contextmanager
def penalties(model: nn.Module) -> Iterator[list[Tensor]]:
    """The terms that forward passes inside the block add to the loss; none for most models."""
    owners = [m for m in model.modules() if isinstance(m, Penalised)]
    terms: list[Tensor] = []
    for owner in owners:
        owner.terms = terms
    try:
        yield terms
    finally:
        for owner in owners:
            owner.terms = None
