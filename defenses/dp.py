"""How clients train with differential privacy: DP-SGD with a budget that is composed over the whole run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field
from torch import nn

from fedsec.defense import Defense, LocalStep
from fedsec.errors import ConfigError, RefusedError, RunError
from fedsec.privacy.ledger import DPSGDSteps, Event, spent
from fedsec.types import FederationPlan, PrivacySpent, RoundContext, Update

from .dp_model import make_private
from .dp_probe import choose
from .dp_schedule import delta_for, noise_for, patients_of, schedule_of, step_budget, without_amplification
from .dp_step import PrivateStep, Schedule


@dataclass(frozen=True)
class DPSGD(Defense):
    """DP-SGD (Abadi et al. 2016): Poisson batches, gradients of images or patients clipped, Gaussian noise on the sum.

    Each client's noise multiplier is chosen so that the whole run spends `epsilon` at that client: by its own number of
    images or patients, all its steps and all rounds. Every step, an empty one too, adds noise and counts.
    """

    name: ClassVar[str] = "dp"
    protects: ClassVar[str] = "images or patients, against everyone outside their hospital: DP-SGD with a total budget"

    epsilon: Annotated[float, Field(gt=0, description="budget of the whole run, for one image or patient")] = 8.0
    delta: Annotated[
        float | None, Field(gt=0, lt=1, description="must be below 1/units; min(1e-5, 1/(10 units)) if not given")
    ] = None
    clip: Annotated[float, Field(gt=0, description="largest L2 norm of one image's (patient's mean) gradient")] = 1.0
    unit: Annotated[
        Literal["sample", "patient"], Field(description="what is protected: one image, or all images of one patient")
    ] = "sample"
    k_max: Annotated[int, Field(ge=1, description="unit=patient: images of one patient in one step, at most")] = 8
    images_per_patient: Annotated[
        int | None,
        Field(ge=1, description="without patient ids: promise at most so many; group accounting"),
    ] = None
    noise_multiplier: Annotated[
        float | None, Field(description="noise divided by clip; replaces epsilon, which then follows from it")
    ] = None
    max_epsilon: Annotated[float | None, Field(gt=0, description="a client stops training before it spends more")] = (
        None
    )
    sampler: Annotated[
        Literal["poisson", "shuffle"], Field(description="shuffle: needs assume_poisson, no proof covers it")
    ] = "poisson"
    assume_poisson: Annotated[
        bool, Field(description="account for shuffled batches as if they were Poisson; the result says so")
    ] = False
    engine: Annotated[
        Literal["auto", "ghost", "hooks", "vmap", "microbatch"],
        Field(description="how gradients are clipped; auto: the fastest of one private step each"),
    ] = "auto"
    max_memory: Annotated[float, Field(gt=0, description="GB for the gradients of single images")] = 1.0
    secure_rng: Annotated[
        bool, Field(description="draw batches and noise from the operating system's seed: not reproducible")
    ] = False
    schedules: tuple[Schedule, ...] = field(default=(), repr=False, metadata={"internal": True})
    """Per client; filled in by `calibrate`."""
    chosen: tuple[str, str] = field(default=("", ""), repr=False, metadata={"internal": True})
    """The engine that is used, and why; filled in by `measure`."""

    def __post_init__(self) -> None:
        if self.noise_multiplier is not None and not self.noise_multiplier > 0:
            raise RefusedError(
                f"dp: noise_multiplier={self.noise_multiplier:g} clips without noise, which is no differential "
                "privacy; choose one above 0, or give epsilon"
            )
        if not (self.epsilon > 0 and self.clip > 0):
            raise ConfigError(f"dp: epsilon={self.epsilon:g}, clip={self.clip:g}: both must be above 0")
        if self.sampler == "shuffle" and not self.assume_poisson:
            raise RefusedError(
                "dp: no accountant here covers shuffled batches; use sampler=poisson, or assume_poisson=true to get "
                "the epsilon of Poisson sampling under that assumption"
            )
        if self.sampler == "shuffle" and self.unit == "patient":
            raise ConfigError("dp: unit=patient draws patients, which needs sampler=poisson")
        if self.images_per_patient is not None and self.unit != "patient":
            raise ConfigError("dp: images_per_patient belongs to unit=patient; add it, or leave images_per_patient out")

    @property
    def group(self) -> int:
        """Clipped images that one protected unit may have (group accounting)."""
        return self.images_per_patient or 1

    def calibrate(self, plan: FederationPlan) -> Self:
        """Choose δ, and the noise multiplier of every client.

        Raises:
            RefusedError: δ is not below 1/n for the largest client, or patients are not known or not kept together.
        """
        by_patient = self.unit == "patient" and self.images_per_patient is None
        ids = patients_of(plan) if by_patient else (None,) * len(plan.client_sizes)
        drafts = [schedule_of(k, plan, patients, self.k_max if by_patient else 1) for k, patients in enumerate(ids)]
        what = "patients" if by_patient else "images"
        delta = delta_for(max(d.num_units for d in drafts), self.delta, what)
        schedules = []
        for draft in drafts:
            z = self.noise_multiplier or noise_for(self.epsilon, delta, draft.q, draft.steps * draft.rounds, self.group)
            ready = replace(draft, noise_multiplier=z, sampler=self.sampler)
            schedules.append(replace(ready, allowed=step_budget(ready, delta, self.max_epsilon, self.group)))
        return replace(self, delta=delta, schedules=tuple(schedules))

    def measure(self, model: nn.Module, image_shape: tuple[int, int, int]) -> Self:
        """Take one private step with each engine, and keep to the fastest that works."""
        if self.engine != "auto" or not self.schedules:
            return self
        units = max(1, round(max(s.expected_batch for s in self.schedules)))
        repeated = any(s.patients is not None for s in self.schedules)
        return replace(self, chosen=choose(model, image_shape, units, repeated, self.max_bytes))

    @property
    def max_bytes(self) -> int:
        """`max_memory` in bytes."""
        return int(self.max_memory * 1e9)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """GroupNorm for BatchNorm, and nothing in place."""
        return make_private(model)

    def local_step(self, step: LocalStep, ctx: RoundContext) -> LocalStep:
        """Private batches and private gradients around the client's own loss and optimiser."""
        if ctx.client is None or ctx.client >= len(self.schedules):
            raise RunError(f"dp: client {ctx.client} has no noise multiplier; call calibrate(plan) before training")
        engine = self.chosen[0] or ("ghost" if self.engine == "auto" else self.engine)
        schedule = self.schedules[ctx.client]
        return PrivateStep(step, schedule, self.clip, self._randomness(ctx), engine, self.max_bytes)

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

    def releases(self, ctx: RoundContext) -> Sequence[Event]:
        """One event with all steps of this round."""
        assert ctx.client is not None
        return (self._event(ctx.client, ctx.round, self.schedules[ctx.client].steps),)

    def allowance(self, client: int) -> int | None:
        """Steps that `max_epsilon` covers."""
        return self.schedules[client].allowed

    def privacy(self) -> PrivacySpent | None:
        """The largest ε of any client over all rounds; None before `calibrate`."""
        if self.delta is None or not self.schedules:
            return None
        events = []
        for client, schedule in enumerate(self.schedules):
            planned = schedule.steps * schedule.rounds
            steps = planned if schedule.allowed is None else min(planned, schedule.allowed)
            events.append(self._event(client, 0, steps))
        return spent(events, self.delta, self.unit, self._assumptions())

    def notes(self) -> tuple[str, ...]:
        """Which engine clipped, and where `max_epsilon` cuts the training short."""
        short = [k for k, s in enumerate(self.schedules) if s.allowed is not None and s.allowed < s.steps * s.rounds]
        stop = f"dp: max_epsilon={self.max_epsilon:g} stops {len(short)} clients early" if short else ""
        return tuple(filter(None, (self.chosen[1], stop)))

    def _event(self, client: int, number: int, steps: int) -> DPSGDSteps:
        s = self.schedules[client]
        return DPSGDSteps(
            client,
            number,
            self.unit,
            s.noise_multiplier,
            s.q,
            steps,
            self.clip,
            s.num_units,
            s.expected_batch,
            sampler=self.sampler,
            group=self.group,
            rng="system" if self.secure_rng else "seeded",
        )

    def _assumptions(self) -> tuple[str, ...]:
        randomness = (
            "noise seeded by the operating system, not reproducible; not hardened against floating-point attacks"
            if self.secure_rng
            else "simulation noise: anybody with the seed can remove it"
        )
        if self.unit == "sample":
            unit = "unit is one image: a patient with k images has k times this epsilon"
        elif self.group > 1:
            unit = f"no patient has more than {self.group} images at a client (promised with images_per_patient)"
        else:
            unit = f"unit is a patient: at most {self.k_max} of its images enter a step, clipped together"
        return (
            self._sampling(),
            "each client's own steps in the rounds it took part in; who took part is public",
            "client sizes are public",
            unit,
            "training losses in the log carry no noise",
            randomness,
        )

    def _sampling(self) -> str:
        if self.sampler == "poisson":
            return "Poisson sampling"
        assert self.delta is not None
        worst = max(without_amplification(s, self.delta) for s in self.schedules)
        return (
            "assumes Poisson sampling, but this run shuffled: audits of shuffled training found up to 4 times the "
            f"claimed leakage; without amplification epsilon is {worst:.2f}"
        )

    def _randomness(self, ctx: RoundContext) -> RoundContext:
        """Where batches and noise are drawn from; whoever knows it can undo the protection."""
        if not self.secure_rng:
            return ctx
        return replace(ctx, seed=int.from_bytes(os.urandom(8), "big"))
