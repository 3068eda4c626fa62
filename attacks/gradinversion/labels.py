"""Which labels are behind an update? Read from the gradient of the last layer, never assumed.

With softmax cross-entropy the bias gradient of class c is (1/B)·Σ_i (p_ic − [y_i = c]). One image: the only negative
entry is its class (Zhao, Mopuri and Bilen 2020, iDLG). A batch: the counts of the classes, through the moments of p on
public images; on trained models that point estimate is not reliable, so a 95 % set is returned, best first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .entries import logit_layer
from .features import feature_function
from .label_counts import (
    COVERAGE,
    Moments,
    all_counts,
    credible,
    credible_counts,
    expand,
    expected_sum,
    largest_remainder,
    log_prior,
)
from .label_evidence import PUBLIC_IMAGES, Evidence, bias_evidence, class_moments, label_moments, weight_evidence
from .label_rehearsal import log_likelihoods, rehearsals
from .observation import Observation

Source = Literal["oracle", "recovered", "set", "guessed", "joint"]
MAX_GUESSES = 3
"""Label vectors that are tried at most."""
HIDDEN = 1e6
"""Noise on the bias gradient that leaves nothing of it."""
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
    weight, bias = logit_layer(observation.simulation.model, observation.prior.mean[None].clone())
    seen = observation.complete
    return Head(weight if weight in seen else None, bias if bias in seen else None)


@torch.no_grad()
def recover_labels(observation: Observation, generator: torch.Generator | None = None) -> Labels:
    """Recover the labels of one observation; oracle labels are passed on, and say so.

    Args:
        observation: g, and what may be used to explain it.
        generator: draws the rehearsals of a local training of several steps; seeded 0 where not given.
    """
    if observation.labels is not None:
        return Labels((observation.labels,), "oracle", "told in advance")
    observation, generator = observation.as_sent, generator or torch.Generator().manual_seed(0)
    head = find_head(observation)
    if head.bias is not None:
        evidence = bias_evidence(observation, head.bias)
        if observation.simulation.task == "multilabel":
            return _multilabel(observation, evidence)
        if observation.batch == 1 and evidence.noise <= CLEAR * float(evidence.total.abs().max()):
            return Labels((evidence.total.argmin()[None],), "recovered", "the negative entry of the bias gradient")
        return _posterior(observation, evidence, head.bias, generator)
    if head.weight is not None and observation.simulation.task != "multilabel":
        return _from_weights(observation, head.weight, generator)
    return guess_labels(observation)


def class_rates(observation: Observation, classes: int) -> Tensor:
    """Public class rates (C,), with one added to every count."""
    return torch.bincount(observation.prior.labels.long(), minlength=classes).double() + 1


def mean_counts(observation: Observation, evidence: Evidence) -> list[int]:
    """The counts as public images with the public class mix have them on average: a point, and no more than that.

    n = Σ_i p_i − Σ_i (p_i − e_i), the first from public images; negative entries become 0, rounded to a sum of B.
    """
    moments, rates = class_moments(observation, evidence), class_rates(observation, len(evidence.total))
    full = torch.cat([evidence.total[:-1], -evidence.total[:-1].sum()[None]])
    return largest_remainder(expected_sum(moments, observation.batch, rates.to(full)) - full, observation.batch)


def credible_set(
    observation: Observation, evidence: Evidence, bias: str | None, generator: torch.Generator
) -> list[tuple[float, list[int]]]:
    """(probability, class counts) that hold 95 % of the posterior, best first; several steps are rehearsed."""
    rates = class_rates(observation, len(evidence.total)).to(evidence.total)
    moments = class_moments(observation, evidence)
    chosen = credible_counts(evidence.total[:-1], observation.batch, moments, evidence.noise, rates)
    if bias is not None and observation.simulation.steps > 1 and observation.simulation.clients == 1:
        return _rehearsed(observation, bias, chosen, rates, generator) or chosen
    return chosen


def _posterior(observation: Observation, evidence: Evidence, bias: str | None, generator: torch.Generator) -> Labels:
    chosen = credible_set(observation, evidence, bias, generator)
    guesses = tuple(expand(counts, evidence.total.device) for _, counts in chosen[:MAX_GUESSES])
    detail = f"{len(chosen)} count vectors hold {COVERAGE:.0%} of the posterior; the first {chosen[0][0]:.0%}"
    return Labels(guesses, "recovered" if len(chosen) == 1 else "set", detail)


def _rehearsed(
    observation: Observation,
    bias: str,
    chosen: list[tuple[float, list[int]]],
    rates: Tensor,
    generator: torch.Generator,
) -> list[tuple[float, list[int]]] | None:
    """The set by rehearsing the local training: for two classes of all counts; else of those that were chosen."""
    binary = len(rates) == 2
    vectors = [list(c) for c in all_counts(2, observation.batch)] if binary else [counts for _, counts in chosen]
    count = rehearsals(observation, len(vectors))
    if not count:
        return None
    found = log_likelihoods(observation, bias, vectors, count, generator)
    scores = {tuple(v): value + log_prior(v, rates) for v, value in zip(vectors, found, strict=True)}
    return credible(scores) if max(scores.values()) > -math.inf else None


def _multilabel(observation: Observation, evidence: Evidence) -> Labels:
    """Label c of one image is set where da_c < 0; of a batch, the count of each label has a posterior of its own."""
    total, batch = evidence.total, observation.batch
    if batch == 1:
        return Labels(((total < 0).float()[None],), "recovered", "the negative entries of the bias gradient")
    shares = observation.prior.labels.nan_to_num()
    sets = []
    for c, moments in enumerate(label_moments(observation, evidence)):
        with_it = float(shares[:, c].sum())
        rates = torch.tensor([len(shares) - with_it + 1, with_it + 1], dtype=torch.float64, device=total.device)
        chosen = credible_counts(total[c : c + 1], batch, moments, evidence.noise, rates)
        sets.append([(probability, counts[1]) for probability, counts in chosen])
    rows = torch.arange(batch, device=total.device)[:, None]
    tried = [torch.tensor(counts, device=total.device) for counts in _most_probable(sets, MAX_GUESSES)]
    guesses = tuple((rows < counts).float() for counts in tried)
    size = math.prod(len(s) for s in sets)
    detail = f"{size} vectors of label counts are plausible; which image carries which label is unknown"
    return Labels(guesses, "set", detail)


def _most_probable(sets: list[list[tuple[float, int]]], limit: int) -> list[list[int]]:
    """The most probable combinations of independent choices, best first."""
    combined: list[tuple[float, list[int]]] = [(1.0, [])]
    for options in sets:
        grown = [(p * q, [*picked, n]) for p, picked in combined for q, n in options]
        combined = sorted(grown, key=lambda entry: -entry[0])[:limit]
    return [picked for _, picked in combined]


def _from_weights(observation: Observation, weight: str, generator: torch.Generator) -> Labels:
    """A head without bias: rows of dW are (1/B)·Σ_i (p_ic − [y_i = c])·h_i."""
    dw = observation.gradients[weight]
    if observation.batch > 1:
        found = _posterior(observation, weight_evidence(observation, weight), None, generator)
        return replace(found, detail=f"row sums of the head's weight gradient: {found.detail}")
    hidden = feature_function(observation.simulation.model, weight)(observation.prior.images[:PUBLIC_IMAGES])
    if bool((hidden >= 0).all()):
        return Labels((dw.sum(1).argmin()[None],), "recovered", "the negative row of the head's weight gradient")
    if len(dw) == 2:
        both = tuple(torch.tensor([c], device=dw.device) for c in (0, 1))
        return Labels(both, "set", "two classes, no bias and features of both signs: ambiguous")
    products = dw @ dw.T
    products.fill_diagonal_(0)
    return Labels((products.sum(1).argmin()[None],), "recovered", "the row opposed to all others")


def guess_labels(observation: Observation) -> Labels:
    """What is left where the head says nothing: the public class rates."""
    prior, batch, task = observation.prior, observation.batch, observation.simulation.task
    if task == "multilabel":
        common = (prior.labels.nan_to_num().mean(0) > 0.5).float()
        return Labels((common.expand(batch, -1).clone(),), "guessed", "the head's gradient is hidden: common labels")
    rates = class_rates(observation, observation.simulation.logits(prior.mean[None]).shape[1])
    # Without a likelihood the posterior of the counts is their prior.
    c = len(rates)
    flat = Moments(rates.new_zeros(c, c - 1), rates.new_zeros(c, c - 1, c - 1))
    chosen = credible_counts(rates.new_zeros(c - 1), batch, flat, HIDDEN, rates)
    guesses = tuple(expand(counts, prior.mean.device) for _, counts in chosen[:MAX_GUESSES])
    detail = f"the head's gradient is hidden: {len(chosen)} count vectors by public class rates"
    return Labels(guesses, "guessed", detail)
