"""Which labels are behind an update? Read from the gradient of the last layer, never assumed.

With softmax cross-entropy the bias gradient of class c is (1/B)·Σ_i (p_ic − [y_i = c]). One image: the only negative
entry is its class (Zhao, Mopuri and Bilen 2020, iDLG). A batch: the counts of the classes, through the moments of p on
public images; on trained models that point estimate is not reliable, so a 95 % set is returned, best first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .features import feature_function
from .label_counts import COVERAGE, Moments, credible_counts, expand, largest_remainder
from .observation import Observation
from .trace import trace

Source = Literal["oracle", "recovered", "set", "guessed"]
MAX_GUESSES = 3
"""Label vectors that are tried at most."""
PUBLIC_IMAGES = 256
"""Public images that the moments are taken from."""
CLEAR = 1e-3
"""Noise on the bias gradient, relative to it, below which signs are taken at face value."""


@dataclass(frozen=True)
class Labels:
    """Candidate label vectors, the most probable first."""

    guesses: tuple[Tensor, ...]
    """Each (B,) or, multi-label, (B, L)."""
    source: Source
    detail: str


@dataclass(frozen=True)
class Head:
    """The last fully connected layer, as far as its gradient is observed."""

    weight: str | None
    bias: str | None


def find_head(observation: Observation) -> Head:
    """The layer that makes the logits; both None where its gradient is hidden or it is not fully connected."""
    model = observation.simulation.model
    recorded = trace(model, observation.prior.mean[None].clone())
    linear = recorded.find("linear")
    if not linear:
        return Head(None, None)
    call = recorded.calls[linear[-1]]
    weight, bias = recorded.name_of(call.args[1]), recorded.name_of(call.argument(2, "bias"))
    seen = observation.complete
    return Head(weight if weight in seen else None, bias if bias in seen else None)


@torch.no_grad()
def recover_labels(observation: Observation) -> Labels:
    """Recover the labels of one observation; oracle labels are passed on, and say so."""
    if observation.labels is not None:
        return Labels((observation.labels,), "oracle", "told in advance")
    head = find_head(observation)
    if head.bias is not None:
        if observation.simulation.task == "multilabel":
            return _multilabel(observation, head.bias)
        da = observation.gradients[head.bias]
        noise = float(observation.stds[head.bias].max())
        if observation.batch == 1 and noise <= CLEAR * float(da.abs().max()):
            return Labels((da.argmin()[None],), "recovered", "the negative entry of the bias gradient")
        return _posterior(observation, head.bias)
    if head.weight is not None and observation.simulation.task != "multilabel":
        return _from_weights(observation, head.weight)
    return guess_labels(observation)


def class_rates(observation: Observation, classes: int) -> Tensor:
    """Public class rates (C,), with one added to every count."""
    return torch.bincount(observation.prior.labels.long(), minlength=classes).double() + 1


def contributions(observation: Observation, bias: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Images and labels -> each image's part (N, C) in B times the head's bias gradient, clipping included."""
    simulation = observation.simulation
    clip = simulation.sample_clip or (simulation.update_clip if observation.batch == 1 else None)
    if clip is None:
        factor = _shrinkage(observation)

        def forward(x: Tensor, y: Tensor) -> Tensor:
            p = simulation.logits(x).softmax(1)
            return factor * (p - torch.nn.functional.one_hot(y, p.shape[1]))

        return forward
    one = replace(simulation, batch=1, steps=1, sample_clip=clip, update_clip=None, divisor=None, clients=1)
    position = simulation.names.index(bias)

    def clipped(x: Tensor, y: Tensor) -> Tensor:
        each = torch.func.vmap(lambda a, b: one.parts(a[None], b[None])[position], chunk_size=8)
        out: Tensor = each(x[:32], y[:32])
        return out

    return clipped


def _shrinkage(observation: Observation) -> float:
    """Factor by which clipping of the whole update shrinks it, judged on a public batch of the same size."""
    simulation, prior = observation.simulation, observation.prior
    if simulation.update_clip is None:
        return 1.0
    whole = replace(simulation, update_clip=None)
    size = min(observation.batch, len(prior.images))
    norm = float(whole.flat(prior.images[:size], prior.labels[:size]).norm(simulation.update_clip.order))
    return min(1.0, simulation.update_clip.norm / max(norm, 1e-300))


def class_moments(observation: Observation, bias: str) -> Moments:
    """Moments over public images of the class, or over all public images where the class has none."""
    prior = observation.prior
    images, labels = prior.images[:PUBLIC_IMAGES], prior.labels[:PUBLIC_IMAGES].long()
    part = contributions(observation, bias)
    means, covariances = [], []
    for c in range(len(observation.gradients[bias])):
        own = images[labels == c] if int((labels == c).sum()) >= 2 else images
        d = part(own, torch.full((len(own),), c, device=own.device)).double()[:, :-1]
        means.append(d.mean(0))
        centred = d - d.mean(0)
        covariances.append(centred.T @ centred / max(1, len(d) - 1))
    return Moments(torch.stack(means), torch.stack(covariances))


def _total(observation: Observation, bias: str) -> tuple[Tensor, float]:
    """Σ_i of the images' contributions, and the standard deviation of the noise on it."""
    scale = observation.batch if observation.simulation.divisor is None else observation.simulation.clients
    noise = float(observation.stds[bias].max())
    return scale * observation.gradients[bias].double(), scale * noise


def _posterior(observation: Observation, bias: str) -> Labels:
    total, noise = _total(observation, bias)
    moments = class_moments(observation, bias)
    rates = class_rates(observation, len(total)).to(total)
    chosen = credible_counts(total[:-1], observation.batch, moments, noise, rates)
    guesses = tuple(expand(counts, total.device) for _, counts in chosen[:MAX_GUESSES])
    detail = f"{len(chosen)} count vectors hold {COVERAGE:.0%} of the posterior; the first {chosen[0][0]:.0%}"
    return Labels(guesses, "recovered" if len(chosen) == 1 else "set", detail)


def _multilabel(observation: Observation, bias: str) -> Labels:
    """Label c of one image is set where da_c < 0; for a batch, n_c = Σ_i σ(u_ic) − B·L·da_c."""
    total, _ = _total(observation, bias)
    labels = len(total)
    if observation.batch == 1:
        return Labels(((total < 0).float()[None],), "recovered", "the negative entries of the bias gradient")
    p = observation.simulation.logits(observation.prior.images[:PUBLIC_IMAGES]).sigmoid().double().mean(0)
    counts = (observation.batch * p - labels * total).round().clamp(0, observation.batch)
    rows = torch.arange(observation.batch, device=total.device)[:, None]
    guess = (rows < counts).float()
    return Labels((guess,), "guessed", "counts of each label; which image carries which is unknown")


def _from_weights(observation: Observation, weight: str) -> Labels:
    """A head without bias. Rows of dW are (1/B)·Σ_i (p_ic − [y_i = c])·h_i.

    With h ≥ 0 the row sums take the place of the bias gradient (the family of Wainakh et al. 2021).
    """
    dw = observation.gradients[weight]
    hidden = feature_function(observation.simulation.model, weight)(observation.prior.images[:PUBLIC_IMAGES])
    if observation.batch == 1:
        if bool((hidden >= 0).all()):
            return Labels((dw.sum(1).argmin()[None],), "recovered", "the negative row of the head's weight gradient")
        if len(dw) == 2:
            both = tuple(torch.tensor([c], device=dw.device) for c in (0, 1))
            return Labels(both, "set", "two classes, no bias and features of both signs: ambiguous")
        products = dw @ dw.T
        products.fill_diagonal_(0)
        return Labels((products.sum(1).argmin()[None],), "recovered", "the row opposed to all others")
    p = observation.simulation.logits(observation.prior.images[:PUBLIC_IMAGES]).softmax(1).mean(0)
    scale = observation.batch if observation.simulation.divisor is None else observation.simulation.clients
    counts = largest_remainder(observation.batch * p - scale * dw.sum(1) / hidden.sum(1).mean(), observation.batch)
    return Labels((expand(counts, dw.device),), "guessed", "row sums of the head's weight gradient")


def guess_labels(observation: Observation) -> Labels:
    """What is left where the head says nothing: the public class rates."""
    prior, batch, task = observation.prior, observation.batch, observation.simulation.task
    if task == "multilabel":
        common = (prior.labels.nan_to_num().mean(0) > 0.5).float()
        return Labels((common.expand(batch, -1).clone(),), "guessed", "the head's gradient is hidden: common labels")
    rates = class_rates(observation, observation.simulation.logits(prior.mean[None]).shape[1])
    if batch == 1:
        order = rates.argsort(descending=True)[:MAX_GUESSES]
        return Labels(tuple(c[None] for c in order), "guessed", "the head's gradient is hidden: public class rates")
    counts = largest_remainder(batch * rates / rates.sum(), batch)
    return Labels((expand(counts, prior.mean.device),), "guessed", "the head's gradient is hidden: public class rates")
