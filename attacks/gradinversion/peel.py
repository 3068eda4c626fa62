"""Batches in front of a fully connected layer with ReLU, exact, by deflation.

A neuron that is active for one image alone has that image in its row of the gradient: x = D_j/β_j (Boenisch et al.
2021, 2112.02918). The layers above are known, so that the image and its label give the image's part in every row;
taking it out leaves one image alone in further rows. The labels come out with the images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .candidate import Candidate, NotApplicable
from .certificate import EXACT_DB, TOLERANCE
from .clock import Clock
from .deflation import EXPLAINED, SIGNIFICANT, Deflation, Proof, prove, refine
from .features import Features, feature_function
from .labels import Labels
from .observation import Observation
from .relu_layer import EPS, ReluLayer, find_relu_layer
from .trace import trace

if TYPE_CHECKING:
    from .attempt import Attempt

LIVE = 20.0
"""Rest of a row, in units of its error, above which it can give an image."""
BOX = 1e-3
"""Share of the range by which a pixel may lie outside, beside three times its error."""
ROW = 1e-5
"""Relative difference by which a row may miss its image's part in it, beside ten times its error."""
WIDEST = 5e-2
"""Greatest such difference, whatever the error."""
TIGHT = 1e-4
"""Greatest such difference at which one row alone is trusted before others have been tried."""
APART = 0.03
"""Relative distance of two inputs below which they count as the same image."""
ROUNDS = 60
TRIES = 4
"""Times that doubtful images are dropped and looked for again."""


@dataclass(frozen=True)
class Rows:
    """Rows of the gradient that look like one image's alone. K of them, best first by `tier`."""

    inputs: Tensor
    """(K, d)."""
    which: Tensor
    """(K,) label that fits."""
    error: Tensor
    """(K,) relative error of the input."""
    miss: Tensor
    """(K,) relative difference between the row and the image's part in it."""
    tier: Tensor
    """(K,) 0: other rows agree; 1: the row fits tightly; 2: it fits within its error; 3: explained rows disagree."""
    agreeing: Tensor
    """(K,) rows that the image explains alone."""

    def select(self, rows: Tensor) -> Rows:
        """Some of them."""
        parts = (self.inputs, self.which, self.error, self.miss, self.tier, self.agreeing)
        return Rows(*(p[rows] for p in parts))


def single_rows(known: Deflation) -> Rows:
    """Rows of the rest that pass the tests of one image: range of its pixels, and its own part in the row."""
    layer, norms = known.layer, known.rest_norms
    bias = known.rest[:, -1]
    live = (norms > LIVE * known.row_error) & (bias.abs() > LIVE * known.bias_error)
    index = live.nonzero()[:, 0]
    inputs = known.rest[index, :-1] / bias[index, None]
    error = ((known.row_error[index] / norms[index]) ** 2 + (known.bias_error[index] / bias[index]) ** 2).sqrt()
    if layer.box is not None:
        low, high = layer.box
        margin = (BOX + 3 * error)[:, None] * (high - low)
        inside = ((inputs <= high + margin) & (inputs >= low - margin)).all(1)
        index, inputs, error = index[inside], inputs[inside], error[inside]
    return _row_test(known, index, inputs, error)


def _row_test(known: Deflation, index: Tensor, inputs: Tensor, error: Tensor) -> Rows:
    layer, here = known.layer, torch.arange(len(index), device=index.device)
    bias = known.rest[index, -1:]
    p, slopes = layer.slopes(inputs)
    own = slopes[here, :, index]
    parts = ((p[:, None] - layer.targets) * own[:, None]).sum(2)
    slack = EPS * (layer.targets * own.abs()[:, None]).sum(2)
    allowed = (ROW + 10 * error).clamp(max=WIDEST)[:, None] * bias.abs() + slack
    miss = (parts - bias).abs()
    which = (miss / allowed).argmin(1)
    passed = (miss / allowed)[here, which] <= 1
    columns = torch.einsum("kc,kcm->km", p - layer.targets[which], slopes)
    slacks = EPS * torch.einsum("kc,kcm->km", layer.targets[which], slopes.abs())
    agreeing, broken = _agreement(known, inputs, error, columns, slacks)
    tight = (allowed / bias.abs())[here, which] <= TIGHT
    tier = torch.where(agreeing >= 2, 0, torch.where(tight, 1, 2))
    tier = torch.where(broken > 0, 3, tier)
    found = Rows(inputs, which, error, (miss / bias.abs())[here, which], tier, agreeing)
    return found.select(passed)


def _agreement(
    known: Deflation, inputs: Tensor, error: Tensor, columns: Tensor, slacks: Tensor
) -> tuple[Tensor, Tensor]:
    """How many rows (K,) each candidate explains alone, and into how many explained rows it would bring a rest."""
    norms = inputs.norm(dim=1)[:, None]
    part, square = columns.abs() * norms, known.rest_norms**2
    left = (square - 2 * columns * (inputs @ known.rest[:, :-1].T) + part**2).clamp(min=0).sqrt()
    noise = known.row_error**2 + (2 * error[:, None] * part) ** 2 + (slacks * norms) ** 2
    noise = (noise + (1e-7 * part) ** 2).sqrt()
    counts = part > SIGNIFICANT * noise
    return (counts & (left <= EXPLAINED * noise)).sum(1), (counts & known.explained).sum(1)


def grow(known: Deflation, clock: Clock) -> Deflation:
    """Peel until all images are known or no row passes. Rows with the better evidence go first."""
    for _ in range(ROUNDS):
        if known.complete or clock.left <= 0:
            break
        rows = single_rows(known)
        if not len(rows.tier) or int(rows.tier.min()) > 2:
            break
        best = int(rows.tier.min())
        rows = rows.select(rows.tier == best)
        preference = (-rows.agreeing + rows.error, rows.error + 0.1 * rows.miss, rows.error)[best]
        chosen = _distinct(known, rows.select(preference.argsort()), 1 if best == 2 else known.layer.batch)
        if not len(chosen.tier):
            break
        known = refine(known.adding(chosen.inputs, chosen.which, chosen.error))
    return known


def _distinct(known: Deflation, rows: Rows, most: int) -> Rows:
    """The first rows that are no image twice, `most` of them at most."""
    inputs, errors = known.inputs, known.error
    chosen: list[int] = []
    for k in range(len(rows.tier)):
        if len(chosen) == min(most, known.layer.batch - len(known)):
            break
        near = (30 * torch.maximum(errors, rows.error[k])).clamp(min=APART)
        if bool(((inputs - rows.inputs[k]).norm(dim=1) < near * rows.inputs[k].norm()).any()):
            continue
        chosen.append(k)
        inputs, errors = torch.cat([inputs, rows.inputs[k : k + 1]]), torch.cat([errors, rows.error[k : k + 1]])
    return rows.select(torch.tensor(chosen, dtype=torch.long, device=rows.tier.device))


def peel(layer: ReluLayer, clock: Clock, known: Deflation | None = None) -> Proof:
    """Peel, prove, and look again for what could not be proven.

    Args:
        layer: from `find_relu_layer`.
        clock: no round starts after it has run out.
        known: inputs that are known already.
    """
    known = Deflation.start(layer) if known is None else known
    best: Proof | None = None
    for _ in range(TRIES):
        grown = grow(known, clock)
        proof = prove(grown) if len(grown) else Proof(grown, grown.error)
        count = int(proof.proven.sum())
        if best is not None and count <= int(best.proven.sum()):
            break
        best = proof
        if count == len(grown):
            break
        known = proof.known.keeping(proof.proven)
    assert best is not None
    return best


@dataclass(frozen=True)
class Feature:
    """Input of the fully connected layer behind one image."""

    value: Tensor
    """(d,)."""
    label: Tensor
    """Class, or labels (L,)."""
    decibel: float
    """Estimated PSNR; of features, their greatest magnitude is the peak."""


def peel_features(observation: Observation, clock: Clock | None = None) -> list[Feature]:
    """What a batch puts into the fully connected layer with ReLU nearest to the images: proven inputs only.

    Raises:
        NotApplicable: the model has no such layer.
    """
    recorded = trace(observation.simulation.model, observation.prior.mean[None].clone())
    layer = find_relu_layer(observation, recorded)
    proof = peel(layer, clock or Clock(float("inf")))
    labels = layer.labels(proof.known.which)
    pairs = zip(proof.known.inputs, labels, proof.decibel.tolist(), proof.proven.tolist(), strict=True)
    return [Feature(x, y, decibel) for x, y, decibel, proven in pairs if proven]


def candidate_of(observation: Observation, proof: Proof, method: str, guess: Tensor) -> Candidate:
    """Images of a proof, the most certain first, and the public mean for those that were not found.

    Args:
        observation: whose batch it is.
        proof: of inputs that are pixels.
        method: its name.
        guess: (B,) or (B, L) labels that the missing images are filled from.
    """
    known, layer = proof.known, proof.known.layer
    order = proof.decibel.argsort(descending=True)
    found = layer.to_pixels(known.inputs[order], observation.image_shape).clamp(0, 1).to(observation.gradient)
    missing = observation.batch - len(found)
    images = torch.cat([found, observation.prior.mean.expand(missing, *observation.image_shape)])
    labels = layer.labels(known.which[order])
    value = proof.decibel[order] if believable(observation, layer) else torch.zeros_like(proof.decibel)
    decibel = torch.cat([value, proof.decibel.new_full((missing,), -torch.inf)])
    notes = [f"{len(found)} of {observation.batch} images found, {int(proof.proven.sum())} proven"] if missing else []
    if layer.undeclared:
        notes.append(f"noise that nobody declared: {layer.undeclared:.2g} per entry")
    return Candidate(
        images,
        torch.cat([labels, remaining(guess, labels).to(labels)]),
        method,
        est_psnr=_lowest(decibel),
        image_psnr=tuple(decibel.tolist()),
        layers_ok=not missing and bool((decibel >= EXACT_DB).all()),
        notes=tuple(notes),
    )


def _lowest(decibel: Tensor) -> float | None:
    """Of the proven images; None where none is."""
    proven = decibel[decibel >= EXACT_DB]
    return float(proven.min()) if len(proven) else None


def remaining(guess: Tensor, found: Tensor) -> Tensor:
    """Labels of the guess that are left once those found are taken out, as many as images are missing."""
    left = guess.tolist()
    for label in found.tolist():
        if label in left:
            left.remove(label)
    return torch.tensor(left, dtype=guess.dtype, device=guess.device)[: len(guess) - len(found)]


def features_of(observation: Observation, proof: Proof) -> Features | None:
    """The proven inputs of a layer behind others, in their order; None where some are missing."""
    known, layer = proof.known, proof.known.layer
    if layer.pixels or not known.complete or not bool(proof.proven.all()):
        return None
    std = (proof.error * known.norms)[:, None].expand_as(known.inputs) / known.inputs.shape[1] ** 0.5
    like = observation.gradient
    return Features(known.inputs.to(like), std.to(like), feature_function(observation.simulation.model, layer.name))


def believable(observation: Observation, layer: ReluLayer) -> bool:
    """Nobody added so much noise without saying so that nothing in the observation can be relied on."""
    return layer.undeclared * math.sqrt(observation.gradient.numel()) <= TOLERANCE * observation.norm


def start(run: Attempt) -> ReluLayer:
    """The layer to work on.

    Raises:
        NotApplicable: there is none, or one image has better methods.
    """
    if run.observation.batch == 1:
        raise NotApplicable("one image needs no peeling")
    return find_relu_layer(run.observation, run.recorded)


def hand_in(run: Attempt, proof: Proof, method: str, guess: Tensor) -> list[Candidate]:
    """Keep a proof for the stages to come, and the images in it as a candidate.

    Raises:
        NotApplicable: nothing was found, or features instead of pixels.
    """
    layer, batch = proof.known.layer, run.observation.batch
    run.proof = proof
    if not len(proof.known):
        noise = float(layer.dw_error.norm() / layer.dw.norm().clamp(min=1e-300))
        raise NotApplicable(f"no row of {layer.name} gives one image of {batch}; its noise is {noise:.1g} of it")
    if layer.pixels:
        return [candidate_of(run.observation, proof, method, guess)]
    if features_of(run.observation, proof) is not None and run.labels.source != "oracle":
        run.labels = Labels((layer.labels(proof.known.which),), "recovered", f"found with the inputs of {layer.name}")
    count = int(proof.proven.sum())
    raise NotApplicable(f"no pixels: the inputs of {layer.name} are features, certified for {count} of {batch} images")


def stage(run: Attempt) -> None:
    """Batches, a fully connected layer with ReLU."""
    run.attempt("peel", lambda y, c: hand_in(run, peel(start(run), c), "peel", y), once=True)
