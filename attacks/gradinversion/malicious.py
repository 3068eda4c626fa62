"""The malicious server's two methods, `imprint` and `fishing`: what it sends, and what it reads from the answers.

They are never part of `auto`: they break the protocol, and a client could notice (see `client_detectors`).
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from fedsec.findings import PublicData, Reconstruction, Target
from fedsec.types import LocalRecipe, RoundContext, ServerView

from . import fishing, imprint
from .auto import reconstruct
from .candidate import NotApplicable
from .client_detectors import inspect, summarise
from .observation import Observation, observe
from .parallel import run_each
from .prior import Prior, fit_prior
from .settings import Malicious, Settings
from .trace import trace

LEAST_SECONDS = 1.5
"""CPU seconds for an image that stands alone, however many share the budget: a closed form takes a tenth of that, and
the first use of a library the rest."""


def craft(
    plan: Malicious,
    model: nn.Module,
    views: Sequence[ServerView],
    public: PublicData,
    recipe: LocalRecipe,
    ctx: RoundContext,
    *,
    adaptive: bool,
) -> nn.Module | None:
    """What a victim is sent next, given what its earlier queries brought; None: no more."""
    if plan.method == "imprint":
        if views:
            return None
        generator = ctx.generator("imprint")
        return imprint.craft(model, public, recipe, bins=plan.bins, kind=plan.sort_by, generator=generator)
    if any(len(view.updates) != 1 for view in views):  # a client that failed is not asked again
        return None
    try:
        lever = fishing.find_lever(model, public, recipe.task, views[0] if views else None)
        answers = [fishing.answer(view, lever, adaptive) for view in views]
        threshold = fishing.next_threshold(answers, lever, fishing.batch_of(views[0]) if views else 0)
    except NotApplicable:  # `read` says why
        return None
    return None if threshold is None else fishing.craft(model, lever, threshold)


@dataclass(frozen=True)
class Job:
    """Everything that reading any victim's answers needs."""

    plan: Malicious
    model: nn.Module
    """The honest architecture."""
    public: PublicData
    prior: Prior
    image_shape: tuple[int, int, int]
    device: torch.device
    settings: Settings
    mode: Literal["train", "eval"] | None

    def run(self, views: tuple[ServerView, ...], seed: int, adaptive: bool) -> Reconstruction:
        """Read one victim's answers, with or without what is publicly known of the defense."""
        began = time.process_time()
        generator = torch.Generator().manual_seed(seed)
        try:
            if any(len(view.updates) != 1 for view in views):
                raise NotApplicable("not every query was answered by one update")
            if any(view.local_steps != 1 for view in views):
                raise NotApplicable(f"{views[0].local_steps} local steps are behind the update; it is read from one")
            if not all(bool(torch.isfinite(view.updates[0].delta).all()) for view in views):
                raise NotApplicable("the update holds values that are not finite")
            if self.plan.method == "imprint":
                found = imprint.read(self._observe(views[0], self.target_model(), adaptive))
            else:
                found = self._fishing(views, generator, adaptive)
        except NotApplicable as reason:
            found = self._nothing(views[-1], str(reason))
        asked = f"the client answered {len(views)} queries on one batch"
        return replace(found, seconds=time.process_time() - began, notes=(asked, *found.notes))

    def _observe(self, view: ServerView, model: nn.Module, adaptive: bool) -> Observation:
        return observe(view, model, self.prior, self.image_shape, adaptive=adaptive, mode=self.mode)

    def target_model(self) -> nn.Module:
        """The architecture that the victims were sent."""
        model = copy.deepcopy(self.model)
        if self.plan.method == "imprint":
            imprint.insert(model, self.plan.bins, math.prod(self.image_shape))
        return model

    def _fishing(self, views: tuple[ServerView, ...], generator: torch.Generator, adaptive: bool) -> Reconstruction:
        observations = {id(view): self._observe(view, self.model, adaptive) for view in views}
        top = observations[id(views[0])]
        lever = fishing.find_lever(top.simulation.model, self.public, views[0].recipe.task, views[0])
        answers = [fishing.answer(view, lever, adaptive) for view in views]
        cut = fishing.intervals(answers, lever, fishing.batch_of(views[0]))
        alone = [i for i, part in enumerate(cut) if part.count == 1]
        if not alone:
            crowds = ", ".join(str(part.count) for part in cut)
            raise NotApplicable(f"{len(views)} queries left no image alone, but groups of {crowds}")
        labels = fishing.sort_labels(cut, lever, observations, top).cpu()
        share = max(LEAST_SECONDS, self.settings.budget_s / len(alone))
        settings = replace(self.settings, method="auto", budget_s=share)
        found = []
        for i in alone:
            sides = [cut[i].high, *([cut[i].low] if cut[i].low is not None else [])]
            image = fishing.single_image(cut[i], lever, [observations[id(s.view)] for s in sides if s is not None])
            found.append(reconstruct(image, settings, generator))
        methods = ", ".join(f"{n} by {name}" for name, n in Counter(item.method for item in found).items())
        errors = sorted(10 ** (-item.est_psnr / 10) for item in found if item.est_psnr is not None)
        return Reconstruction(
            images=torch.cat([item.images for item in found]),
            labels=labels[alone],
            method="fishing",
            certified=sum(item.certified for item in found),
            residual=max(item.residual for item in found),
            est_psnr=-10 * math.log10(errors[len(errors) // 2]) if errors else None,
            not_applicable={name: why for item in found for name, why in item.not_applicable.items()},
            notes=(
                f"{len(alone)} of {top.batch} images stood alone: {methods}",
                *top.notes,
            ),
        )

    def _nothing(self, view: ServerView, reason: str) -> Reconstruction:
        batch = max(1, view.recipe.batch_size)
        mean = self.prior.mean.cpu().expand(batch, *self.image_shape).clone()
        labels = torch.zeros(batch, dtype=torch.long)
        return Reconstruction(mean, labels, "prior", not_applicable={self.plan.method: reason})


def make_job(plan: Malicious, target: Target, settings: Settings, *, mode: Literal["train", "eval"] | None) -> Job:
    """Collect what is common to all victims, on the target's device."""
    prior = fit_prior(target.public).to(target.device)
    return Job(plan, target.model(), target.public, prior, target.image_shape, target.device, settings, mode)


def run_all(job: Job, target: Target, adaptive: tuple[bool, ...]) -> list[tuple[Reconstruction, ...]]:
    """Read every victim's answers; for each kind of adversary, the results in the order of the victims."""
    count = len(target.queries)
    seeds = [target.ctx.entropy(f"gradinversion/view-{i}") for i in range(count)]
    items = [(views, seed, kind) for kind in adaptive for views, seed in zip(target.queries, seeds, strict=True)]
    found = run_each(job.run, items, target)
    return [tuple(found[start : start + count]) for start in range(0, len(found), count)]


def stamp(job: Job, target: Target) -> Mapping[str, Any]:
    """What this seat assumes beyond a curious server's, and what clients could have noticed."""
    honest = trace(job.model.eval(), job.prior.mean[None].clone())
    linear = honest.find("linear")
    head = honest.name_of(honest.calls[linear[-1]].args[1]) if linear else None
    looks = []
    for views in target.queries:
        for view in views:
            parameters = view.layout.views(view.params)
            looks.append(inspect(parameters, head if head in parameters else None))
    asked = [len(views) for views in target.queries]
    return {
        "server": "malicious",
        "queries": {"fewest": min(asked), "most": max(asked), "all_victims": sum(asked)},
        "client_detectors": summarise(looks),
    }
