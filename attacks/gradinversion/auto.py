"""In what order are the methods tried? The strongest that applies first; stop at a proof.

| stage | method | applies to |
|---|---|---|
| 0 | the public mean image | always: what anybody could draw |
| 1 | label recovery | unless labels are told |
| 2 | `analytic`, `cascade` | one image, fully connected first layer; convolutions with invertible activations |
| 3 | `map_gauss_newton` | one image; with known noise, or smooth activations |
| 4 | feature inversion, a start for stage 6 | one image, piecewise-linear nets with a fully connected layer |
| 5 | `dlg`, and `map_descent` for batches | smooth activations; any activations where noise is known |
| 6 | `inverting_gradients` | always |
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fedsec.types import Reconstruction

from . import analytic, cascade, dlg, inverting_gradients, map_descent, map_gauss_newton
from .attempt import Attempt
from .candidate import Candidate, Clock
from .labels import guess_labels, recover_labels
from .observation import Observation
from .selection import disagreement, select
from .settings import Method, Settings

MAX_BATCH = 128
ORDER: tuple[Callable[[Attempt], None], ...] = (
    analytic.stage,
    cascade.stage,
    map_gauss_newton.stage,
    map_descent.stage,
    dlg.stage,
    inverting_gradients.stage,
)
"""The stages of auto, strongest first."""
METHODS: dict[Method, tuple[Callable[[Attempt], None], ...]] = {
    "auto": ORDER,
    "analytic": (analytic.stage,),
    "cascade": (cascade.stage,),
    "map_gauss_newton": (map_gauss_newton.stage,),
    "dlg": (dlg.stage,),
    "inverting_gradients": (inverting_gradients.stage,),
}


def reconstruct(observation: Observation, settings: Settings, generator: torch.Generator) -> Reconstruction:
    """Attack one observation within the budget and choose what to hand in."""
    began = time.process_time()
    empty = _nothing_to_see(observation)
    labels = guess_labels(observation) if empty else recover_labels(observation)
    run = Attempt(observation, settings, generator, labels, Clock(settings.budget_s))
    mean = observation.prior.mean.expand(observation.batch, *observation.image_shape).clone()
    run.add([Candidate(mean, guess, "prior") for guess in labels.guesses])
    if empty:
        run.skipped["all"] = empty
    else:
        for stage in METHODS[settings.method]:
            stage(run)
            if run.done:
                break
    pool = [c for c in run.candidates if c.method != "prior"] if settings.method != "auto" else run.candidates
    chosen = select(pool or run.candidates, observation)
    rivals = [c for c in run.candidates if c is not chosen and c.method == chosen.method]
    notes = [f"labels: {labels.detail}", *observation.notes, *chosen.notes]
    if rivals:
        second = select(rivals, observation)
        notes.append(f"the two best restarts differ by {disagreement(chosen, second):.3f} (root mean square pixel)")
    return Reconstruction(
        images=chosen.images.detach().cpu(),
        labels=chosen.labels.detach().cpu(),
        method=chosen.method,
        certified=chosen.certified,
        residual=chosen.residual,
        est_psnr=chosen.est_psnr,
        seconds=time.process_time() - began,
        not_applicable=dict(run.skipped),
        notes=tuple(notes),
    )


def _nothing_to_see(observation: Observation) -> str | None:
    if not bool(torch.isfinite(observation.gradient).all()):
        return "the update holds values that are not finite"
    if observation.norm == 0:
        return "the update is zero"
    if observation.batch > MAX_BATCH:
        return f"{observation.batch} images are behind the update; {MAX_BATCH} are attacked at most"
    return None
