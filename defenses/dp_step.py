"""What one private step does: Poisson batches, per-image clipping, noise on the sum, a constant divisor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedsec.defense import LocalStep, prescribed
from fedsec.errors import RefusedError
from fedsec.types import RoundContext

from .dp_engines import Engine, HeldOptimizer, Hooks, MicroBatch, VMap, zeros_for
from .dp_ghost import Ghost

ENGINES: Mapping[str, type[Engine]] = {e.name: e for e in (Ghost, Hooks, VMap, MicroBatch)}
MAX_BYTES = 2**30
"""Memory for the gradients of single images."""


@dataclass(frozen=True)
class Schedule:
    """One client's noise and sampling."""

    num_units: int
    """Images or patients."""
    noise_multiplier: float
    q: float
    """Probability that one unit enters a step."""
    steps: int
    """Steps a round."""
    rounds: int
    patients: tuple[int, ...] | None = None
    """Patient of each image, where patients are the unit."""
    images_per_unit: int = 1
    """Of one patient in one step, at most."""
    sampler: Literal["poisson", "shuffle"] = "poisson"
    allowed: int | None = None
    """Steps of the whole run that the budget covers, where there is a limit."""

    @property
    def expected_batch(self) -> float:
        """The constant that sums of gradients are divided by; never the size of a batch that was drawn."""
        return self.q * self.num_units


class PrivateStep:
    """A client's step with Poisson batches, clipping and noise. Lives for one round of one client.

    The inner step computes its loss, which must be a mean over images, and calls its optimiser. That is held back while
    an engine adds up clipped gradients, and steps once for the whole batch, on their noised sum.
    """

    def __init__(
        self,
        inner: LocalStep,
        schedule: Schedule,
        clip: float,
        ctx: RoundContext,
        engine: str = "ghost",
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.inner = inner
        self.model = inner.model
        self.schedule = schedule
        self.clip = clip
        self._ctx = ctx
        self._engine = ENGINES[engine](self.model, max_bytes)
        held: Any = HeldOptimizer(inner.optimizer)
        self._held: HeldOptimizer = held
        self.optimizer: Any = held
        inner.optimizer = held
        self._noise = ctx.generator("dp-noise", self._engine.parameters[0].device)
        self._units: Tensor | None = None

    def batches(self, size: int, ctx: RoundContext) -> Iterator[Tensor]:
        """Poisson batches: each unit enters each of them independently with probability q; some may be empty.

        Of a patient as the unit at most `images_per_unit` images enter, drawn at random.
        """
        if self.schedule.sampler == "shuffle":
            yield from self.inner.batches(size, self._ctx)
            return
        generator = self._ctx.generator("dp-sampling")
        patients = self.schedule.patients
        owned = None if patients is None else images_of(patients, size)
        for _ in range(self.schedule.steps):
            count = size if owned is None else len(owned)
            chosen = (torch.rand(count, generator=generator) < self.schedule.q).nonzero().squeeze(1)
            if owned is None:
                yield chosen
                continue
            taken = [some(owned[k], self.schedule.images_per_unit, generator) for k in chosen.tolist()]
            self._units = torch.repeat_interleave(torch.tensor([len(t) for t in taken], dtype=torch.long))
            yield torch.cat(taken) if taken else chosen

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One private step on a batch of any size; returns the mean loss (0 where the batch is empty).

        Raises:
            RefusedError: unknown labels, which make the loss of one image depend on the other images of its batch.
        """
        if y.is_floating_point() and bool(torch.isnan(y).any()):
            raise RefusedError(
                "dp: unknown labels (NaN) make an image's gradient depend on its batch, so that clipping bounds "
                "nothing; fill them in or leave these images out"
            )
        units, self._units = self._units, None
        units = torch.arange(len(x), device=x.device) if units is None else units.to(x.device)
        sums = zeros_for(self._engine.parameters)
        loss = torch.zeros((), device=x.device)
        if len(x):
            loss = self._add(x, y, units, sums)
        self._release(sums)
        return loss

    def _add(self, x: Tensor, y: Tensor, units: Tensor, sums: dict[nn.Parameter, Tensor]) -> Tensor:
        """Clipped gradients into `sums`: by the engine, or, of an audit's canaries, one unit after the other."""
        canary = prescribed(self.inner, y)
        if canary is None:
            return self._engine.add(self._run, x, y, units, self.clip, sums)
        single = MicroBatch(self.model, MAX_BYTES)
        if int(units[-1]) + 1 < len(units):  # images of one unit are clipped together
            return single.add(self._run, x, y, units, self.clip, sums)
        total = torch.zeros((), device=x.device)
        for mask, engine in ((canary, single), (~canary, self._engine)):
            if count := int(mask.sum()):
                total += engine.add(self._run, x[mask], y[mask], units[:count], self.clip, sums) * count
        return total / len(x)

    def _run(self, x: Tensor, y: Tensor, collect: Callable[[], None]) -> Tensor:
        self._held.collect = collect
        return self.inner(x, y)

    def _release(self, sums: dict[nn.Parameter, Tensor]) -> None:
        """Noise on the sum, the constant divisor, and the client's own optimiser."""
        std = self.schedule.noise_multiplier * self.clip
        for parameter, total in sums.items():
            noise = torch.empty(total.shape, device=total.device, dtype=total.dtype)
            total.add_(noise.normal_(0.0, std, generator=self._noise)).div_(self.schedule.expected_batch)
            parameter.grad = total
        self._held.optimizer.step()


def images_of(patients: tuple[int, ...], size: int) -> list[Tensor]:
    """Patient -> its images' indices; images beyond the list (an adversary's own) are a patient each."""
    rows: dict[int, list[int]] = {}
    for index in range(size):
        key = patients[index] if index < len(patients) else -1 - index
        rows.setdefault(key, []).append(index)
    return [torch.tensor(images) for images in rows.values()]


def some(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most so many of a patient's images, drawn at random."""
    if len(images) <= most:
        return images
    return images[torch.randperm(len(images), generator=generator)[:most]]
