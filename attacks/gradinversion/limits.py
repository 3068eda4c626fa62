"""How well could any attack have done on each view? Computed with the truth, once the attack is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fedsec.findings import Limits, Target
from fedsec.types import ServerView

from .bound import bound, jacobian_rank
from .candidate import NotApplicable
from .observation import Observation, observe
from .parallel import run_each
from .prior import Prior, fit_prior
from .rank import layer_ranks, rank_index_noise, rank_index_structural


@dataclass(frozen=True)
class Examiner:
    """Everything that the limits of any view of a target need, but the truth."""

    model: nn.Module
    prior: Prior
    image_shape: tuple[int, int, int]
    mode: Literal["train", "eval"] | None

    def examine(self, view: ServerView, images: Tensor, labels: Tensor, first: bool) -> Limits:
        """The limits of one view of these images and labels; `first` of its round, which pays for the ranks."""
        if len(view.updates) != 1 or view.clients_in_sum > 1:
            return Limits(notes=("no bound: others' images are in the sum",))
        device = self.prior.mean.device
        images, labels = images.to(device).contiguous(), labels.to(device)
        observation = observe(view, self.model, self.prior, self.image_shape, mode=self.mode)
        notes: list[str] = []
        values: dict[str, float] = {}
        if first:
            _structure(observation, images[:1], labels[:1], values, notes)
        try:
            mse = _bound(observation, images, labels, values, notes, first=first)
        except NotApplicable as reason:
            mse = None
            notes.append(f"no bound: {reason}")
        except RuntimeError as error:  # torch: an operation of this model lacks a derivative in forward mode
            mse = None
            notes.append(f"no bound: {str(error).strip().splitlines()[0]}")
        return Limits(mse, values, tuple(notes))


def limits_of(
    target: Target, truths: Sequence[tuple[Tensor, Tensor]], mode: Literal["train", "eval"] | None
) -> tuple[Limits, ...]:
    """The limits of every view, in order; see `fedsec.attack.Attack.limits`."""
    examiner = Examiner(target.model(), fit_prior(target.public).to(target.device), target.image_shape, mode)
    rounds = [view.round for view in target.views]
    items = [
        (view, images.clone(), labels, rounds.index(view.round) == i)
        for i, (view, (images, labels)) in enumerate(zip(target.views, truths, strict=True))
    ]
    return tuple(run_each(examiner.examine, items, target))


def _structure(
    observation: Observation, image: Tensor, label: Tensor, values: dict[str, float], notes: list[str]
) -> None:
    try:
        ranks = layer_ranks(observation.simulation, image, label)
    except (NotApplicable, RuntimeError) as reason:
        notes.append(f"no rank_index_structural: {str(reason).strip().splitlines()[0]}")
        return
    values["rank_index_structural"] = rank_index_structural(ranks)
    notes.append(f"rank_index_structural: {min(ranks, key=lambda r: r.index)}")


def _bound(
    observation: Observation,
    images: Tensor,
    labels: Tensor,
    values: dict[str, float],
    notes: list[str],
    *,
    first: bool,
) -> float | None:
    if observation.sent is not None:
        notes.append("no bound: what lies behind a random layer was sent, too, and cannot be simulated")
        return None
    found = bound(observation, images, labels)
    if found is not None:
        values["rank_index_noise"] = rank_index_noise(found.information, images.numel())
        notes += [note for note in observation.notes if "noise level estimated" in note]
        return found.mse
    notes.append("no bound: the observation is exact")
    if first:
        rank = jacobian_rank(observation, images, labels)
        values["jacobian_rank"] = float(rank)
        # The limit of vanishing noise: every direction that changes the upload at all.
        values["rank_index_noise"] = rank / images.numel()
    return None
