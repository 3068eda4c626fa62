"""When some images of a batch are proven exact: what all that were found leave is attacked as a smaller batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import dlg, inverting_gradients, map_descent, map_gauss_newton
from .candidate import Candidate, NotApplicable
from .labels import Labels
from .observation import Observation
from .selection import select

if TYPE_CHECKING:
    from .attempt import Attempt

STAGES: tuple[Callable[[Attempt], None], ...] = (
    map_gauss_newton.stage,
    map_descent.stage,
    dlg.stage,
    inverting_gradients.stage,
)
WORTHWHILE = 10.0
"""Norm of the rest, in units of its expected error, below which it says nothing."""


@torch.no_grad()
def without(observation: Observation, images: Tensor, labels: Tensor) -> Observation:
    """What would have been observed, had these images not been in the batch.

    A mean over B images, less the parts of k of them, is (B − k)/B times the mean over the others.

    Raises:
        NotApplicable: φ is not a sum over the images: several steps, or clipping.
    """
    simulation, batch = observation.simulation, observation.batch
    clipped = simulation.sample_clip is not None or simulation.update_clip is not None or simulation.norm is not None
    if simulation.steps > 1 or clipped or simulation.stop is not None:
        raise NotApplicable("the update is no sum over the images, so that known ones cannot be taken out")
    known, left = len(images), batch - len(images)
    exact = replace(simulation.double, batch=known)
    part = exact.flat(images.double(), labels if labels.ndim == 1 else labels.double())
    mean = simulation.divisor is None
    grown = batch / left if mean else 1.0
    rest = observation.gradient.double() - part * (known / batch if mean else 1.0)
    return replace(
        observation,
        simulation=replace(simulation, batch=left),
        gradient=(rest * grown).to(observation.gradient),
        floor=observation.floor * grown,
        noise_std=observation.noise_std * grown,
        step=observation.step / grown,
        labels=None,
    )


def complete(candidate: Candidate, fixed: Candidate, known: int) -> Candidate:
    """A candidate for the rest, behind the first `known` images of `fixed`."""
    assert fixed.image_psnr is not None
    return replace(
        candidate,
        images=torch.cat([fixed.images[:known], candidate.images]),
        labels=torch.cat([fixed.labels[:known], candidate.labels]),
        method=f"{fixed.method}+{candidate.method}",
        est_psnr=fixed.est_psnr,
        image_psnr=fixed.image_psnr[:known] + (-math.inf,) * len(candidate.images),
        layers_ok=False,
        notes=(*fixed.notes, *candidate.notes),
    )


def attack_rest(run: Attempt, fixed: Candidate) -> list[Candidate]:
    """Candidates for the whole batch in which the images that `fixed` has found are kept.

    Raises:
        NotApplicable: nothing but rounding and noise is left, or known images cannot be taken out.
    """
    from .attempt import Attempt

    assert fixed.image_psnr is not None
    known = sum(value >= 0 for value in fixed.image_psnr)  # they come first
    if known == run.observation.batch:
        raise NotApplicable("every image has been found, if not proven")
    rest = without(run.observation, fixed.images[:known], fixed.labels[:known])
    expected = float((rest.std[rest.weights > 0]).norm())
    if rest.norm < WORTHWHILE * expected:
        times = rest.norm / expected
        raise NotApplicable(f"what is left for {rest.batch} images is {times:.1f} times its rounding and noise")
    labels = Labels((fixed.labels[known:],), run.labels.source, "those left over")
    nested = Attempt(rest, run.settings, run.generator, labels, run.clock)
    for stage in STAGES:
        stage(nested)
        if nested.done:
            break
    return [complete(c, fixed, known) for c in nested.candidates]


def stage(run: Attempt) -> None:
    """A batch of which some images are proven."""
    partial = [c for c in run.candidates if c.image_psnr is not None and 0 < c.certified < run.observation.batch]
    if not partial:
        return
    fixed = select(partial, run.observation)
    run.attempt("remainder", lambda _, __: attack_rest(run, fixed), once=True)
    run.settled = True
