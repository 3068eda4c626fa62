"""HF-Fed: hospitals share an imaging network, and a hypernetwork of their own adjusts its channels to their scanner."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedsec.errors import ConfigError
from fedsec.federation.desk import ServerState, Setting, Site, seeded
from fedsec.federation.sharing import Sharing
from fedsec.federation.strategy import Label, Strategy
from fedsec.models.base import Backbone, Normalised
from fedsec.models.film import PROTOCOL_LENGTH, HyperNetwork

LOW = (5, 0, 0.004, 0.0025, 1.5, 1.5, 3.5)
HIGH = (11, 4, 0.013, 0.0155, 5.5, 5.5, 6.5)
SCANNERS = (
    (512, 368, 0.0133, 0.025716, 5.95, 4.906, 5e4),
    (512, 315, 0.0140, 0.030, 4.5, 3.5, 6.875e4),
    (384, 330, 0.0139, 0.026, 4.0, 3.0, 8.75e4),
    (400, 350, 0.0120, 0.022, 4.0, 3.5, 1.0625e5),
    (384, 350, 0.0140, 0.025, 5.0, 3.0, 1.25e5),
)
"""Views, bins, pixel, detector, source, detector distance, photons of the released code's five scanners."""


class FilmHeaded(Backbone):
    """A classifier whose features a hypernetwork scales and shifts; the hypernetwork's place is ours."""

    protocol: Tensor

    def __init__(self, net: Backbone, init: Literal["identity", "reference"]) -> None:
        super().__init__()
        self.net = net
        self.embed_dim, self.input = net.embed_dim, net.input
        self.hyper = HyperNetwork(net.embed_dim, init=init)
        self.protocol = torch.tensor(protocol(*SCANNERS[0]))

    def embed(self, x: Tensor) -> Tensor:
        """γ ⊙ features + β."""
        film = self.hyper(self.protocol.to(x).expand(len(x), -1))
        adjusted: Tensor = film.gamma * self.net.embed(x) + film.beta
        return adjusted

    def head(self, features: Tensor) -> Tensor:
        """Of the backbone."""
        return self.net.head(features)


@dataclass(frozen=True)
class HFFed(Strategy):
    """The network is averaged with equal weights; the hypernetwork and the protocol stay. Yang et al. 2022.

    HF-Fed (Ashraf and Madame 2024) is HyperFed applied to mammograms: the released network code is the same. Networks
    with a hypernetwork (`red_film`, `learn_film`) keep theirs; every other classifier gets one at its features. A
    hospital with one protocol trains its hypernetwork on a constant input, so that the network is personal, not
    conditioned on the protocol: swapping protocols does almost nothing, swapping hypernetworks does.
    """

    name: ClassVar[str] = "hffed"
    goal: ClassVar[str] = "a shared network; each hospital's hypernetwork adjusts its channels"
    source: ClassVar[str] = "Yang et al., 2206.03709 (HyperFed); Ashraf and Madame, 2407.17780 (HF-Fed)"
    label: ClassVar[Label] = "faithful, fixed"
    personal: ClassVar[bool] = True
    uniform: Annotated[bool, Field(description="equal weights, whatever sizes the clients claim")] = True
    init: Annotated[
        Literal["identity", "reference"],
        Field(description="of an added hypernetwork: γ = 1, or γ ≈ 0 as released"),
    ] = "identity"

    def prepare_model(self, model: nn.Module, setting: Setting) -> nn.Module:
        """Add a hypernetwork where there is none.

        Raises:
            ConfigError: a network that is not one of ours.
        """
        if any(isinstance(m, HyperNetwork) for m in model.modules()):
            return model
        if not isinstance(model, Normalised):
            raise ConfigError("hffed: the model offers no features for a hypernetwork; choose a registered one")
        old = model.net
        headed = seeded(setting.ctx.entropy("hyper"), lambda: FilmHeaded(old, self.init))
        model.net = headed  # type: ignore[assignment]
        return model

    def local_selectors(self) -> tuple[str, ...]:
        """The hypernetwork."""
        return ("key:*hyper.*",)

    def begin(self, site: Site) -> None:
        """Each hospital knows its scanner."""
        set_scanner(site.model, site.client)

    def personal_model(
        self, model: nn.Module, sharing: Sharing, client: int, state: ServerState, images: Tensor
    ) -> nn.Module:
        """The shared network with this hospital's hypernetwork and scanner."""
        set_scanner(model, client)
        return super().personal_model(model, sharing, client, state, images)


def set_scanner(model: nn.Module, client: int) -> None:
    """Give the network this hospital's protocol: the five scanners of the released code, dealt in turn."""
    for module in model.modules():
        if isinstance(getattr(module, "hyper", None), HyperNetwork):
            module.protocol = torch.tensor(protocol(*SCANNERS[max(client, 0) % len(SCANNERS)]))


def protocol(
    views: float, bins: float, pixel: float, detector: float, source: float, distance: float, photons: float
) -> tuple[float, ...]:
    """v of a scanner (7,): log₂ views, bins/256, four lengths, log₁₀ photons, scaled and not clipped."""
    raw = (math.log2(views), bins / 256, pixel, detector, source, distance, math.log10(photons))
    assert len(raw) == PROTOCOL_LENGTH
    return tuple((v - low) / (high - low) for v, low, high in zip(raw, LOW, HIGH, strict=True))
