"""What is left of a fully connected layer's gradient once some images are known, and how sure are these images?

D = Σ_i δ_i·x_iᵀ. Known inputs are refined together, by least squares over the rows of D that they explain, and every
error is carried along: rows whose rest is within the error are explained, rows far above it hold further images.
Robust regression by reweighting (Holland and Welsch 1977), leaving one row out by Sherman and Morrison (1950).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .certificate import EXACT_DB
from .relu_layer import ReluLayer

EXPLAINED = 3.0
"""A row is explained where its rest is below so many times its error."""
LEAST = 1e-9
"""Relative error below which no input is believed to be known."""
SIGNIFICANT = 10.0
"""An image's part in a row counts where it is so many times the row's error."""
WIDENINGS = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Factors on the rounding at which rows may count as explained: a tiny image that is not known disturbs many rows."""
IMPROVES = 0.98
"""A step is kept where it brings the misfit below this share."""
SOLE = 1e-6
"""Distance of a row's leverage from 1 below which leaving it out is computed anew."""
LOOSE = 0.05
"""Relative error above which an input is not moved by the rows it shares."""


@dataclass(frozen=True)
class Deflation:
    """Inputs of a layer that are known, and what they leave of its gradient."""

    layer: ReluLayer
    inputs: Tensor
    """x (k, d)."""
    which: Tensor
    """(k,) their labels, as rows of `layer.targets`."""
    error: Tensor
    """(k,) relative error of each input."""
    rounding: Tensor
    """(k,) what the client's float32 did to the probability of the label, in units of `relu_layer.EPS`."""
    rounding_std: Tensor
    """(k,) what is not known of that."""

    @classmethod
    def start(cls, layer: ReluLayer) -> Deflation:
        """Nothing is known yet."""
        none = layer.da.new_zeros(0)
        which = torch.zeros(0, dtype=torch.long, device=none.device)
        return cls(layer, layer.dw.new_zeros(0, layer.dw.shape[1]), which, none, none, none)

    def adding(self, inputs: Tensor, which: Tensor, error: Tensor) -> Deflation:
        """The same with further inputs."""
        return Deflation(
            self.layer,
            torch.cat([self.inputs, inputs]),
            torch.cat([self.which, which]),
            torch.cat([self.error, error.clamp(min=LEAST)]),
            torch.cat([self.rounding, torch.zeros_like(error)]),
            torch.cat([self.rounding_std, torch.ones_like(error)]),
        )

    def keeping(self, rows: Tensor) -> Deflation:
        """The same with some of the inputs."""
        parts = (self.inputs, self.which, self.error, self.rounding, self.rounding_std)
        return Deflation(self.layer, *(p[rows] for p in parts))

    def moved(self, inputs: Tensor, error: Tensor) -> Deflation:
        """Better inputs; an error only ever falls."""
        moved = replace(self, inputs=inputs, error=torch.minimum(self.error, error).clamp(min=LEAST))
        return moved.with_rounding()

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def complete(self) -> bool:
        """Every image is known."""
        return len(self) == self.layer.batch

    @cached_property
    def norms(self) -> Tensor:
        """‖x_i‖ (k,)."""
        norms: Tensor = self.inputs.norm(dim=1)
        return norms

    @cached_property
    def _columns(self) -> tuple[Tensor, Tensor]:
        column, slack = self.layer.columns(self.inputs, self.which)
        return column + self.rounding[:, None] * slack, slack

    @property
    def columns(self) -> Tensor:
        """δ (k, m)."""
        return self._columns[0]

    @cached_property
    def slack(self) -> Tensor:
        """(k, m) standard deviation of δ from the client's rounding."""
        return self._columns[1] * self.rounding_std[:, None]

    @cached_property
    def rest(self) -> Tensor:
        """(m, d + 1) what is left of D and, in the last column, of β."""
        known = torch.cat([self.inputs, torch.ones_like(self.error)[:, None]], 1)
        rest: Tensor = self.layer.both - self.columns.T @ known
        return rest

    @cached_property
    def rest_norms(self) -> Tensor:
        """(m,) of the rest of each row of D."""
        norms: Tensor = self.rest[:, :-1].norm(dim=1)
        return norms

    @cached_property
    def rounded(self) -> Tensor:
        """(m,) error of each row of D with all inputs exact."""
        error: Tensor = (self.layer.dw_error**2 + ((self.slack * self.norms[:, None]) ** 2).sum(0)).sqrt()
        return error

    @cached_property
    def row_error(self) -> Tensor:
        """(m,) error of the rest of each row of D."""
        relative = (2 * self.error[:, None] * self.columns.abs()) ** 2 + self.slack**2
        error: Tensor = (self.layer.dw_error**2 + (relative * self.norms[:, None] ** 2).sum(0)).sqrt()
        return error

    @cached_property
    def bias_error(self) -> Tensor:
        """(m,) error of the rest of β."""
        relative = (2 * self.error[:, None] * self.columns.abs()) ** 2 + self.slack**2
        error: Tensor = (self.layer.da_error**2 + relative.sum(0)).sqrt()
        return error

    @property
    def explained(self) -> Tensor:
        """(m,) rows in which nothing but error is left."""
        rows: Tensor = self.rest_norms <= EXPLAINED * self.row_error
        return rows

    @cached_property
    def misfit(self) -> float:
        """How badly the known images explain the rows: χ² once all are known, else bounded in each row's influence."""
        square = (self.rest_norms / self.rounded) ** 2
        return float(square.sum() if self.complete else torch.log1p(square).sum())

    def with_rounding(self) -> Deflation:
        """Fit what rounding did to the labels' probabilities, N(0, 1) before, over the explained rows."""
        slack = self._columns[1]
        if not len(self) or float((slack.abs() * self.norms[:, None] / self.layer.dw_error).max()) < 0.1:
            return self
        rows = self.explained
        spread = (2 * self.error[:, None] * self.columns.abs() * self.norms[:, None]) ** 2
        error = (self.layer.dw_error**2 + spread.sum(0))[rows].sqrt()
        scaled = slack[:, rows] / error
        known = torch.cat([self.inputs, torch.ones_like(self.error)[:, None]], 1)
        information = (scaled @ scaled.T) * (known @ known.T) + torch.eye(len(self)).to(scaled)
        pull = ((known @ self.rest[rows].T) * scaled / error).sum(1)
        inverse = torch.linalg.inv(information)
        # The rest already lacks what is fitted so far, and the prior pulls the sum of both towards 0.
        rounding = self.rounding + inverse @ (pull - self.rounding)
        return replace(self, rounding=rounding, rounding_std=inverse.diagonal().clamp(min=0).sqrt().clamp(max=1))


@dataclass(frozen=True)
class Fit:
    """Inputs by least squares on some rows."""

    inputs: Tensor
    error: Tensor
    """(k,) relative standard deviation once the row that says most about an input is left out."""
    solved: Tensor
    """(k, d + 1) the least-squares solution: the scale of δ, times the input and 1."""

    @property
    def finite(self) -> bool:
        """No input is lost."""
        return bool(torch.isfinite(self.inputs).all())


def fit(known: Deflation, weights: Tensor, prior: Tensor, *, scaled: bool = False) -> Fit:
    """Least squares for all inputs at once, on D = Δᵀ·X with a column for β that carries the scale of δ.

    Args:
        known: the columns Δ are those of its inputs.
        weights: (m,) 1/error of each row, 0 to leave a row out.
        prior: (k,) relative error of the present inputs where the rows say nothing.
        scaled: multiply errors by the root of χ² a row where that is above 1.
    """
    present = torch.cat([known.inputs, torch.ones_like(known.error)[:, None]], 1)
    ridge = 1 / (prior * known.norms) ** 2
    rows = weights > 0
    design, target = known.columns[:, rows].T * weights[rows, None], known.layer.both[rows] * weights[rows, None]
    information = design.T @ design + ridge.diag()
    scale = information.diagonal().rsqrt()
    covariance = torch.linalg.inv(information * scale[:, None] * scale) * scale[:, None] * scale
    gain = covariance @ design.T
    solved = gain @ target + covariance @ (ridge[:, None] * present)
    variance = _without_best_row(design, ridge, covariance, gain)
    if scaled and len(design):
        active = int((design.abs().amax(1) * known.norms.max() > 1).sum())
        left = target[:, :-1] - design @ solved[:, :-1]
        variance = variance * max(1.0, float((left**2).sum()) / max(1, active - len(known)))
    return Fit(solved[:, :-1] / solved[:, -1:], variance.sqrt() / known.norms, solved)


def _without_best_row(design: Tensor, ridge: Tensor, covariance: Tensor, gain: Tensor) -> Tensor:
    """Variances (k,) of a least-squares solution, each without the row of the design that lowers it most."""
    if not len(design):
        return covariance.diagonal()
    leverage = (design * gain.T).sum(1).clamp(0, 1)
    sole = leverage > 1 - SOLE  # where the update by one row is rounding
    added = (gain**2 / (1 - leverage).clamp(min=SOLE)).masked_fill(sole, 0.0)
    variance = covariance.diagonal() + added.amax(1)
    if not bool(sole.any()):
        return variance
    every = design.expand(int(sole.sum()), *design.shape).clone()
    every[torch.arange(len(every)), sole.nonzero()[:, 0]] = 0.0
    information = every.mT @ every + ridge.diag()
    scale = information.diagonal(dim1=1, dim2=2).rsqrt()
    inverse = torch.linalg.inv(information * scale[:, :, None] * scale[:, None, :])
    return torch.maximum(variance, (inverse.diagonal(dim1=1, dim2=2) * scale**2).amax(0))


def robust_fit(known: Deflation, passes: int = 4) -> Fit:
    """`fit` with rows weighted by 1/max(rest, rounding): rows that hold further images lose their influence."""
    rest = known.rest_norms
    for _ in range(passes):
        found = fit(known, 1 / torch.maximum(known.rounded, rest), 10 * known.error)
        rest = (known.layer.dw - known.columns.T @ found.solved[:, :-1]).norm(dim=1)
    return found


def explained_fit(known: Deflation, widening: float = 1.0, every: bool = False) -> tuple[Fit, Tensor]:
    """`fit` on the rows that are explained to `widening` times their rounding (or on all), and which these are."""
    error = widening * known.rounded
    rows = known.rest_norms <= EXPLAINED * error
    if every:
        rows = torch.ones_like(rows)
    return fit(known, rows / error, torch.ones_like(known.error), scaled=True), rows


def refine(known: Deflation, rounds: int = 2) -> Deflation:
    """Move the inputs to their robust fit, as long as it stays near what is known of them."""
    known = known.with_rounding()
    for _ in range(rounds):
        found = robust_fit(known)
        near = torch.isfinite(found.inputs).all(1)
        near &= (found.inputs - known.inputs).norm(dim=1) < 30 * known.error * known.norms
        error = torch.where(near, found.error, torch.inf)
        known = known.moved(torch.where(near[:, None], found.inputs, known.inputs), error)
    return known


def settle(known: Deflation, rounds: int = 8) -> Deflation:
    """Polish until nothing improves. A step is kept only where the misfit falls and no input leaves its label."""
    for _ in range(rounds):
        before = known
        known = _better(known, robust_fit(known))
        if known.complete:
            known = _better(known, explained_fit(known, every=True)[0])
        found, _ = explained_fit(known)
        firm = torch.isfinite(found.inputs).all(1) & (found.error < LOOSE)
        known = _better(known, replace(found, inputs=torch.where(firm[:, None], found.inputs, known.inputs)))
        if known is before:
            break
    return known


def _better(known: Deflation, found: Fit) -> Deflation:
    if not found.finite:
        return known
    trial = known.moved(found.inputs, found.error.nan_to_num(torch.inf))
    return trial if trial.misfit < IMPROVES * known.misfit else known


@dataclass(frozen=True)
class Proof:
    """The known inputs with errors that stand on at least two rows of the gradient each."""

    known: Deflation
    error: Tensor
    """(k,) relative."""

    @cached_property
    def decibel(self) -> Tensor:
        """(k,) estimated PSNR, 0 where an input stands on one row alone."""
        return self.known.layer.decibel(self.error, self.known.inputs).nan_to_num(0.0).clamp(min=0)

    @property
    def proven(self) -> Tensor:
        """(k,) exact without a doubt."""
        return self.decibel >= EXACT_DB


def prove(known: Deflation) -> Proof:
    """Errors of the inputs, each with its best row left out, at the widening that suits it best.

    While images are missing, or one is wrong, what is left in explained rows may be theirs, the same in all rows: it
    does not average out, and may be as large as what counts as explained.
    """
    known = settle(known)
    best, inputs = torch.full_like(known.error, torch.inf), known.inputs
    consistent = known.complete and bool((known.rest_norms <= SIGNIFICANT * known.rounded).all())
    for widening in WIDENINGS:
        found, rows = explained_fit(known, widening)
        error = found.error
        if not consistent:
            parts = known.columns.abs() * known.norms[:, None]
            held = (parts[:, rows] > SIGNIFICANT * widening * known.rounded[rows]).sum(1)
            error = error * EXPLAINED * held.clamp(min=1).sqrt()
        change = (found.inputs - known.inputs).norm(dim=1) / known.norms
        error = torch.maximum(error, change).nan_to_num(math.inf)
        better = error < best
        inputs = torch.where(better[:, None], found.inputs, inputs)
        best = torch.where(better, error, best)
        if bool((known.layer.decibel(best, inputs) >= EXACT_DB).all()):
            break
    return Proof(replace(known, inputs=inputs), best)
