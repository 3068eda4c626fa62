"""Do the label counts agree with the images that were found under them?

At the right images B·da_c = Σ_i p_ic − n_c holds exactly. With images that are nearly right, the same equation solved
for n gives the counts, whatever they were taken for; so a wrong guess betrays itself and says what to try next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .candidate import Candidate
from .label_counts import expand, largest_remainder
from .label_evidence import bias_evidence
from .labels import find_head
from .observation import Observation

if TYPE_CHECKING:
    from .attempt import Attempt

CONSISTENT = 0.05
"""Largest deviation, in images, that rounding and unfinished optimisation are forgiven."""
NOISE = 3.0
"""Standard deviations of the defense's noise that are forgiven besides."""


@torch.no_grad()
def deviation(observation: Observation, candidate: Candidate, bias: str) -> tuple[Tensor, float]:
    """B·da_c − Σ_i p_ic + n_c of a candidate (C,), in images, and how large it may be.

    Through the simulation, so that several steps and clipping count: it is B times the difference between the head's
    bias gradients, observed and simulated at the candidate's images and labels.
    """
    position = observation.simulation.names.index(bias)
    evidence = bias_evidence(observation, bias)
    simulated = observation.simulation.parts(candidate.images, candidate.labels)[position].double()
    observed = observation.gradients[bias].double()
    scale = observation.batch if observation.simulation.divisor is None else observation.simulation.clients
    return scale * (observed - simulated), CONSISTENT + NOISE * evidence.noise


def implied_counts(candidate: Candidate, off: Tensor, batch: int) -> list[int]:
    """The class counts that would make the deviation vanish at the candidate's images, rounded to a sum of B."""
    counts = torch.bincount(candidate.labels, minlength=len(off)).to(off)
    return largest_remainder(counts - off, batch)


def check_labels(run: Attempt, candidate: Candidate) -> tuple[Tensor | None, tuple[str, ...]]:
    """(labels to try instead, a note) for the candidate that was chosen; nothing where there is nothing to check.

    For batches of one class an image: one image's label is read off a sign, and which image carries which of several
    labels is not in the counts.
    """
    seen = run.observation
    certain = (
        run.labels.source in ("oracle", "joint") or candidate.method == "prior" or seen.simulation.stop is not None
    )
    bias = None if certain or seen.batch == 1 or candidate.labels.ndim > 1 else find_head(seen).bias
    if bias is None:
        return None, ()
    off, allowed = deviation(seen, candidate, bias)
    worst = float(off.abs().max())
    if not worst > allowed:
        return None, (f"label counts agree with the images to {worst:.2g} images",)
    counts = implied_counts(candidate, off, seen.batch)
    other = expand(counts, candidate.labels.device)
    tried = any(same_multiset(other, guess) for guess in run.labels.guesses)
    note = f"label counts and images disagree by {worst:.2g} images; the images imply the counts {counts}"
    return (None if tried else other), (note,)


def same_multiset(left: Tensor, right: Tensor) -> bool:
    """The same labels, in whatever order; rows of (B,) classes or (B, L) targets."""
    if left.shape != right.shape:
        return False
    rows = [sorted(map(tuple, t.reshape(len(t), -1).nan_to_num().tolist())) for t in (left.float(), right.float())]
    return rows[0] == rows[1]
