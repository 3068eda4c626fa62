"""How much noise a client puts on its whole update before it leaves: local differential privacy, or a heuristic."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from fedsec.defense import Defense
from fedsec.errors import ConfigError, RefusedError, RunError
from fedsec.privacy.gdp import gaussian_sigma
from fedsec.privacy.ledger import Event, Heuristic, LocalGaussian, LocalLaplace, spent
from fedsec.types import FederationPlan, PrivacySpent, RoundContext, Update

UNIT = "client (local)"
ASSUMPTIONS = (
    "every client takes part in every round",
    "unit is a client's whole update against any other update of bounded norm",
    "simulation noise: anybody with the seed can remove it",
)


@dataclass(frozen=True)
class UpdateNoise(Defense, ABC):
    """Noise on the update. With `clip` it is local differential privacy, without it a heuristic that has no ε."""

    order: ClassVar[Literal[1, 2]]
    """The norm that bounds the sensitivity."""

    sigma: Annotated[
        float | None,
        Field(ge=0, description="standard deviation per entry; 0.01 (percentile: 0.1) without sigma and epsilon"),
    ] = None
    epsilon: Annotated[float | None, Field(gt=0, description="budget of the whole run; needs clip")] = None
    clip: Annotated[float | None, Field(gt=0, description="largest norm of the update; makes it local DP")] = None
    scaling: Annotated[
        Literal["absolute", "percentile"],
        Field(description="percentile: sigma counts in 95th percentiles of the update's non-zero magnitudes"),
    ] = "absolute"
    plan: FederationPlan | None = field(default=None, repr=False, metadata={"internal": True})
    """Filled in by `calibrate`."""

    def __post_init__(self) -> None:
        if self.sigma is not None and self.epsilon is not None:
            raise ConfigError(f"{self.name}: give sigma or epsilon, not both")
        if self.epsilon is not None and self.clip is None:
            raise ConfigError(f"{self.name}: epsilon={self.epsilon:g} needs a bounded update; add clip, such as clip=1")
        if self.scaling == "percentile" and (self.clip is not None or self.epsilon is not None):
            raise ConfigError(
                f"{self.name}: scaling=percentile takes its noise from the update itself and has no epsilon; "
                "leave clip and epsilon out, or use scaling=absolute"
            )

    def calibrate(self, plan: FederationPlan) -> Self:
        """Remember the rounds and clients over which the budget is composed."""
        return replace(self, plan=plan)

    @property
    def std(self) -> float:
        """Standard deviation per entry, in units of the update's 95th percentile where scaling is `percentile`."""
        if self.epsilon is not None:
            return self.calibrated_std()
        if self.sigma is not None:
            return self.sigma
        return 0.1 if self.scaling == "percentile" else 0.01

    def on_upload(self, update: Update, ctx: RoundContext) -> Update:
        """Clip where asked, then add noise to every entry; at strength 0 the update itself.

        Raises:
            RefusedError: tensors would travel beside a differentially private update without noise.
        """
        delta = update.delta
        if self.clip is not None:
            if self.std > 0 and (update.buffers is not None or update.extras):
                raise RefusedError(
                    f"{self.name}: client {update.client} would send other tensors without noise beside its update, "
                    "which leaves no epsilon; use a model without running statistics and a strategy without reports"
                )
            delta = clip_norm(delta, self.clip, self.order)
        std = self.std * (percentile_95(delta) if self.scaling == "percentile" else 1.0)
        if std > 0:
            delta = delta + self.draw(delta, std, ctx.generator(f"{self.name}-noise", delta.device))
        return update if delta is update.delta else replace(update, delta=delta)

    def releases(self, ctx: RoundContext) -> Sequence[Event]:
        """One noised update; without `clip` written down as the heuristic that it is."""
        assert ctx.client is not None
        if self.std == 0:
            return ()
        if self.clip is None:
            settings = {"std": self.std, "scaling": self.scaling}
            return (Heuristic(ctx.client, ctx.round, UNIT, f"{self.name} noise", settings),)
        return (replace(self.event(ctx.client, 1), round=ctx.round),)

    def public_knowledge(self, client: int) -> Mapping[str, Any]:
        """Clip norm and noise; where the noise follows the update, its ratio to the 95th percentile."""
        known: dict[str, Any] = {}
        if self.clip is not None:
            known |= {"clip_norm": self.clip, "clip_scope": "update", "clip_order": self.order}
        if self.std > 0:
            key = "noise_std" if self.scaling == "absolute" else "noise_per_percentile_95"
            known |= {"noise": self.name, key: self.std}
        return known

    def privacy(self) -> PrivacySpent | None:
        """What all rounds spend together; None without `clip` or noise."""
        if self.clip is None or self.plan is None or self.std == 0:
            return None
        events = [self.event(client, self.plan.rounds) for client in range(len(self.plan.client_sizes))]
        return spent(events, self.claimed_delta, UNIT, ASSUMPTIONS)

    @property
    @abstractmethod
    def claimed_delta(self) -> float:
        """The δ of the claim."""

    @abstractmethod
    def calibrated_std(self) -> float:
        """The standard deviation that spends exactly `epsilon` over all rounds."""

    @abstractmethod
    def event(self, client: int, releases: int) -> Event:
        """The ledger's entry for all releases of one client together."""

    @abstractmethod
    def draw(self, like: Tensor, std: float, generator: torch.Generator) -> Tensor:
        """Independent noise of this standard deviation, in the shape of `like`."""

    def planned(self) -> FederationPlan:
        """The plan that the budget is composed over.

        Raises:
            RunError: `calibrate` was not called.
        """
        if self.plan is None:
            raise RunError(f"{self.name}: a budget is spread over all rounds; call calibrate(plan) before training")
        return self.plan


@dataclass(frozen=True)
class Gaussian(UpdateNoise):
    """Gaussian noise on the update, calibrated by the exact profile (Balle & Wang 2018) over all rounds."""

    name: ClassVar[str] = "gaussian"
    protects: ClassVar[str] = "a client's update, against the server: Gaussian noise (with clip: local DP)"
    order: ClassVar[Literal[1, 2]] = 2

    delta: Annotated[float, Field(gt=0, lt=1, description="δ of the budget; must be below 1/clients")] = 1e-5

    def calibrate(self, plan: FederationPlan) -> Self:
        """Remember the rounds and clients over which the budget is composed.

        Raises:
            RefusedError: δ is not below 1/clients.
        """
        if self.clip is not None and self.delta >= 1 / len(plan.client_sizes):
            raise RefusedError(f"gaussian: delta={self.delta:g} is not below 1/clients; use delta=1e-5")
        return super().calibrate(plan)

    def calibrated_std(self) -> float:
        """σ for two updates that differ by at most twice the clip norm, in every round."""
        assert self.epsilon is not None and self.clip is not None
        return gaussian_sigma(self.epsilon, self.delta, 2 * self.clip, self.planned().rounds)

    def draw(self, like: Tensor, std: float, generator: torch.Generator) -> Tensor:
        """Normal noise."""
        return torch.empty_like(like).normal_(0.0, std, generator=generator)

    @property
    def claimed_delta(self) -> float:
        """As asked for."""
        return self.delta

    def event(self, client: int, releases: int) -> Event:
        """Composed exactly, as Gaussian differential privacy."""
        assert self.clip is not None
        return LocalGaussian(client, 0, UNIT, self.std, 2 * self.clip, releases)


@dataclass(frozen=True)
class Laplace(UpdateNoise):
    """Laplace noise on the update, for an L1 sensitivity.

    The L1 norm of d entries can be √d times their L2 norm: with `clip` expect little utility at a useful ε.
    """

    name: ClassVar[str] = "laplace"
    protects: ClassVar[str] = "a client's update, against the server: Laplace noise (with clip: pure local DP)"
    order: ClassVar[Literal[1, 2]] = 1

    def calibrated_std(self) -> float:
        """√2 b with b = 2 clip rounds/ε: every round spends an equal share of the budget."""
        assert self.epsilon is not None and self.clip is not None
        return math.sqrt(2) * 2 * self.clip * self.planned().rounds / self.epsilon

    def draw(self, like: Tensor, std: float, generator: torch.Generator) -> Tensor:
        """The difference of two exponential variables is Laplace distributed."""
        rate = math.sqrt(2) / std
        positive = torch.empty_like(like).exponential_(rate, generator=generator)
        return positive - torch.empty_like(like).exponential_(rate, generator=generator)

    @property
    def claimed_delta(self) -> float:
        """Pure differential privacy."""
        return 0.0

    def event(self, client: int, releases: int) -> Event:
        """Composed by adding up."""
        assert self.clip is not None
        return LocalLaplace(client, 0, UNIT, self.std / math.sqrt(2), 2 * self.clip, releases)


def clip_norm(vector: Tensor, bound: float, order: Literal[1, 2]) -> Tensor:
    """Scale a vector down to a norm of at most `bound`; a shorter one stays as it is."""
    norm = torch.linalg.vector_norm(vector, order)
    return vector * (bound / norm) if norm > bound else vector


def percentile_95(vector: Tensor) -> float:
    """95th percentile of the magnitudes of the non-zero entries; 0 where there are none."""
    magnitudes = vector[vector != 0].abs()
    if magnitudes.numel() == 0:
        return 0.0
    return float(magnitudes.kthvalue(math.ceil(0.95 * magnitudes.numel())).values)
