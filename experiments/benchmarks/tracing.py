"""What did an attack hold at which CPU second? Recorded while it runs, scored afterwards, at no cost to its clock.

A recorder keeps copies of images and times. It holds no truth and no attack can read it: what it returns to the attack
is nothing. Seconds are CPU seconds of the process since the start, less those that recording itself took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from fedsec.attacks.gradinversion.observation import Observation
from fedsec.attacks.gradinversion.prior import Prior
from fedsec.attacks.gradinversion.simulation import Simulation
from torch import Tensor
from torch.func import debug_unwrap

from fedsec.metrics.image import match, mse, replace_missing, to_psnr


class Point(NamedTuple):
    """Images at a time."""

    seconds: float
    images: Tensor
    """(B, C, H, W), or (R, B, C, H, W) where R restarts run side by side."""


@dataclass
class Recorder:
    """Iterates of one attack, with net CPU seconds."""

    shape: tuple[int, ...]
    """(B, C, H, W)."""
    points: list[Point] = field(default_factory=list)
    cost: float = 0.0
    """CPU seconds that recording took."""
    started: float = field(default_factory=lambda: time.process_time())

    @property
    def seconds(self) -> float:
        """Net CPU seconds since the start."""
        return time.process_time() - self.started - self.cost

    def record(self, images: Tensor | Callable[[], Tensor]) -> None:
        """Keep a copy of images in [0, 1], or of what a function makes of the attack's own.

        Images of another shape (public ones, one of a batch) are no iterates.
        """
        now = time.process_time()
        plain = debug_unwrap(images() if callable(images) else images, recurse=True)
        if plain.shape[-len(self.shape) :] == self.shape and plain.ndim - len(self.shape) in (0, 1):
            copy = debug_unwrap(plain.detach().float().clone(), recurse=True)
            self.points.append(Point(now - self.started - self.cost, copy))
        self.cost += time.process_time() - now


@dataclass(frozen=True)
class RecordedSimulation(Simulation):
    """φ that tells a recorder at which images it was evaluated, and else is what it was."""

    recorder: Recorder | None = None

    def parts(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        assert self.recorder is not None
        self.recorder.record(x)
        return super().parts(x, y)


def recorded(observation: Observation, recorder: Recorder) -> Observation:
    """The same observation; every image at which an attack evaluates it is recorded."""
    plain = {f.name: getattr(observation.simulation, f.name) for f in fields(Simulation)}
    return replace(observation, simulation=RecordedSimulation(**plain, recorder=recorder))


def curve(points: Sequence[Point], chosen: Tensor, truth: Tensor, prior: Prior) -> list[tuple[float, float]]:
    """(seconds, dB) at which an iterate was nearer to the truth than all before it.

    dB is the PSNR of the batch's mean squared error after matching. Of restarts that run side by side the one nearest
    to the images finally handed in counts, not the one nearest to the truth. Public images and their mean, at which an
    attack evaluates the model for its labels and its baseline, are no iterates.
    """
    public = {image.numpy().tobytes() for image in (prior.mean, *prior.images)}
    best: list[tuple[float, float]] = []
    for seconds, images in points:
        batch = nearest(images, chosen) if images.ndim > truth.ndim else images
        if any(image.numpy().tobytes() in public for image in batch):
            continue
        psnr = batch_psnr(batch, truth, prior.mean)
        if not best or psnr > best[-1][1]:
            best.append((seconds, psnr))
    return best


def nearest(restarts: Tensor, chosen: Tensor) -> Tensor:
    """The batch (B, C, H, W) of `restarts` (R, B, C, H, W) nearest to `chosen`."""
    return restarts[int(((restarts - chosen) ** 2).flatten(1).sum(1).nan_to_num(torch.inf).argmin())]


def batch_psnr(images: Tensor, truth: Tensor, mean: Tensor) -> float:
    """PSNR in dB of the mean squared error over a batch after matching; the public mean for what is not finite."""
    return float(to_psnr(mse(matched(images, truth, mean), truth).mean()))


def matched(images: Tensor, truth: Tensor, mean: Tensor) -> Tensor:
    """For each truth the reconstruction assigned to it (B, C, H, W), the public mean where there is none."""
    repaired, _ = replace_missing(images, mean)
    return torch.stack([mean.to(repaired) if i is None else repaired[i] for i in match(repaired, truth)])


def first_at(traced: Sequence[tuple[float, float]], mark: float) -> float | None:
    """Seconds to the first point of a curve at or above `mark` dB; None: never."""
    return next((seconds for seconds, psnr in traced if psnr >= mark), None)


def thinned(traced: Sequence[tuple[float, float]], most: int = 120) -> list[tuple[float, float]]:
    """At most so many points, evenly by rank on a logarithmic scale, first and last included."""
    if len(traced) <= most:
        return list(traced)
    ranks = torch.logspace(0, torch.tensor(float(len(traced))).log10().item(), most).round().long() - 1
    return [traced[i] for i in sorted({*ranks.clamp(0, len(traced) - 1).tolist(), len(traced) - 1})]
