"""How a client hides its images in front of the last layer: pruned features (Soteria), a drawn code (PRECODE).

Heuristics against gradient inversion; neither claims privacy.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedsec.defense import Defense, LocalStep
from fedsec.errors import ConfigError
from fedsec.models.base import last_linear
from fedsec.models.loss import Penalised
from fedsec.types import RoundContext

FEATURES_AT_ONCE = 64
BOTTLENECK = "bottleneck"
"""Name of the module that PRECODE puts in front of the last layer."""


class _Around:
    """A local step that does something before and after another one."""

    def __init__(self, inner: LocalStep) -> None:
        self.inner = inner
        self.model = inner.model

    def batches(self, size: int, ctx: RoundContext) -> Iterator[Tensor]:
        """Those of the inner step."""
        return self.inner.batches(size, ctx)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """That of the inner step."""
        return self.inner.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner.optimizer = optimizer


# --- Soteria ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Soteria(Defense):
    """The features that say most about the image are pruned from one layer's gradient (Sun et al. 2021).

    Feature r_i in front of the layer is set to zero where |r_i|/‖∂r_i/∂x‖ is largest: the paper's first-order rule for
    the representation that is furthest from x at a given number of changed features. As there, only the weight gradient
    of the defended layer is computed from the pruned representation: its columns of these features are zero, while the
    bias and the layers below get their true gradients. A batch shares one mask, from the mean of ‖∂r_i/∂x‖/|r_i| over
    the images in which the feature is not zero; a feature that is zero everywhere has nothing to prune and comes last.

    Costs a backward pass for each feature in every local step.
    """

    name: ClassVar[str] = "soteria"
    protects: ClassVar[str] = "images, against inversion through the last layer: prunes its gradient; no guarantee"

    fraction: Annotated[float, Field(ge=0, lt=1, description="share of the features that is pruned")] = 0.4
    layer: Annotated[
        str, Field(description="fully connected layer that is pruned: head (the last one), or a module's name")
    ] = "head"

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """The model as it is.

        Raises:
            ConfigError: it has no such layer.
        """
        defended_layer(model, self.layer)
        return model

    def local_step(self, step: LocalStep, ctx: RoundContext) -> LocalStep:
        """Prune the layer's gradient between the backward pass and the optimiser."""
        return PrunedStep(step, self.fraction, self.layer) if self.fraction > 0 else step

    def public_knowledge(self, client: int) -> Mapping[str, Any]:
        """The layer; which columns are pruned the upload itself shows."""
        return {"pruned_layer": self.layer} if self.fraction > 0 else {}


def defended_layer(model: nn.Module, name: str) -> nn.Linear:
    """The fully connected layer of this name; "head" is the last one.

    Raises:
        ConfigError: there is none.
    """
    layer = dict(model.named_modules()).get(last_linear(model) if name == "head" else name)
    if not isinstance(layer, nn.Linear):
        known = ", ".join(n for n, m in model.named_modules() if isinstance(m, nn.Linear))
        raise ConfigError(f"soteria: layer={name} is no fully connected layer of this model; it has {known}")
    return layer


class PrunedStep(_Around):
    """A local step in which some columns of one layer's weight gradient are zero."""

    def __init__(self, inner: LocalStep, fraction: float, layer: str) -> None:
        super().__init__(inner)
        self.fraction = fraction
        self.layer = defended_layer(inner.model, layer)
        self._mask: Tensor | None = None
        self._pruned = False

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of the inner kind.

        Raises:
            ConfigError: another defense takes gradients for each image apart, so that there is none to prune.
        """
        if len(x) == 0:
            return self.inner(x, y)
        images = x.detach().requires_grad_(True)
        self._mask, self._pruned = None, False
        handles = [
            self.layer.register_forward_pre_hook(lambda _, inputs: self._choose(inputs[0], images)),
            self.layer.weight.register_hook(self._prune),
        ]
        try:
            loss = self.inner(images, y)
        finally:
            for handle in handles:
                handle.remove()
        if not self._pruned:
            raise ConfigError("soteria: no gradient of its layer to prune; it does not combine with dp")
        return loss

    def _choose(self, features: Tensor, images: Tensor) -> None:
        if not features.requires_grad:
            return
        try:
            self._mask = features_to_keep(features, images, self.fraction)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"soteria: no slopes of the features can be taken ({reason}); it does not combine with dp"
            ) from error

    def _prune(self, gradient: Tensor) -> Tensor:
        self._pruned = True
        assert self._mask is not None
        return gradient * self._mask


def features_to_keep(features: Tensor, images: Tensor, fraction: float) -> Tensor:
    """1 for features that stay, 0 for the share `fraction` with the smallest ‖∂r_i/∂x‖/|r_i|. Sun et al. 2021.

    Args:
        features: (B, F), computed from `images`, whose graph is kept.
        images: (B, C, H, W) that require gradients.
        fraction: rounded to whole features.
    """
    values = features.detach().abs()
    slopes = []
    for chosen in torch.eye(features.shape[1], device=features.device).split(FEATURES_AT_ONCE):
        rows = chosen[:, None].expand(-1, len(images), -1)
        (slope,) = torch.autograd.grad(features, images, rows, retain_graph=True, is_grads_batched=True)
        slopes.append(slope.flatten(2).norm(dim=2))
    alive = values > 0
    ratios = torch.where(alive, torch.cat(slopes).T / values.clamp(min=1e-30), 0.0)
    sensitivity = torch.where(alive.any(0), ratios.sum(0) / alive.sum(0).clamp(min=1), torch.inf)
    pruned = sensitivity.argsort()[: round(fraction * features.shape[1])]
    return torch.ones_like(sensitivity).index_fill_(0, pruned, 0.0)


# --- PRECODE ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precode(Defense):
    """A variational bottleneck in front of the last layer, with a code drawn anew in every step (Scheliga et al. 2021).

    A fully connected encoder gives mean and log variance of a Gaussian code, a fully connected decoder makes features
    of the drawn code, and β·KL(code ‖ N(0, I)), the mean over the batch, is added to the loss. The draw makes every
    gradient of the client random. Where nobody trains, the code is its mean.
    """

    name: ClassVar[str] = "precode"
    protects: ClassVar[str] = "images, against gradient matching: a random bottleneck before the head; no guarantee"

    size: Annotated[int, Field(ge=1, description="length of the code")] = 256
    beta: Annotated[float, Field(ge=0, description="weight of the divergence in the loss")] = 1e-3

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Put the bottleneck in front of the last fully connected layer; the model is changed in place.

        Its first weights are drawn from a generator that the layer's own weights seed: a function of the run's seed.
        """
        path, _, name = last_linear(model).rpartition(".")
        owner = model.get_submodule(path)
        head = owner.get_submodule(name)
        assert isinstance(head, nn.Linear)
        digest = hashlib.blake2b(head.weight.detach().cpu().contiguous().numpy().tobytes(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        bottleneck = Bottleneck(head.in_features, self.size, self.beta, generator)
        setattr(owner, name, nn.Sequential(OrderedDict([(BOTTLENECK, bottleneck), ("linear", head)])))
        return model

    def local_step(self, step: LocalStep, ctx: RoundContext) -> LocalStep:
        """Draw codes while the client takes a step, from a stream of its own."""
        return SampledStep(step, ctx)

    def public_knowledge(self, client: int) -> Mapping[str, Any]:
        """Which module draws. Its architecture and its term in the loss are part of the model."""
        return {"stochastic": (BOTTLENECK,)}


class Bottleneck(Penalised):
    """Encoder, Gaussian code, decoder: (B, features) -> (B, features)."""

    def __init__(self, features: int, size: int, beta: float, generator: torch.Generator) -> None:
        super().__init__()
        self.beta = beta
        self.encode = _linear(features, 2 * size, generator)
        self.decode = _linear(size, features, generator)
        self.generator: torch.Generator | None = None
        """Where codes are drawn from; None: the code is its mean."""

    def forward(self, features: Tensor) -> Tensor:
        """Features made of a code."""
        mean, log_variance = self.encode(features).chunk(2, dim=1)
        self.add_penalty(self.beta * divergence(mean, log_variance))
        if self.generator is None:
            return self.decode(mean)  # type: ignore[no-any-return]
        draw = torch.empty_like(mean).normal_(generator=self.generator)
        return self.decode(mean + (log_variance / 2).exp() * draw)  # type: ignore[no-any-return]


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A fully connected layer with the framework's initial distribution, U(±1/√inputs), from this generator."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(μ, diag σ²) ‖ N(0, I)) = ½·Σ(μ² + σ² − 1 − ln σ²), mean over the batch. Kingma & Welling 2014."""
    return (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2


class SampledStep(_Around):
    """A local step in which bottlenecks draw their codes. Lives for one round of one client."""

    def __init__(self, inner: LocalStep, ctx: RoundContext) -> None:
        super().__init__(inner)
        self._generator = ctx.generator("precode-code", next(inner.model.parameters()).device)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of the inner kind."""
        with drawing(self.model, self._generator):
            return self.inner(x, y)


@contextmanager
def drawing(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Inside the block the model's bottlenecks draw from this generator."""
    found = [m for m in model.modules() if isinstance(m, Bottleneck)]
    for module in found:
        module.generator = generator
    try:
        yield
    finally:
        for module in found:
            module.generator = None
