"""Wrong labels: the data poisoning that needs no knowledge of federated learning."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedsec.errors import ConfigError

Flip = Literal["all", "rotate", "random"]


def flipped(y: Tensor, num_classes: int, kind: Flip, share: float, generator: torch.Generator) -> Tensor:
    """Labels of which a share is wrong.

    Args:
        y: (N,) classes, or (N, L) findings of which every one is negated.
        num_classes: C of the task, whatever this hospital happens to hold.
        kind: all and rotate: y + 1 mod C (binary: the other class); random: any other class.
        share: of the images.
        generator: draws which images, and the random classes.

    Raises:
        ConfigError: a task of one class has no other label.
    """
    if num_classes < 2 and y.ndim == 1:
        raise ConfigError("poisoning: label_flip needs a task of two classes or more")
    chosen = (torch.rand(len(y), generator=generator) < share).to(y.device)
    if y.ndim > 1:
        return torch.where(chosen[:, None], 1 - y, y)
    step = torch.ones(len(y), dtype=torch.long)
    if kind == "random":
        step = torch.randint(1, num_classes, (len(y),), generator=generator)
    return torch.where(chosen, (y + step.to(y.device)) % num_classes, y)
