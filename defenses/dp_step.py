"""What one private step does: Poisson batches, per-image clipping, noise on the sum, a constant divisor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsec.defense import LocalStep
from fedsec.errors import RefusedError
from fedsec.types import RoundContext

from .per_sample import per_sample_gradients

MAX_GRADIENT_BYTES = 2**29
"""Larger batches are taken in pieces, so that the gradients of all images never lie in memory together."""


@dataclass(frozen=True)
class Schedule:
    """One client's noise and sampling."""

    num_images: int
    noise_multiplier: float
    q: float
    """Probability that one image enters a step."""
    steps: int
    """Steps a round."""
    rounds: int

    @property
    def expected_batch(self) -> float:
        """The constant that sums of gradients are divided by; never the size of a batch that was drawn."""
        return self.q * self.num_images


class PrivateStep:
    """A client's step with Poisson batches, per-image clipping and noise. Lives for one round of one client.

    The inner step computes its loss, which must be a mean over images, and calls its optimiser, which is replaced by
    one that clips and adds noise before it steps.
    """

    def __init__(self, inner: LocalStep, schedule: Schedule, clip: float, ctx: RoundContext) -> None:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        self.inner = inner
        self.model = inner.model
        self.schedule = schedule
        self._ctx = ctx
        self._rules = GradSampleModule.GRAD_SAMPLERS
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._piece = max(1, MAX_GRADIENT_BYTES // (4 * sum(p.numel() for p in parameters)))
        self.optimizer: Any = DPOptimizer(
            inner.optimizer,
            noise_multiplier=schedule.noise_multiplier,
            max_grad_norm=clip,
            expected_batch_size=schedule.expected_batch,
            generator=ctx.generator("dp-noise", parameters[0].device),
        )
        self.optimizer.attach_step_hook(_match_strides)
        inner.optimizer = self.optimizer

    def batches(self, size: int, ctx: RoundContext) -> Iterator[Tensor]:
        """Poisson batches: each image enters each of them independently with probability q; some may be empty."""
        generator = self._ctx.generator("dp-sampling")
        for _ in range(self.schedule.steps):
            yield (torch.rand(size, generator=generator) < self.schedule.q).nonzero().squeeze(1)

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
        if len(x) == 0:
            return self._empty_step(x)
        total = torch.zeros((), device=x.device)
        pieces = list(zip(x.split(self._piece), y.split(self._piece), strict=True))
        for number, (images, labels) in enumerate(pieces, start=1):
            self.optimizer.signal_skip_step(number < len(pieces))
            with per_sample_gradients(self.model, self._rules, len(images)):
                total += self.inner(images, labels) * len(images)
        return total / len(x)

    def _empty_step(self, x: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
        self.optimizer.step()
        return torch.zeros((), device=x.device)


def _match_strides(optimizer: Any) -> None:
    """Fused optimisers read gradients in the memory order of the parameter, whatever their strides say."""
    for parameter in optimizer.params:
        if parameter.grad.stride() != parameter.stride():
            parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
