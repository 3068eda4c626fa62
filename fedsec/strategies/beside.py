"""A second model that trains on the same batches as the one that travels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fedsec.defense import LocalStep
from fedsec.federation.desk import Objective, Site
from fedsec.federation.local import PlainStep
from fedsec.federation.sharing import Sharing, load
from fedsec.types import RoundContext


class Beside:
    """The inner step, and a plain one of another model on the same batch."""

    def __init__(self, inner: LocalStep, other: nn.Module, site: Site, objective: Objective | None = None) -> None:
        self.inner = inner
        self.model, self.optimizer = inner.model, inner.optimizer
        self.other = PlainStep(other, site.recipe, objective)
        other.train(site.recipe.mode == "train")

    def batches(self, size: int, ctx: RoundContext) -> Iterator[Tensor]:
        """Those of the inner step."""
        return self.inner.batches(size, ctx)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Both step; the loss is that of the model that travels."""
        loss = self.inner(x, y)
        self.other(x, y)
        return loss


def flat_state(model: nn.Module, sharing: Sharing) -> Tensor:
    """(d + b,) shared parameters and buffers of a model."""
    tensors = dict(model.state_dict(keep_vars=True))
    return torch.cat([sharing.params.flatten(tensors), sharing.buffers.flatten(tensors)])


def load_flat(model: nn.Module, sharing: Sharing, flat: Tensor) -> None:
    """Put what `flat_state` took into a model."""
    size = sharing.params.size
    load(model, sharing, flat[:size], flat[size:], None)
