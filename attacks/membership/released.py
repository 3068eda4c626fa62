"""Scores from the released model alone, and from shadows trained as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsec.findings import Candidates, MembershipScores, Shadows, Target
from fedsec.metrics.signals import BATCH, Signals, evaluating, logits_of, signals

from . import scores
from .perturbations import COPIES, perturbed

if TYPE_CHECKING:
    from . import Membership

Found = tuple[MembershipScores, ...]
Notes = tuple[str, ...]


def released_scores(attack: Membership, target: Target) -> tuple[Found, Notes]:
    """Scores of the methods that look at the released model.

    Returns:
        one entry a method, and why others could not be applied.
    """
    candidates = target.candidates
    assert candidates is not None
    model = target.released().to(target.device)
    found: list[MembershipScores] = []
    notes: list[str] = []
    own = _signals(model, candidates, target.device)
    wanted = attack.asked
    if "loss" in wanted:
        found.append(MembershipScores("loss", scores.loss(own[0].log_p)))
    if "label_only" in wanted:
        found.append(MembershipScores("label_only", _label_only(model, candidates, target), view="labels"))
    if any(method in wanted for method in ("lira", "lira_offline", "rmia", "rmia_offline")) and attack.shadows:
        if candidates.train_shadows is None:
            notes.append("no shadows: the recipe of this model is not known; only methods without shadows ran")
        else:
            shadows = candidates.train_shadows(attack.shadows)
            if len(shadows.models) < attack.shadows:
                notes.append(f"budget: {len(shadows.models)} of {attack.shadows} shadow models were trained")
            found += _with_shadows(attack, candidates, own, shadows, target.device)
    return tuple(found), tuple(notes)


def _signals(model: nn.Module, candidates: Candidates, device: torch.device) -> tuple[Signals, Signals]:
    """Of the candidates, and of the population."""
    population = candidates.population
    logits = logits_of(model, torch.cat([candidates.images, population.images]), device)
    n = len(candidates.images)
    return (
        signals(logits[:n], candidates.labels.numpy(), candidates.task),
        signals(logits[n:], population.labels.numpy(), candidates.task),
    )


def _with_shadows(
    attack: Membership, candidates: Candidates, own: tuple[Signals, Signals], shadows: Shadows, device: torch.device
) -> list[MembershipScores]:
    answers = [_signals(build().to(device), candidates, device) for build in shadows.models]
    phi, log_p = (np.stack([getattr(mine, key) for mine, _ in answers]) for key in ("phi", "log_p"))
    reference = np.stack([theirs.log_p for _, theirs in answers])
    contains = np.asarray(shadows.contains, dtype=bool)
    ratios = (own[0].log_p, log_p, own[1].log_p, reference, contains)
    computed: dict[str, Callable[[], NDArray[np.float64]]] = {
        "lira": lambda: scores.lira(own[0].phi, phi, contains),
        "lira_offline": lambda: scores.lira_offline(own[0].phi, phi, contains),
        "rmia": lambda: scores.rmia(*ratios, gamma=attack.gamma),
        "rmia_offline": lambda: scores.rmia_offline(*ratios, a=attack.a, gamma=attack.gamma),
    }
    count = len(shadows.models)
    return [MembershipScores(name, score(), count) for name, score in computed.items() if name in attack.asked]


def _label_only(model: nn.Module, candidates: Candidates, target: Target) -> NDArray[np.float64]:
    """Share of slightly changed copies that keep the right decision."""
    generator = target.ctx.generator("membership/label-only")
    labels = candidates.labels
    rows = []
    with evaluating(model):
        for number in range(COPIES):
            parts = [
                _right(model(perturbed(x, number, generator).to(target.device)).cpu(), y)
                for x, y in zip(candidates.images.split(BATCH), labels.split(BATCH), strict=True)
            ]
            rows.append(torch.cat(parts).numpy())
    return scores.label_only(np.stack(rows))


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) share of right decisions: 0 or 1 for exclusive classes, the mean over known labels otherwise."""
    if labels.ndim == 1:
        return (logits.argmax(1) == labels).double()
    known = ~torch.isnan(labels)
    right = ((logits > 0) == (labels > 0.5)) & known
    return right.sum(1).double() / known.sum(1).clamp(min=1)
