"""How clients train with differential privacy: DP-SGD with a budget that is composed over the whole run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field
from torch import nn

from fedsec.defense import Defense, LocalStep
from fedsec.errors import ConfigError, RefusedError, RunError
from fedsec.privacy.accounting import calibrate_noise
from fedsec.privacy.ledger import DPSGDSteps, spent
from fedsec.types import FederationPlan, PrivacySpent, RoundContext, Update

from .dp_model import make_private
from .dp_step import PrivateStep, Schedule


@dataclass(frozen=True)
class DPSGD(Defense):
    """DP-SGD (Abadi et al. 2016): Poisson batches, clipped per-image gradients, Gaussian noise on their sum.

    Each client's noise multiplier is chosen so that the whole run spends `epsilon` at that client: by its own number of
    images, all its steps and all rounds. Every step, an empty one too, adds noise and counts.
    """

    name: ClassVar[str] = "dp"
    protects: ClassVar[str] = "single images, against everyone outside their hospital: DP-SGD with a total budget"

    epsilon: Annotated[float, Field(gt=0, description="budget of the whole run, for one image of one client")] = 8.0
    delta: Annotated[
        float | None, Field(gt=0, lt=1, description="must be below 1/images; min(1e-5, 1/(10 images)) if not given")
    ] = None
    clip: Annotated[float, Field(gt=0, description="largest L2 norm of one image's gradient")] = 1.0
    unit: Annotated[Literal["sample"], Field(description="what is protected: one image")] = "sample"
    noise_multiplier: Annotated[
        float | None, Field(description="noise divided by clip; replaces epsilon, which then follows from it")
    ] = None
    secure_rng: Annotated[
        bool, Field(description="draw batches and noise from the operating system's seed: not reproducible")
    ] = False
    schedules: tuple[Schedule, ...] = field(default=(), repr=False, metadata={"internal": True})
    """Per client; filled in by `calibrate`."""

    def __post_init__(self) -> None:
        if self.noise_multiplier is not None and not self.noise_multiplier > 0:
            raise RefusedError(
                f"dp: noise_multiplier={self.noise_multiplier:g} clips without noise, which is no differential "
                "privacy; choose one above 0, or give epsilon"
            )
        if not (self.epsilon > 0 and self.clip > 0):
            raise ConfigError(f"dp: epsilon={self.epsilon:g}, clip={self.clip:g}: both must be above 0")

    def calibrate(self, plan: FederationPlan) -> Self:
        """Choose δ, and the noise multiplier of every client.

        Raises:
            RefusedError: δ is not below 1/n for the largest client, so that losing one image's privacy outright would
                be within the guarantee.
        """
        largest = max(plan.client_sizes)
        delta = min(1e-5, 1 / (10 * largest)) if self.delta is None else self.delta
        if delta >= 1 / largest:
            raise RefusedError(
                f"dp: delta={delta:g} is not below 1/{largest}, the largest client's images; "
                f"use delta={1 / (10 * largest):.1g} or leave it out"
            )
        schedules = []
        for client, size in enumerate(plan.client_sizes):
            if size == 0:
                raise ConfigError(f"dp: client {client} has no images; give fewer clients or another partition")
            q = min(1.0, plan.recipe.batch_size / size)
            steps = plan.steps_per_round(client)
            z = self.noise_multiplier or calibrate_noise(self.epsilon, delta, q, steps * plan.rounds)
            schedules.append(Schedule(size, z, q, steps, plan.rounds))
        return replace(self, delta=delta, schedules=tuple(schedules))

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """GroupNorm for BatchNorm, and nothing in place."""
        return make_private(model)

    def local_step(self, step: LocalStep, ctx: RoundContext) -> LocalStep:
        """Private batches and private gradients around the client's own loss and optimiser."""
        if ctx.client is None or ctx.client >= len(self.schedules):
            raise RunError(f"dp: client {ctx.client} has no noise multiplier; call calibrate(plan) before training")
        return PrivateStep(step, self.schedules[ctx.client], self.clip, self._randomness(ctx))

    def on_upload(self, update: Update, ctx: RoundContext) -> Update:
        """The update as it is: it was made of noised gradients alone.

        Raises:
            RefusedError: buffers travel beside it; they are statistics of private images without noise.
        """
        if update.buffers is not None:
            raise RefusedError(
                f"dp: client {update.client} would send {update.buffers.numel()} buffer values without noise; "
                "use a model without running statistics"
            )
        return update

    def public_knowledge(self, client: int) -> Mapping[str, Any]:
        """Everything but the noise. Noise and batch size differ by client, so that a sum's are not given."""
        known: dict[str, Any] = {"clip_norm": self.clip, "clip_scope": "sample", "clip_order": 2, "noise": "gaussian"}
        if 0 <= client < len(self.schedules):
            schedule = self.schedules[client]
            known |= {"noise_multiplier": schedule.noise_multiplier, "batch_divisor": schedule.expected_batch}
        return known

    def privacy(self) -> PrivacySpent | None:
        """The largest ε of any client over all rounds; None before `calibrate`."""
        if self.delta is None or not self.schedules:
            return None
        events = [
            DPSGDSteps(
                k, 0, self.unit, s.noise_multiplier, s.q, s.steps * s.rounds, self.clip, s.num_images, s.expected_batch
            )
            for k, s in enumerate(self.schedules)
        ]
        randomness = (
            "noise seeded by the operating system, not reproducible; not hardened against floating-point attacks"
            if self.secure_rng
            else "simulation noise: anybody with the seed can remove it"
        )
        assumptions = (
            "Poisson sampling",
            "every client takes part in every round",
            "client sizes are public",
            "unit is one image: a patient with k images has k times this epsilon",
            "training losses in the log carry no noise",
            randomness,
        )
        return spent(events, self.delta, self.unit, assumptions)

    def _randomness(self, ctx: RoundContext) -> RoundContext:
        """Where batches and noise are drawn from; whoever knows it can undo the protection."""
        if not self.secure_rng:
            return ctx
        return replace(ctx, seed=int.from_bytes(os.urandom(8), "big"))
