"""FedBN, SiloBN and AdaBN: what of a BatchNorm layer stays at the hospital."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsec.errors import ConfigError
from fedsec.federation.desk import ServerState
from fedsec.federation.sharing import Sharing, load
from fedsec.federation.strategy import Label, Strategy

ADAPT_BATCH = 64


@dataclass(frozen=True)
class SiloBN(Strategy):
    """Running means and variances stay at the client; scale and shift are averaged. Andreux et al. 2020.

    In train mode running statistics never enter the forward pass, so that the trained parameters are those of
    FedAvg, bit for bit: uploading the statistics buys nothing. A client that never took part adapts (AdaBN).
    """

    name: ClassVar[str] = "silobn"
    goal: ClassVar[str] = "BatchNorm statistics stay at the client, scale and shift are averaged"
    source: ClassVar[str] = "Andreux et al., DART 2020"
    personal: ClassVar[bool] = True
    statistics: ClassVar[str] = ""
    not_private: ClassVar[str] = "dp replaces BatchNorm by GroupNorm, and nothing is left to keep"

    def local_selectors(self) -> tuple[str, ...]:
        """Running statistics."""
        return ("stat",)

    def unseen_model(self, model: nn.Module, sharing: Sharing, state: ServerState, images: Tensor) -> nn.Module:
        """The shared model with statistics of the newcomer's own images."""
        load(model, sharing, state.params, state.buffers, mean_of(state))
        return adapt(model, images)


@dataclass(frozen=True)
class FedBN(Strategy):
    """Every tensor of every BatchNorm layer stays at its client; equal weights as in the source. Li et al. 2021."""

    name: ClassVar[str] = "fedbn"
    goal: ClassVar[str] = "all BatchNorm tensors stay at the client"
    source: ClassVar[str] = "Li et al., ICLR 2021"
    personal: ClassVar[bool] = True
    statistics: ClassVar[str] = ""
    not_private: ClassVar[str] = "dp replaces BatchNorm by GroupNorm, and nothing is left to keep"
    uniform: Annotated[bool, Field(description="equal weights, whatever sizes the clients claim")] = True

    def local_selectors(self) -> tuple[str, ...]:
        """BatchNorm by module type, of any dimension, whatever it is called."""
        return ("type:BatchNorm",)

    def unseen_model(self, model: nn.Module, sharing: Sharing, state: ServerState, images: Tensor) -> nn.Module:
        """The mean of the clients' scale and shift (they would have to release it once) with statistics of its own."""
        load(model, sharing, state.params, state.buffers, mean_of(state))
        return adapt(model, images)


@dataclass(frozen=True)
class AdaBN(SiloBN):
    """SiloBN whose every client, old or new, is judged with statistics taken afresh from its own images.

    Li et al. 2018: no momentum and no labels; one pass over the images a client trains on.
    """

    name: ClassVar[str] = "adabn"
    goal: ClassVar[str] = "SiloBN, statistics taken afresh from each client's images at the end"
    source: ClassVar[str] = "Li et al., Pattern Recognition 2018; federated as in Andreux et al. 2020"
    label: ClassVar[Label] = "ours"

    def personal_model(
        self, model: nn.Module, sharing: Sharing, client: int, state: ServerState, images: Tensor
    ) -> nn.Module:
        """The shared model with statistics taken afresh."""
        return adapt(super().personal_model(model, sharing, client, state, images), images)


def mean_of(state: ServerState) -> Tensor | None:
    """The mean over the clients that took part of what they keep; None where nobody keeps anything."""
    kept = [t for client, t in sorted(state.local.items()) if client in state.trained]
    return torch.stack(kept).mean(0) if kept else None


@torch.no_grad()
def adapt(model: nn.Module, images: Tensor, batch: int = ADAPT_BATCH) -> nn.Module:
    """AdaBN (Li et al. 2018): forget all running statistics and take them anew, as plain means over the batches.

    Args:
        model: changed in place, and left in evaluation mode. images: (N, C, H, W), at least `batch` of them are better.

    Raises:
        ConfigError: fewer than two images.
    """
    if len(images) < 2:
        raise ConfigError(f"adabn: {len(images)} images give no statistics")
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch's own cumulative average
    model.eval()
    for layer in layers:
        layer.train()
    for part in images.split(batch):
        if len(part) > 1:
            model(part)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return model.eval()
