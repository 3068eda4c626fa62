"""How a trusted server makes the sum of clipped updates private: central differential privacy for whole clients.

The release of a round is A = (Σ_k Δ_k min(1, S/‖Δ_k‖) + N(0, z²S²I)) / W. Source: McMahan, Ramage, Talwar & Zhang 2018,
"Learning differentially private recurrent language models", algorithm 1, with the fixed denominator of its estimator f.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from fedsec.defense import Aggregation, Aggregator, Defense
from fedsec.errors import RefusedError, RunError
from fedsec.privacy.accounting import Gaussian, affordable_steps, calibrate_noise
from fedsec.privacy.ledger import Event, GaussianSum, spent
from fedsec.types import FederationPlan, Payload, PrivacySpent, RoundContext, Update

from .noise import clip_norm

UNIT = "client (central)"
FEW = 20
"""With so many clients or fewer, the noise of a useful ε drowns the update."""


@dataclass(frozen=True)
class ClientDP(Defense):
    """Clients clip their whole update, the server adds noise once, to the sum. The server sees every update.

    Clients are accounted for every round that they took part in, without amplification: who took part is no secret.
    With few hospitals the noise of a useful ε is far larger than the update; `dp:unit=patient` is for them.
    """

    name: ClassVar[str] = "dp_client"
    protects: ClassVar[str] = "whole clients, in the released model, if the server is trusted: noise on the sum"

    epsilon: Annotated[float, Field(gt=0, description="budget of the whole run, for one client's contribution")] = 8.0
    delta: Annotated[float | None, Field(gt=0, lt=1, description="must be below 1/clients; 1e-5 if not given")] = None
    clip: Annotated[float, Field(gt=0, description="largest L2 norm of a client's update")] = 1.0
    noise_multiplier: Annotated[
        float | None, Field(description="noise divided by clip; replaces epsilon, which then follows from it")
    ] = None
    max_epsilon: Annotated[
        float | None, Field(gt=0, description="a client takes part in no further round that would spend more")
    ] = None
    expected: Annotated[
        float | None,
        Field(
            gt=0,
            description="divisor of the noised sum; the clients that the participation lets expect if not given",
        ),
    ] = None
    secure_rng: Annotated[bool, Field(description="draw noise from the operating system's seed: not reproducible")] = (
        False
    )
    plan: FederationPlan | None = field(default=None, repr=False, metadata={"internal": True})
    """Filled in by `calibrate`."""

    def __post_init__(self) -> None:
        if self.noise_multiplier is not None and not self.noise_multiplier > 0:
            raise RefusedError(
                f"dp_client: noise_multiplier={self.noise_multiplier:g} clips without noise, which is no differential "
                "privacy; choose one above 0, or give epsilon"
            )

    def calibrate(self, plan: FederationPlan) -> Self:
        """Choose δ, and with it the noise.

        Raises:
            RefusedError: δ is not below 1/clients.
        """
        clients = len(plan.client_sizes)
        delta = 1e-5 if self.delta is None else self.delta
        if delta >= 1 / clients:
            raise RefusedError(f"dp_client: delta={delta:g} is not below 1/{clients}, the clients; use delta=1e-5")
        z = self.noise_multiplier or calibrate_noise(self.epsilon, delta, 1.0, plan.rounds)
        return replace(self, delta=delta, noise_multiplier=z, plan=plan)

    @property
    def divisor(self) -> float:
        """What the noised sum is divided by in every round.

        Raises:
            RunError: `calibrate` was not called.
        """
        if self.expected is not None:
            return self.expected
        if self.plan is None:
            raise RunError("dp_client: the divisor is fixed before training; call calibrate(plan)")
        return self.plan.clients_per_round or len(self.plan.client_sizes)

    def on_upload(self, update: Update, ctx: RoundContext) -> Update:
        """Clip the update, all tensors together.

        Raises:
            RefusedError: tensors would travel beside it, on which the server puts no noise.
        """
        if update.buffers is not None or update.extras:
            raise RefusedError(
                f"dp_client: client {update.client} would send other tensors beside its update, which get no noise; "
                "use a model without running statistics and a strategy without reports"
            )
        delta = clip_norm(update.delta, self.clip, 2)
        return update if delta is update.delta else replace(update, delta=delta)

    def aggregator(self) -> Aggregator:
        """The noised sum."""
        return NoisedSum(self)

    def public_knowledge(self, client: int) -> Mapping[str, Any]:
        """The clip norm; the server sees each update before the noise."""
        return {"clip_norm": self.clip, "clip_scope": "update", "clip_order": 2}

    def releases(self, ctx: RoundContext) -> Sequence[Event]:
        """One noised sum."""
        assert ctx.client is not None
        return (self._event(ctx.client, ctx.round, 1),)

    def allowance(self, client: int) -> int | None:
        """Rounds that `max_epsilon` covers."""
        if self.max_epsilon is None or self.plan is None:
            return None
        assert self.noise_multiplier is not None and self.delta is not None
        return affordable_steps(Gaussian(self.noise_multiplier), self.delta, self.max_epsilon, self.plan.rounds)

    def privacy(self) -> PrivacySpent | None:
        """What all rounds spend together; None before `calibrate`."""
        if self.plan is None or self.delta is None:
            return None
        rounds = self.allowance(0)
        rounds = self.plan.rounds if rounds is None else rounds
        events = [self._event(k, 0, rounds) for k in range(len(self.plan.client_sizes))]
        return spent(events, self.delta, UNIT, self._assumptions())

    def notes(self) -> tuple[str, ...]:
        """How large the noise is, where there are few clients."""
        if self.plan is None or self.plan.layout is None or len(self.plan.client_sizes) > FEW:
            return ()
        assert self.noise_multiplier is not None
        clients = len(self.plan.client_sizes)
        ratio = self.noise_multiplier * math.sqrt(self.plan.layout.size) / self.divisor
        return (
            f"dp_client: with {clients} hospitals client-level DP adds noise about {ratio:.3g} times as long as one "
            "hospital's largest allowed update; use dp:unit=patient",
        )

    def _event(self, client: int, number: int, releases: int) -> GaussianSum:
        assert self.noise_multiplier is not None
        rng = "system" if self.secure_rng else "seeded"
        return GaussianSum(client, number, UNIT, self.noise_multiplier, self.clip, releases=releases, rng=rng)

    def _assumptions(self) -> tuple[str, ...]:
        return (
            "the server is trusted: it sees every update and adds the noise",
            "who took part is public, and no sampling of clients is counted",
            "unit is everything that one client contributes",
            "noise seeded by the operating system, not reproducible; not hardened against floating-point attacks"
            if self.secure_rng
            else "simulation noise: anybody with the seed can remove it",
        )


class NoisedSum(Aggregator):
    """(Σ_k clipped update + noise)/W with a W that was fixed beforehand, never the number that replied."""

    alone: ClassVar[str] = (
        "Client-level epsilon is proven for a clipped sum; other rules have no such sensitivity bound: use dp or "
        "gaussian:epsilon=8,clip=1, which compose with every rule, or leave the rule out"
    )

    def __init__(self, settings: ClientDP) -> None:
        self.settings = settings

    def begin(self, weights: Mapping[int, float], ctx: RoundContext) -> None:
        """Start from nothing; every client counts once, whatever size it claims."""
        self._clients: list[int] = []
        self._clipped: dict[int, float] = {}
        self._sum: Tensor | None = None

    def accumulate(self, payload: Payload, ctx: RoundContext) -> None:
        """Clip again, since a malicious client did not, and add."""
        update: Update = payload.content
        delta = clip_norm(update.delta, self.settings.clip, 2)
        if delta is not update.delta:
            before = torch.linalg.vector_norm(update.delta)
            self._clipped[payload.client] = float(self.settings.clip / before)
        self._clients.append(payload.client)
        self._sum = delta.clone() if self._sum is None else self._sum.add_(delta)

    def finish(self, ctx: RoundContext) -> Aggregation:
        """Noise once, on the sum."""
        if self._sum is None:
            return Aggregation(None)
        settings = self.settings
        assert settings.noise_multiplier is not None
        own = replace(ctx, seed=int.from_bytes(os.urandom(8), "big")) if settings.secure_rng else ctx
        noise = torch.empty_like(self._sum).normal_(
            0.0, settings.noise_multiplier * settings.clip, generator=own.generator("dp-client-noise", self._sum.device)
        )
        divisor = settings.divisor
        weights = dict.fromkeys(self._clients, 1 / divisor)
        return Aggregation(self._sum.add_(noise).div_(divisor), weights=weights, clipped=self._clipped)
