"""What an update says of the labels behind it: Σ_i (p_i − e_{y_i}), and what a single image adds to that.

Local training of T steps at rate η moves the head's bias by −η·Σ_t c_t·(mean of p − e over the batch of step t), with
c_t = (1 − m^{T−t})/(1 − m) under momentum m and 1 without. The server knows the model at both ends; in between, an
image's p is taken to go linearly from one to the other (in the family of Geng et al. 2021, 2110.09074). Images of a
short last batch, and of early steps under momentum, count more; who they are is the client's secret, which widens the
likelihood.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .features import feature_function
from .label_counts import Moments
from .local_training import fixed_order
from .observation import Observation
from .simulation import Simulation

PUBLIC_IMAGES = 256
"""Public images that the moments are taken from."""
TOO_NOISY = 0.3
"""Relative noise above which the model after training is not known well enough to be used."""

Part = Callable[[Tensor, Tensor], Tensor]
"""Images and labels -> what each adds to the total, (N, C)."""


@dataclass(frozen=True)
class Exposure:
    """How much the images of a local training count, in units of one step over all of them."""

    weight: float
    """Σ_t c_t/T: 1 without momentum."""
    spread: float
    """Variance of an image's share about its mean of 1, over the orders that the client may have drawn."""
    lateness: float
    """Mean of t/T over the training, weighted by c_t: 0 for one step."""


@dataclass(frozen=True)
class Evidence:
    """Σ_i of the images' parts, as the update has it."""

    total: Tensor
    """(C,), in images."""
    noise: float
    """Standard deviation of the defense's noise on it."""
    part: Part
    spread: float
    """Of `Exposure`."""


def exposure(images: int, size: int, steps: int, momentum: float = 0.0) -> Exposure:
    """How N images in steps of `size` count; a short last batch is divided by its own size."""
    factors = [sum(momentum**k for k in range(steps - t)) / steps for t in range(steps)]
    weight = sum(factors)
    order, per_epoch = fixed_order(images, size, steps), -(-images // size)
    spread = 0.0
    for first in range(0, steps, per_epoch):
        shares = [0.0] * images
        for t in range(first, min(first + per_epoch, steps)):
            for i in order[t]:
                shares[i] = images * factors[t] / (weight * len(order[t]))
        mean = sum(shares) / images
        spread += sum((s - mean) ** 2 for s in shares) / images
    lateness = sum(f * t / steps for t, f in enumerate(factors)) / weight
    return Exposure(weight, spread, lateness)


def exposure_of(observation: Observation) -> Exposure:
    """That of the local training behind an observation."""
    simulation = observation.simulation
    size = min(simulation.batch_size or simulation.batch, simulation.batch)
    return exposure(simulation.batch, size, simulation.steps, simulation.momentum)


def bias_evidence(observation: Observation, bias: str) -> Evidence:
    """From the gradient of the head's bias. Multi-label: a part is σ(u) − y; the loss is a mean over labels, too."""
    seen, g = exposure_of(observation), observation.gradients[bias].double()
    simulation = observation.simulation
    if simulation.weight_decay:  # of one step it has been taken out already
        decay = simulation.weight_decay * (simulation.divisor or 1.0)
        before = simulation.params[bias].double()
        after = before - observation.step * g
        g = g - decay * seen.weight * ((1 - seen.lateness) * before + seen.lateness * after)
    scale = _images_in(observation) / seen.weight
    scale *= len(g) if simulation.task == "multilabel" else 1
    noise = scale * float(observation.stds[bias].max())
    return Evidence(
        scale * g, noise, _averaged(observation, seen, lambda s: contributions(s, observation, bias)), seen.spread
    )


def weight_evidence(observation: Observation, weight: str) -> Evidence:
    """From the row sums of the head's weight gradient, where it has no bias and features h ≥ 0: a part is (p − e)·Σh.

    The family of Wainakh et al. 2021 (2105.09369).
    """
    seen, dw = exposure_of(observation), observation.gradients[weight].double()

    def of(simulation: Simulation) -> Part:
        hidden = feature_function(simulation.model, weight)

        def part(x: Tensor, y: Tensor) -> Tensor:
            p = simulation.logits(x).softmax(1)
            return (p - torch.nn.functional.one_hot(y, p.shape[1])) * hidden(x).sum(1, keepdim=True)

        return part

    scale = _images_in(observation) / seen.weight
    noise = scale * float(observation.stds[weight].max()) * dw.shape[1] ** 0.5
    return Evidence(scale * dw.sum(1), noise, _averaged(observation, seen, of), seen.spread)


@torch.no_grad()
def class_moments(observation: Observation, evidence: Evidence) -> Moments:
    """Moments over public images of the class, or over all public images where the class has none."""
    prior = observation.prior
    images, labels = prior.images[:PUBLIC_IMAGES], prior.labels[:PUBLIC_IMAGES].long()
    means, covariances = [], []
    for c in range(len(evidence.total)):
        own = images[labels == c] if int((labels == c).sum()) >= 2 else images
        d = evidence.part(own, torch.full((len(own),), c, device=own.device)).double()[:, :-1]
        means.append(d.mean(0))
        covariances.append(_covariance(d))
    return Moments(torch.stack(means), torch.stack(covariances), evidence.spread)


@torch.no_grad()
def label_moments(observation: Observation, evidence: Evidence) -> list[Moments]:
    """Multi-label: for each label the moments of its entry over public images without and with it."""
    prior = observation.prior
    images, labels = prior.images[:PUBLIC_IMAGES], prior.labels[:PUBLIC_IMAGES]
    p = evidence.part(images, torch.zeros_like(labels)).double()
    found = []
    for c in range(labels.shape[1]):
        groups = [p[labels[:, c] == y, c : c + 1] for y in (0, 1)]
        groups = [g if len(g) >= 2 else p[:, c : c + 1] for g in groups]
        means = torch.stack([g.mean(0) - y for y, g in enumerate(groups)])
        found.append(Moments(means, torch.stack([_covariance(g) for g in groups]), evidence.spread))
    return found


def contributions(simulation: Simulation, observation: Observation, bias: str) -> Part:
    """What each image adds to B times the head's bias gradient, clipping included."""
    clip = simulation.sample_clip or (simulation.update_clip if observation.batch == 1 else None)
    if clip is None or simulation.task == "multilabel":
        factor = _shrinkage(observation)

        def forward(x: Tensor, y: Tensor) -> Tensor:
            u = simulation.logits(x)
            if simulation.task == "multilabel":
                return factor * (u.sigmoid() - y.nan_to_num())
            return factor * (u.softmax(1) - torch.nn.functional.one_hot(y, u.shape[1]))

        return forward
    one = replace(simulation, batch=1, steps=1, sample_clip=clip, update_clip=None, divisor=None, clients=1)
    position = simulation.names.index(bias)

    def clipped(x: Tensor, y: Tensor) -> Tensor:
        each = torch.func.vmap(lambda a, b: one.parts(a[None], b[None])[position], chunk_size=8)
        out: Tensor = each(x[:32], y[:32])
        return out

    return clipped


def _averaged(observation: Observation, seen: Exposure, of: Callable[[Simulation], Part]) -> Part:
    """An image's mean part over the training: between those of the model before and of the model after it."""
    before = of(observation.simulation)
    if seen.lateness == 0 or observation.relative_noise > TOO_NOISY:
        return before
    after = of(after_training(observation))
    return lambda x, y: (1 - seen.lateness) * before(x, y) + seen.lateness * after(x, y)


@torch.no_grad()
def after_training(observation: Observation) -> Simulation:
    """The client's model after its local training, as the update tells it."""
    model = copy.deepcopy(observation.simulation.model)
    named = dict(model.named_parameters())
    for name, moved in observation.named(observation.gradient * observation.weights).items():
        named[name].sub_(observation.step * moved)
    return replace(observation.simulation, model=model)


def _images_in(observation: Observation) -> float:
    """What the images' mean has to be multiplied by to become their sum."""
    simulation = observation.simulation
    return observation.batch if simulation.divisor is None else simulation.clients


def _covariance(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(0)
    return centred.T @ centred / max(1, len(rows) - 1)


def _shrinkage(observation: Observation) -> float:
    """Factor by which clipping of the whole update shrinks it, judged on a public batch of the same size."""
    simulation, prior = observation.simulation, observation.prior
    if simulation.update_clip is None:
        return 1.0
    whole = replace(simulation, update_clip=None)
    size = min(observation.batch, len(prior.images))
    norm = float(whole.flat(prior.images[:size], prior.labels[:size]).norm(simulation.update_clip.order))
    return min(1.0, simulation.update_clip.norm / max(norm, 1e-300))
