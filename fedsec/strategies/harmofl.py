"""HarmoFL: images get the federation's mean amplitude spectrum, and weights are perturbed while training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedsec.defense import LocalStep
from fedsec.errors import ConfigError
from fedsec.federation.desk import Setting, Site
from fedsec.federation.strategy import Label, Strategy
from fedsec.models.base import Backbone, Normalised
from fedsec.types import RoundContext

from .spectrum import Band, amplitude, band_mask, with_amplitude

MOMENTUM = 0.1


class AmplitudeNormalised(Backbone):
    """A backbone whose images first get a given mean amplitude inside a band of frequencies.

    In the first round a client follows the mean amplitude of its own batches (ν = 0.1, the first batch sets it); then
    the federation's mean stands. `amplitude` is a buffer: it travels as one, and is averaged as one.
    """

    amplitude: Tensor

    def __init__(self, net: Backbone, size: int, band: Band, ratio: float) -> None:
        super().__init__()
        self.net = net
        self.embed_dim, self.input = net.embed_dim, net.input
        self.learning = False
        self.register_buffer("amplitude", torch.zeros(net.input.channels, size, size))
        self.register_buffer("mask", band_mask(size, size, band, ratio), persistent=False)

    def observe(self, x: Tensor) -> None:
        """Follow the mean amplitude of a batch (B, C, H, W)."""
        seen = amplitude(x.detach()).mean(0)
        self.amplitude.copy_(torch.lerp(self.amplitude, seen, MOMENTUM) if self.known else seen)

    @property
    def known(self) -> bool:
        """Some amplitude was seen or received."""
        return bool(self.amplitude.any())

    def harmonised(self, x: Tensor) -> Tensor:
        """Images as the backbone sees them."""
        if self.learning and self.training:
            self.observe(x)
        mask: Tensor = self.get_buffer("mask")
        return with_amplitude(x, self.amplitude, mask) if self.known else x

    def embed(self, x: Tensor) -> Tensor:
        """Features of harmonised images."""
        return self.net.embed(self.harmonised(x))

    def head(self, features: Tensor) -> Tensor:
        """Of the backbone."""
        return self.net.head(features)


@dataclass(frozen=True)
class HarmoFL(Strategy):
    """Amplitude normalisation and, optionally, weight perturbation; equal weights. Jiang, Wang and Dou 2022.

    The band is `dc` in what the released code does (every image gets the federation's mean intensity) and `full` in
    the paper's equation. The perturbation is off by default: with the source's α from the first round nothing trained.
    Each client's mean amplitude travels in clear with its first update: the mean content of its images.
    """

    name: ClassVar[str] = "harmofl"
    goal: ClassVar[str] = "images get the federation's mean amplitude spectrum"
    source: ClassVar[str] = "Jiang, Wang and Dou, AAAI 2022"
    label: ClassVar[Label] = "faithful, fixed"
    statistics: ClassVar[str] = "the mean amplitude spectrum of its images, in its first upload"
    not_private: ClassVar[str] = "the mean amplitude of its images travels, and the perturbation is a second gradient"
    uniform: Annotated[bool, Field(description="equal weights, whatever sizes the clients claim")] = True
    band: Annotated[Band, Field(description="frequencies that are exchanged")] = "dc"
    ratio: Annotated[float, Field(ge=0, le=0.5, description="half width of band=ratio, relative to the side")] = 0.1
    alpha: Annotated[float, Field(ge=0, description="size of the weight perturbation; 0: none")] = 0.0
    start: Annotated[int, Field(ge=1, description="first round with weight perturbation")] = 1

    def prepare_model(self, model: nn.Module, setting: Setting) -> nn.Module:
        """Put the amplitude layer in front of the backbone.

        Raises:
            ConfigError: a network that is not one of ours.
        """
        if not isinstance(model, Normalised):
            raise ConfigError("harmofl: the model has no backbone to put an input layer in front of")
        model.net = AmplitudeNormalised(model.net, setting.image_shape[1], self.band, self.ratio)
        return model

    def begin(self, site: Site) -> None:
        """Learn the amplitude in the first round only."""
        layer(site.model).learning = site.ctx.round == 1

    def local_step(self, step: LocalStep, site: Site) -> LocalStep:
        """Steps along the gradient at the perturbed weights."""
        return PerturbedStep(step, self.alpha) if self.alpha > 0 and site.ctx.round >= self.start else step

    def finish(self, site: Site) -> None:
        """Nothing learns outside a turn."""
        layer(site.model).learning = False


def layer(model: nn.Module) -> AmplitudeNormalised:
    """The amplitude layer of a prepared model."""
    return next(m for m in model.modules() if isinstance(m, AmplitudeNormalised))


class PerturbedStep:
    """g at θ, δ = α g/‖g‖, then the optimiser steps from θ with the gradient at θ + δ (Jiang et al. 2022, alg. 1).

    θ is back in place whatever happens in between.
    """

    def __init__(self, inner: LocalStep, alpha: float) -> None:
        self.inner, self.alpha = inner, alpha
        self.model, self.optimizer = inner.model, inner.optimizer
        self._parameters = [p for p in inner.model.parameters() if p.requires_grad]

    def batches(self, size: int, ctx: RoundContext) -> Iterator[Tensor]:
        """Those of the inner step."""
        return self.inner.batches(size, ctx)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Two passes over one batch; returns the loss at θ."""
        step, kept = self.optimizer.step, [p.detach().clone() for p in self._parameters]
        self.optimizer.step = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        try:
            loss = self.inner(x, y)
            with torch.no_grad():
                for parameter, delta in zip(self._parameters, perturbation(self._parameters, self.alpha), strict=True):
                    parameter.add_(delta)
            self.inner(x, y)
        finally:
            self.optimizer.step = step  # type: ignore[method-assign]
            with torch.no_grad():
                for parameter, value in zip(self._parameters, kept, strict=True):
                    parameter.copy_(value)
        self.optimizer.step()
        return loss


def perturbation(parameters: list[nn.Parameter], alpha: float) -> list[Tensor]:
    """δ = α g/(‖g‖₂ + 1e-12) over all parameters together, from their gradients."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
    return [alpha * g / (norm + 1e-12) for g in gradients]
