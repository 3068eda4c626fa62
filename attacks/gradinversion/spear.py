"""Batches in front of a fully connected layer with ReLU, by low rank: for images that share all their neurons.

D = Δ·Xᵀ = L·R has rank B, so Δ = L·Q·diag(s) for one invertible Q, and ReLU makes half of each column of Δ zero: rows
in which an image is silent span all of L but its direction q (Dimitrov et al. 2024, 2403.03945). Such rows are drawn at
random, and, our addition, from those in which a public image is silent: X-rays are alike, and 30 images are told apart
where blind draws end at 20. The gradient of the bias proves nothing; the column that the layers above give does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .candidate import Candidate, NotApplicable
from .clock import Clock
from .deflation import Deflation, Proof, prove, refine
from .features import feature_function
from .peel import hand_in, peel, start
from .relu_layer import ReluLayer

if TYPE_CHECKING:
    from .attempt import Attempt

MAX_RANK = 64
"""Images that are told apart at most; 2^(r-1) draws would find one blindly."""
BLIND_RANK = 20
"""Images up to which rows are drawn blindly, too."""
SAMPLES, ENOUGH = 2**20, 4096
"""Draws at most, and as a multiple of the 2^(r-1) that are expected to find one image."""
SECONDS, SHARE = 25.0, 0.5
"""CPU seconds at most, and share of what is left of the budget."""
PUBLIC = 2000
"""Public images whose silent rows are drawn."""
RANK = 1e-6
"""Singular values below this share of the first count as zero."""
WHITEN = 100.0
"""Condition number from which the row space is whitened, as it is after training."""
ZERO, WIDEST_ZERO = 1e-5, 3e-2
"""An entry of a normalised row of L times q is zero below the first, or its error; never above the second."""
COLUMN, COLUMN_WHITENED = 1e-3, 3e-2
"""Relative distance of a column from the one that the layers above give, below which its image is taken over."""


@dataclass(frozen=True)
class RowSpace:
    """The low-rank factor of what is left of D, on its live rows. r directions, n rows."""

    rows: Tensor
    """L (n, r), every row of norm 1."""
    zero: Tensor
    """τ (n,) below which |L·q| counts as zero."""
    live: Tensor
    """(n,) index of these rows in D."""
    factor: Tensor
    """(m, r) all rows as they are."""
    condition: float
    """κ."""

    @property
    def rank(self) -> int:
        """r."""
        return self.rows.shape[1]

    @property
    def narrowing(self) -> tuple[Tensor, ...]:
        """Thresholds, falling to τ: noise on r - 1 rows is amplified in the direction that they leave."""
        if float(self.zero.median()) <= ZERO:
            return (self.zero,)
        return tuple((k * self.zero).clamp(max=WIDEST_ZERO) for k in (300.0, 60.0, 10.0, 3.0, 1.0))

    @property
    def wide(self) -> Tensor:
        """The first of these."""
        return self.narrowing[0]

    @property
    def whitened(self) -> bool:
        """Directions of little energy were blown up."""
        return self.condition > WHITEN


def row_space(known: Deflation) -> RowSpace:
    """Factor the rest.

    Raises:
        NotApplicable: too many images, more of them than neurons, or nothing above the noise.
    """
    layer, missing = known.layer, known.layer.batch - len(known)
    if len(layer.da) < missing:
        raise NotApplicable(f"{len(layer.da)} neurons cannot tell {missing} images apart")
    left, values, _ = torch.linalg.svd(known.rest[:, :-1], full_matrices=False)
    noise = 3 * float(layer.dw_error.pow(2).mean().sqrt()) * (1 + (len(left) / layer.dw.shape[1]) ** 0.5)
    rank = min(missing, int((values > max(RANK * float(values[0]), noise)).sum()))
    if rank == 0:
        raise NotApplicable(f"nothing but rounding or noise is left of the gradient for {missing} images")
    if rank > MAX_RANK:
        raise NotApplicable(f"{rank} images are mixed in every row; {MAX_RANK} are told apart at most")
    condition = float(values[0] / values[rank - 1])
    left, energy = left[:, :rank], values[:rank]
    strength = (left * energy).norm(dim=1)
    live = (strength > torch.maximum(10 * known.row_error, 1e-7 * strength.max())).nonzero()[:, 0]
    if len(live) < rank:
        raise NotApplicable(f"{len(live)} neurons stand out of the noise: too few for {rank} images")
    factor = left if condition > WHITEN else left * energy
    norms = factor[live].norm(dim=1, keepdim=True)
    error = 5 * known.row_error[live] / layer.dw.shape[1] ** 0.5 / norms[:, 0]
    error = error / energy[-1] if condition > WHITEN else error
    return RowSpace(factor[live] / norms, error.clamp(ZERO, WIDEST_ZERO), live, factor, condition)


def directions(space: RowSpace, public: Tensor, clock: Clock, generator: torch.Generator) -> Iterator[Tensor]:
    """Directions q (K, r), those with most zeros first, again and again as more of them are found.

    Args:
        space: what is left.
        public: (N, n) outputs of the layer before its ReLU, on the live rows, for public images.
        clock: ends the search.
        generator: draws rows.
    """
    rank, count = space.rank, len(space.rows)
    least = max(rank + 2, 0.12 * count)
    size = 256 if rank <= 6 else 1024
    found, zeros = space.rows.new_zeros(0, rank), space.rows.new_zeros(0)
    drawn, blind = 0, False
    most = min(SAMPLES, ENOUGH * 2 ** (rank - 1))
    while drawn < most and clock.left > 0:
        drawn += size
        rows = _draw(public, rank - 1, (size, count), generator, blind=blind or not len(public))
        blind = not blind and rank <= BLIND_RANK
        before = len(found)
        if len(rows):
            q = null_vectors(space.rows[rows])
            hits = ((space.rows @ q.T).abs() < space.wide[:, None]).sum(0)
            good = (hits > least).nonzero()[:, 0]
            for k in good[hits[good].argsort(descending=True)].tolist():
                refit = _refit(space, q[k], found)
                if refit is not None and refit[1] > least:
                    found = torch.cat([found, refit[0][None]])
                    zeros = torch.cat([zeros, refit[1][None]])
        if len(found) > before and len(found) >= rank:
            yield found[zeros.argsort(descending=True)]


def _draw(public: Tensor, size: int, shape: tuple[int, int], generator: torch.Generator, *, blind: bool) -> Tensor:
    """Row indices (at most S, size) for `shape` (S, n): any, or those in which one public image is silent.

    Those in which it is far from being active are drawn more often: other images are silent there, too. Drawing by
    exponential variables of these rates is drawing without replacement (Efraimidis and Spirakis 2006).
    """
    key = -torch.rand(shape, generator=generator).to(public).clamp(min=1e-30).log()
    if blind:
        return key.argsort(1)[:, :size]
    image = public[torch.randint(len(public), shape[:1], generator=generator).to(public.device)]
    rate = (-image).clamp(min=0)
    return (key / rate).argsort(1)[(rate > 0).sum(1) >= size, :size]


def null_vectors(matrices: Tensor, steps: int = 3) -> Tensor:
    """Right singular vectors (S, r) of the least singular value of matrices (S, r-1, r), by inverse iteration."""
    gram = matrices.mT @ matrices
    rank = gram.shape[-1]
    shift = 1e-13 * gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-300)
    factor, _ = torch.linalg.cholesky_ex(gram + shift[:, None, None] * torch.eye(rank).to(gram))
    # A start that is orthogonal to no vector in particular.
    vector = torch.linspace(1, 2, rank).sin().to(gram).expand(len(gram), rank)[..., None]
    for _ in range(steps):
        vector = torch.cholesky_solve(vector, factor)
        vector = vector / vector.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return vector[..., 0].nan_to_num()


def _refit(space: RowSpace, q: Tensor, found: Tensor) -> tuple[Tensor, Tensor] | None:
    """q from all its zero rows, and their number; None where they leave it open or it is known already."""
    if bool(((found @ q).abs() > 1 - 1e-4).any()):
        return None
    for zero in space.narrowing:
        rows = (space.rows @ q).abs() < zero
        if int(rows.sum()) < space.rank:
            return None
        weights = space.zero.min() / space.zero[rows, None]
        _, values, vectors = torch.linalg.svd(space.rows[rows] * weights, full_matrices=True)
        q = vectors[-1]
    if space.rank > 1 and float(values[space.rank - 2]) < (1e-2 if space.whitened else 1e-4):
        return None
    if bool(((found @ q).abs() > 1 - 1e-6).any()):
        return None
    return q, ((space.rows @ q).abs() < space.zero).sum().to(q)


def independent(candidates: Tensor, rank: int, tolerance: float) -> Tensor | None:
    """The first directions (rank, rank) of the candidates that are linearly independent; None: there are too few."""
    chosen = candidates[:0]
    for q in candidates:
        trial = torch.cat([chosen, q[None]])
        if float(torch.linalg.svdvals(trial)[-1]) > tolerance:
            chosen = trial
            if len(chosen) == rank:
                return chosen
    return None


def disaggregate(factor: Tensor, bias: Tensor, chosen: Tensor) -> tuple[Tensor, float]:
    """Columns Δ (m, r) from directions (r, r), with the scales that make them add up to β.

    Returns:
        Δ, and the relative residual of β: small for any invertible set of directions, right or wrong.
    """
    raw = factor @ chosen.T
    scales = torch.linalg.lstsq(raw, bias[:, None]).solution[:, 0]
    residual = float((raw @ scales - bias).norm() / bias.norm().clamp(min=1e-300))
    return raw * scales, residual


def column_test(layer: ReluLayer, inputs: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """How far columns (r, m) are, relatively, from those which the layers above give for inputs (r, d).

    Returns:
        (r,) least distance over the labels, less what the client's rounding explains; (r,) that label.
    """
    distances = []
    for target in range(len(layer.targets)):
        which = torch.full((len(inputs),), target, device=inputs.device)
        own, slack = layer.columns(inputs, which)
        distances.append(((own - columns).norm(dim=1) - 3 * slack.norm(dim=1)).clamp(min=0))
    miss, which = torch.stack(distances).min(0)
    return miss / columns.norm(dim=1).clamp(min=1e-300), which


def images_of(known: Deflation, space: RowSpace, chosen: Tensor) -> Deflation:
    """The known inputs and those that the directions give, as far as these pass the column test and fit the box."""
    layer = known.layer
    columns, _ = disaggregate(space.factor, known.rest[:, -1], chosen)
    weights = 1 / known.row_error[:, None]
    inputs = torch.linalg.lstsq(columns * weights, known.rest[:, :-1] * weights).solution
    miss, which = column_test(layer, inputs, columns.T)
    limit = COLUMN_WHITENED if space.whitened else COLUMN
    passed = (miss <= limit) & torch.isfinite(inputs).all(1)
    if layer.box is not None:
        low, high = layer.box
        margin = (1e-3 + 3 * miss)[:, None] * (high - low)
        passed &= ((inputs <= high + margin) & (inputs >= low - margin)).all(1)
    return known.adding(inputs[passed], which[passed], miss[passed].clamp(min=1e-6))


def nothing_known(layer: ReluLayer) -> Proof:
    """Where a search without `peel` starts."""
    known = Deflation.start(layer)
    return Proof(known, known.error)


def spear(proof: Proof, clock: Clock, generator: torch.Generator, public: Tensor) -> Proof:
    """Disaggregate the rest, take out what is proven, peel, and so on until all is known or nothing is gained.

    Args:
        proof: what is known already; inputs without proof are taken for true first, and left out if that leads nowhere.
        clock: ends the search.
        generator: draws rows.
        public: (N, d) inputs of the layer for public images; may be empty.

    Returns:
        A better proof, or the same.

    Raises:
        NotApplicable: see `row_space`.
    """
    while not proof.known.complete and clock.left > 0:
        starts = [proof.known] if bool(proof.proven.all()) else [proof.known, proof.known.keeping(proof.proven)]
        found = None
        for number, known in enumerate(starts):
            if found is None:
                part = clock.share(1 / (len(starts) - number))
                found = _once(known, part, generator, public[:PUBLIC], proof)
        if found is None:
            break
        proof = found
    return proof


def _once(known: Deflation, clock: Clock, generator: torch.Generator, public: Tensor, best: Proof) -> Proof | None:
    """One factorisation, sampled until more is proven than by `best`."""
    space = row_space(known)
    outputs = known.layer.preactivation(public)[:, space.live]
    tolerance = max(1e-6, 3 * float(space.zero.min()))
    for candidates in directions(space, outputs, clock, generator):
        chosen = independent(candidates, space.rank, tolerance)
        more = known if chosen is None else images_of(known, space, chosen)
        if len(more) == len(known):
            continue
        proof = prove(refine(more))
        if not proof.known.complete or not bool(proof.proven.all()):
            proof = peel(known.layer, clock, proof.known.keeping(proof.proven))
        if int(proof.proven.sum()) > int(best.proven.sum()):
            return proof
    return None


def public_inputs(run: Attempt, layer: ReluLayer) -> Tensor:
    """What public images put into the layer, (N, d)."""
    images = run.observation.prior.images[:PUBLIC]
    if layer.pixels:
        return images.double().flatten(1) * layer.gain + layer.shift
    with torch.no_grad():
        return feature_function(run.observation.simulation.model, layer.name)(images).double()


def stage(run: Attempt) -> None:
    """Batches, a fully connected layer with ReLU: what `peel` has left."""

    def method(guess: Tensor, clock: Clock) -> list[Candidate]:
        layer = start(run) if run.proof is None else run.proof.known.layer
        before = run.proof or nothing_known(layer)
        if before.known.complete and bool(before.proven.all()):
            raise NotApplicable("nothing is left to find")
        clock = Clock(min(clock.left, SECONDS))
        found = spear(before, clock, run.generator, public_inputs(run, layer))
        if found is before and run.proof is not None:
            raise NotApplicable(f"nothing more was found in {clock.used:.1f} s")
        return hand_in(run, found, "spear", guess)

    run.attempt("spear", method, share=SHARE, once=True)
