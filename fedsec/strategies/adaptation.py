"""Domain adaptation across hospitals: adversarial features (DANN), and features with equal moments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.federation.desk import Desk, Objective, Report, Setting, Site
from fedsec.federation.strategy import Label, Strategy


@dataclass(frozen=True)
class DANN(Strategy):
    """Features that hide the hospital: clients reverse the gradient of a classifier of hospitals. After Li X. 2020.

    Each client sends noised unit-length features of one batch; the server fits the classifier on them; clients add λ_t
    times its cross-entropy through a reversed gradient, λ_t = λ(2/(1 + e^(−10t/T)) − 1). Beta: larger λ collapsed in
    our trials, and a fresh probe still found the site. No claim is made. The source's mixture of experts is out.
    """

    name: ClassVar[str] = "dann"
    goal: ClassVar[str] = "beta: features that a classifier of hospitals cannot tell apart"
    source: ClassVar[str] = "Li X. et al., Medical Image Analysis 2020; Ganin et al. 2016"
    label: ClassVar[Label] = "reconstruction"
    individuals: ClassVar[str] = "its server fits a classifier to single clients' features"
    reports: ClassVar[tuple[Report, ...]] = (Report("features", "noised features of a batch of its images"),)
    not_private: ClassVar[str] = "features of real images travel with little noise"
    lam: Annotated[float, Field(ge=0, description="λ; 0 is fedavg with features that are sent for nothing")] = 0.03
    sigma: Annotated[float, Field(ge=0, description="noise on each entry of a unit-length feature")] = 0.05
    batch: Annotated[int, Field(ge=1, description="images whose features are sent")] = 32
    fit_steps: Annotated[int, Field(ge=1, description="server: gradient steps of the classifier a round")] = 50

    def initial_side(self, model: nn.Module, setting: Setting) -> dict[str, Tensor]:
        """A classifier that knows nothing."""
        width: Any = getattr(model, "embed_dim", 0)
        return {"domains": torch.zeros(setting.clients, int(width))}

    def objective(self, site: Site, base: Objective) -> Objective:
        """Base loss plus the reversed domain loss."""
        strength = ramp(self.lam, site.ctx.round, site.ctx.rounds)
        weights = site.received["domains"].to(site.x.device)
        if strength == 0 or not bool(weights.any()):
            return base
        own = site.client

        def total(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            logits = reversed_gradient(unit(model, x), strength) @ weights.T
            return base(model, x, y) + F.cross_entropy(logits, torch.full((len(x),), own, device=x.device))

        return total

    def report(self, site: Site) -> dict[str, Tensor]:
        """Noised features of one batch."""
        rng = site.ctx.generator("features")
        rows = torch.randperm(len(site.x), generator=rng)[: self.batch]
        training = site.model.training
        with torch.no_grad():
            z = unit(site.model.eval(), site.x[rows.to(site.x.device)])
        site.model.train(training)
        return {"features": z + self.sigma * torch.randn(z.shape, generator=rng).to(z.device)}

    def valid_report(self, extras: Mapping[str, Tensor]) -> str | None:
        """A matrix."""
        return None if extras["features"].ndim == 2 else "features are no matrix"

    def serve(self, desk: Desk) -> None:
        """Some gradient steps of the classifier on this round's features."""
        weights = desk.state.side["domains"].clone()
        good = [u for u in desk.updates if u.extras["features"].shape[1] == weights.shape[1]]
        if not good:
            return
        z = torch.cat([u.extras["features"] for u in good])
        y = torch.cat([torch.full((len(u.extras["features"]),), u.client) for u in good]).to(z.device)
        for _ in range(self.fit_steps):
            probability = torch.softmax(z @ weights.T, 1)
            slope = (probability - F.one_hot(y, len(weights))).T @ z / len(z)
            weights = weights - slope
        desk.state.side["domains"] = weights


@dataclass(frozen=True)
class FeatureStats(Strategy):
    """Clients share mean and deviation of each feature, and add Σ(μ_k − μ̄)² + (σ_k − σ̄)² to their loss.

    The Gaussian method that a survey describes without a source.
    """

    name: ClassVar[str] = "feature_stats"
    goal: ClassVar[str] = "FedAvg, features of all hospitals pulled to equal means and deviations"
    source: ClassVar[str] = "a survey's description without citation"
    label: ClassVar[Label] = "reconstruction"
    reports: ClassVar[tuple[Report, ...]] = (Report("moments", "mean and deviation of each feature of its images"),)
    not_private: ClassVar[str] = "the moments of a batch tie its images together"
    lam: Annotated[float, Field(ge=0, description="weight of the term; 0 trains as fedavg")] = 0.1

    def objective(self, site: Site, base: Objective) -> Objective:
        """Base loss plus the distance of this batch's moments from the federation's."""
        if self.lam == 0 or "moments" not in site.received:
            return base
        target = site.received["moments"].to(site.x.device)

        def total(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            if len(x) < 2:
                return base(model, x, y)
            parts: Any = model
            return base(model, x, y) + self.lam * moment_distance(parts.embed(x), target)

        return total

    def report(self, site: Site) -> dict[str, Tensor]:
        """Moments of all its images under the trained model."""
        training = site.model.training
        parts: Any = site.model.eval()
        with torch.no_grad():
            features = torch.cat([parts.embed(x) for x in site.x.split(256)])
        site.model.train(training)
        return {"moments": moments(features)}

    def valid_report(self, extras: Mapping[str, Tensor]) -> str | None:
        """Two rows, the second not negative."""
        found = extras["moments"]
        good = found.ndim == 2 and len(found) == 2 and bool((found[1] >= 0).all())
        return None if good else "moments are not a mean and a deviation"

    def serve(self, desk: Desk) -> None:
        """The weighted mean of the moments."""
        if desk.updates:
            found = [u.extras["moments"] * desk.weights.get(u.client, 0.0) for u in desk.updates]
            desk.state.side["moments"] = torch.stack(found).sum(0)


def ramp(lam: float, number: int, rounds: int) -> float:
    """λ(2/(1 + e^(−10t/T)) − 1), from 0 to λ. Ganin et al. 2016."""
    return lam * (2 / (1 + math.exp(-10 * number / max(1, rounds))) - 1)


class _Reverse(torch.autograd.Function):
    """Identity whose gradient is multiplied by −λ."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, strength: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.strength = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return -ctx.strength * gradients[0], None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0].clone()


def reversed_gradient(x: Tensor, strength: float) -> Tensor:
    """x, with its gradient turned round and scaled. Ganin et al. 2016."""
    result: Tensor = _Reverse.apply(x, strength)
    return result


def unit(model: nn.Module, x: Tensor) -> Tensor:
    """(B, F) features of length 1."""
    parts: Any = model
    return F.normalize(parts.embed(x), dim=1)


def moments(features: Tensor) -> Tensor:
    """(2, F): mean and standard deviation of features (N, F)."""
    return torch.stack([features.mean(0), (features.var(0, unbiased=False) + 1e-12).sqrt()])


def moment_distance(features: Tensor, target: Tensor) -> Tensor:
    """Σ(μ − μ̄)² + (σ − σ̄)² over the features."""
    return (moments(features) - target).square().sum()
