"""In what order are the methods tried? The strongest that applies first; stop at a proof.

| stage | method | applies to |
|---|---|---|
| 0 | the public mean image | always: what anybody could draw |
| 1 | label recovery | unless labels are told |
| 2 | `analytic`, `cascade` | one image, fully connected first layer; convolutions with invertible activations |
|   | `fedavg` | several local steps |
| 2 | `peel`, `spear` | batches, fully connected first layer with ReLU; what they leave is attacked alone |
| 3 | `unpooling`, `feature_inversion` | one image, no noise, ReLU or max pooling, a fully connected layer |
| 4 | `map_gauss_newton` | one image; with known noise, or smooth activations |
| 5 | `map_descent` | batches, at kinks and without noise their outlines only; models too large for stage 4 |
| 5 | `dlg` | smooth activations |
| 6 | `bn_prior` | BatchNorm whose statistics are sent |
| 7 | `inverting_gradients` | always |
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fedsec.findings import Reconstruction

from . import (
    analytic,
    bn_prior,
    cascade,
    dlg,
    fedavg,
    inverting_gradients,
    map_descent,
    map_gauss_newton,
    peel,
    remainder,
    spear,
    unpooling,
)
from .attempt import Attempt
from .candidate import Candidate
from .clock import Clock, clocked
from .label_check import check_labels, same_multiset
from .labels import Labels, Source, guess_labels, recover_labels
from .observation import Observation
from .selection import disagreement, select
from .settings import Method, Settings

MAX_BATCH = 128
ORDER: tuple[Callable[[Attempt], None], ...] = (
    analytic.stage,
    peel.stage,
    spear.stage,
    remainder.stage,
    cascade.stage,
    fedavg.stage,
    unpooling.stage,
    map_gauss_newton.stage,
    map_descent.stage,
    dlg.stage,
    bn_prior.stage,
    inverting_gradients.stage,
)
"""The stages of auto, strongest first."""
ONE_STEP = (map_gauss_newton.stage, map_descent.stage, dlg.stage)
"""Left out once `fedavg` has found something: they take a local training for one fixed order of it."""
FIRST_TRY = 0.8
"""Share of the budget for labels that may turn out wrong; the rest is for those that the images then imply."""
LEAST = 0.1
"""Share of the budget below which a second try is not worth starting."""
METHODS: dict[Method, tuple[Callable[[Attempt], None], ...]] = {
    "auto": ORDER,
    "analytic": (analytic.stage,),
    "peel": (peel.stage,),
    "spear": (spear.stage,),
    "cascade": (cascade.stage,),
    "fedavg": (fedavg.stage,),
    "unpooling": (unpooling.stage,),
    "map_gauss_newton": (map_gauss_newton.stage,),
    "dlg": (dlg.stage,),
    "bn_prior": (bn_prior.stage,),
    "inverting_gradients": (inverting_gradients.stage,),
}


def reconstruct(observation: Observation, settings: Settings, generator: torch.Generator) -> Reconstruction:
    """Attack one observation within the budget and choose what to hand in.

    Where the label counts turn out to contradict the images that were found under them, those that would agree are
    tried once.
    """
    with clocked(settings.clock):
        return _reconstruct(observation, settings, generator)


def _reconstruct(observation: Observation, settings: Settings, generator: torch.Generator) -> Reconstruction:
    began = time.process_time()
    empty = _nothing_to_see(observation)
    labels = guess_labels(observation) if empty else _labels(observation, settings, generator)
    budget, unsure = Clock(settings.budget_s), observation.batch > 1 and labels.source in ("set", "guessed")
    run = _attempt(observation, settings, generator, labels, budget.share(FIRST_TRY if unsure else 1.0), empty)
    chosen = _choose(run)
    other, remark = (None, ()) if empty else check_labels(run, chosen)
    tried = labels.guesses
    if other is not None and budget.left > LEAST * budget.budget:
        again = _attempt(observation, settings, generator, Labels((other,), labels.source, ""), budget, None)
        best = select([chosen, _choose(again)], observation)
        run, chosen, tried = (run, chosen, (*tried, other)) if best is chosen else (again, best, (*tried, other))
    rivals = [c for c in run.candidates if c is not chosen and c.method == chosen.method]
    notes = [f"labels: {labels.detail}", *remark, *observation.notes, *chosen.notes]
    if rivals:
        second = select(rivals, observation)
        notes.append(f"the two best restarts differ by {disagreement(chosen, second):.3f} (root mean square pixel)")
    return Reconstruction(
        images=chosen.images.detach().cpu(),
        labels=chosen.labels.detach().cpu(),
        method=chosen.method,
        label_source=_source(chosen, labels, tried),
        label_set=tuple(t.detach().cpu() for t in tried),
        certified=chosen.certified,
        residual=chosen.residual,
        est_psnr=chosen.est_psnr,
        seconds=time.process_time() - began,
        not_applicable=dict(run.skipped),
        notes=tuple(notes),
    )


def _source(chosen: Candidate, labels: Labels, tried: tuple[Tensor, ...]) -> Source:
    """Where the labels that are handed in come from."""
    if chosen.certified == len(chosen.labels) and chosen.image_psnr is not None and labels.source != "oracle":
        return "recovered"  # proven with the images
    return labels.source if any(same_multiset(chosen.labels, t) for t in tried) else "joint"


def _labels(observation: Observation, settings: Settings, generator: torch.Generator) -> Labels:
    found = recover_labels(observation, generator)
    if settings.joint and found.source != "oracle":
        return replace(found, guesses=found.guesses[:1], source="joint", detail="optimised along with the images")
    return found


def _attempt(
    observation: Observation,
    settings: Settings,
    generator: torch.Generator,
    labels: Labels,
    clock: Clock,
    empty: str | None,
) -> Attempt:
    """Run the stages with these labels until a proof or the end of the time."""
    run = Attempt(observation, settings, generator, labels, clock)
    mean = observation.prior.mean.expand(observation.batch, *observation.image_shape).clone()
    run.add([Candidate(mean, guess, "prior") for guess in labels.guesses])
    if empty:
        run.skipped["all"] = empty
        return run
    for stage in (dlg.stage,) if settings.joint else METHODS[settings.method]:
        if stage in ONE_STEP and any(c.method == "fedavg" for c in run.candidates):
            continue
        stage(run)
        if run.done:
            break
    return run


def _choose(run: Attempt) -> Candidate:
    pool = [c for c in run.candidates if c.method != "prior"] if not run.auto else run.candidates
    return select(pool or run.candidates, run.observation)


def _nothing_to_see(observation: Observation) -> str | None:
    if not bool(torch.isfinite(observation.gradient).all()):
        return "the update holds values that are not finite"
    if observation.norm == 0:
        return "the update is zero"
    if observation.batch > MAX_BATCH:
        return f"{observation.batch} images are behind the update; {MAX_BATCH} are attacked at most"
    return None
