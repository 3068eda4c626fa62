"""MOON: a client's features are pulled to the global model's and away from those of its own last model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.errors import ConfigError
from fedsec.federation.desk import Objective, Setting, Site, frozen_copy, seeded
from fedsec.federation.sharing import load
from fedsec.federation.strategy import Strategy
from fedsec.types import RoundContext

PROJECTION = 256


@dataclass(frozen=True)
class Moon(Strategy):
    """FedAvg with a model-contrastive term. Li, He and Song 2021, eq. 3-5.

    z is the projection (two shared layers, D -> D -> 256) of the features of the model in training, z_g of the
    broadcast model, z_p of the client's last one; both are frozen. Nothing is added in a client's first round.
    """

    name: ClassVar[str] = "moon"
    goal: ClassVar[str] = "FedAvg, features kept near the global model's"
    source: ClassVar[str] = "Li, He and Song, CVPR 2021; defaults not verified"
    not_private: ClassVar[str] = "three networks see each image"
    remembered: ClassVar[tuple[str, ...]] = ("previous", "previous_buffers")
    mu: Annotated[float, Field(ge=0, description="weight of the contrastive term; 0 is fedavg")] = 1.0
    temperature: Annotated[float, Field(gt=0, description="of the contrastive term")] = 0.5

    def prepare_model(self, model: nn.Module, setting: Setting) -> nn.Module:
        """Add the projection, which serves training alone."""
        if self.mu > 0:
            add_projection(model, "projection", PROJECTION, setting.ctx)
        return model

    def auxiliary(self) -> tuple[str, ...]:
        """The projection."""
        return ("projection.",) if self.mu > 0 else ()

    def objective(self, site: Site, base: Objective) -> Objective:
        """Base loss plus μ times the contrastive term."""
        if self.mu == 0 or "previous" not in site.own:
            return base
        theirs = frozen_copy(site.model)
        previous = frozen_copy(site.model)
        load(previous, site.sharing, site.own["previous"], site.own["previous_buffers"], None)

        def total(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            term = contrastive(projected(model, x), projected(theirs, x), projected(previous, x), self.temperature)
            return base(model, x, y) + self.mu * term

        return total

    def finish(self, site: Site) -> None:
        """Keep this model for the next round's comparison."""
        if self.mu > 0:
            site.own["previous"], site.own["previous_buffers"] = site.shared(), site.buffers()


def add_projection(model: nn.Module, name: str, width: int, ctx: RoundContext, norm: bool = False) -> None:
    """Give a model a two-layer projection of its features under this name.

    Raises:
        ConfigError: the model has no features of its own.
    """
    features = getattr(model, "embed_dim", None)
    if not isinstance(features, int) or not hasattr(model, "embed"):
        raise ConfigError(f"{name}: the model offers no features (embed, embed_dim); choose a registered one")

    def build() -> nn.Module:
        between: list[nn.Module] = [nn.BatchNorm1d(features)] if norm else []
        return nn.Sequential(nn.Linear(features, features), *between, nn.ReLU(), nn.Linear(features, width))

    model.add_module(name, seeded(ctx.entropy(name), build))


def projected(model: nn.Module, x: Tensor) -> Tensor:
    """(B, 256) unit-length projections of images."""
    whole: nn.Module = model
    return F.normalize(whole.projection(whole.embed(x)), dim=1)  # type: ignore[operator]


def contrastive(z: Tensor, z_global: Tensor, z_previous: Tensor, temperature: float) -> Tensor:
    """Mean of −ln(e^{s(z,z_g)/τ} / (e^{s(z,z_g)/τ} + e^{s(z,z_p)/τ})), s the cosine. Li et al. 2021, eq. 3.

    Args:
        z, z_global, z_previous: (B, P).
    """
    near = F.cosine_similarity(z, z_global, dim=1) / temperature
    far = F.cosine_similarity(z, z_previous, dim=1) / temperature
    return F.softplus(far - near).mean()
