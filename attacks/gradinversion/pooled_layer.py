"""The input of a convolution whose output is pooled: which position of each window was the largest, and what went in?

With δ known for each window and H (I, n) the unknown input, the weight gradient is dW[o,:,q] = Σ_w δ[o,w]·H[:,τ(p,q)]
with p the arg max of window w: discrete unknowns p and continuous ones H. Given H the positions follow, given the
positions H is a linear least-squares problem with far more rows than unknowns; alternating from a vague image settles
within a few rounds on a pair that explains dW to the last digit, or visibly fails to. As in `conv_solve`, float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from .conv_solve import Geometry, gradient_matrix

SWEEPS = 10
"""Passes over all windows in one search for positions."""
ROUNDS, CONFIRMING = 12, 3
"""Alternations between positions and input; in the last ones the positions follow from the input alone."""
GUESSED, CLOSE = 1e-4, 1e-3
"""Share of a determined pixel's value that may stem from the guess, unless its error is this share of H's spread."""
TRUSTED = 0.25
"""Share of the output channels that explain dW best and set the scale of what counts as an outlier."""
RIDGE = 1e-13
"""Share of the mean diagonal that keeps the last solve regular; it moves nothing above float64 rounding."""


@dataclass(frozen=True)
class PooledLayer:
    """A convolution, an affine map of its output, an activation and max pooling, with what is known about them."""

    geometry: Geometry
    weight: Tensor
    """(O, I, k²)."""
    gain: Tensor
    """(O, 1): z = gain·(W∗H) + shift."""
    shift: Tensor
    """(O, 1)."""
    windows: Tensor
    """(M, K) int64, the positions of the convolution's output in each window."""
    weight_gradient: Tensor
    """dW (O, I, k²)."""
    delta: Tensor
    """(O, M): ∂ℓ/∂(convolution's output) at the largest position of each window."""
    pooled: Tensor
    """(O, M): z at the largest position; only read where δ is not zero."""
    low: float = -float("inf")
    """The least that an entry of the input can be."""

    @cached_property
    def rows(self) -> Tensor:
        """dW in the order of the gradient matrix's rows, (O·k², I)."""
        return self.weight_gradient.transpose(1, 2).reshape(-1, self.geometry.input[0])

    @cached_property
    def energy(self) -> Tensor:
        """Σ_w δ² of each output channel, (O,), 1 where the channel is dead."""
        energy = self.delta.pow(2).sum(1)
        return torch.where(energy > 0, energy, 1.0)

    @cached_property
    def alive(self) -> Tensor:
        """(O,) bool: some window passes a gradient."""
        return (self.delta != 0).any(1)

    def output(self, x: Tensor) -> Tensor:
        """z (O, n′) of an input (I, n)."""
        g = self.geometry
        kernel = self.weight.view(*self.weight.shape[:2], *g.kernel)
        out = F.conv2d(x.view(1, *g.input), kernel, None, g.stride, g.padding, g.dilation)
        return self.gain * out.view(g.output[0], -1) + self.shift

    def largest(self, x: Tensor) -> Tensor:
        """The positions (O, M) that pooling takes for an input (I, n)."""
        inside = self.output(x)[:, self.windows]
        return self.windows.expand_as(inside).gather(2, inside.argmax(2, keepdim=True))[..., 0]

    def matrix(self, positions: Tensor) -> Tensor:
        """The gradient rows (O·k², n) at given positions (O, M)."""
        spread = self.delta.new_zeros(len(self.delta), self.geometry.positions)
        return gradient_matrix(spread.scatter_add_(1, positions, self.delta), self.geometry)

    def errors(self, matrix: Tensor, x: Tensor) -> Tensor:
        """Mean squared residual of each output channel's rows, (O,), as a variance of the entries of H."""
        left = (self.rows - matrix @ x.T).view(len(self.delta), -1)
        return left.pow(2).mean(1) / self.energy

    def search(self, x: Tensor, positions: Tensor) -> Tensor:
        """Better positions for an input (I, n), one window of every channel at a time.

        Minimises ‖dW_o − Σ_w δ·patch(p_w)‖² + (‖δ_o‖²/‖gain·W_o‖²)·Σ_w (z(p_w) − pooled)²: both residuals are then
        in units of an error of H. Windows without gradient keep their position.
        """
        g = self.geometry
        patches = F.unfold(x.view(1, *g.input), g.kernel, g.dilation, g.padding, g.stride)[0].T
        gram = patches @ patches.T
        wanted = self.weight_gradient.reshape(len(self.delta), -1) @ patches.T
        scale = self.energy / (self.gain * self.weight.flatten(1)).pow(2).sum(1).clamp(min=1e-300)
        misses = (self.output(x)[:, self.windows] - self.pooled[..., None]) ** 2 * scale[:, None, None]
        positions = positions.clone()
        spread = torch.zeros_like(wanted).scatter_add_(1, positions, self.delta)
        overlap = spread @ gram - wanted  # of each patch with what is explained too much
        for _ in range(SWEEPS):
            changed = False
            for w, candidates in enumerate(self.windows):
                step, current = self.delta[:, w, None], positions[:, w]
                own = gram[current]
                cost = step**2 * gram.diagonal()[candidates] + misses[:, w]
                cost = cost + 2 * step * (overlap[:, candidates] - step * own[:, candidates])
                best = torch.where(step[:, 0] == 0, current, candidates[cost.argmin(1)])
                moved = best != current
                if bool(moved.any()):
                    changed = True
                    overlap[moved] += step[moved] * (gram[best[moved]] - own[moved])
                    positions[:, w] = best
            if not changed:
                break
        return positions

    def mismatch(self, x: Tensor) -> float:
        """Forward pass of an input (I, n) against `pooled`, as a share of how much a channel varies; no solve used it.

        Windows without gradient do not count. Infinite where none is left.
        """
        live = (self.delta != 0).to(x)
        count = live.sum(1, keepdim=True).clamp(min=1)
        known = torch.where(live > 0, self.pooled, 0.0)
        varying = (known - known.sum(1, keepdim=True) / count) * live
        left = (self.output(x)[:, self.windows].amax(2) - known) * live
        share = float(left.norm() / varying.norm().clamp(min=1e-300))
        return share if share == share and bool(live.any()) else float("inf")

    def solve(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """The input from a vague guess `start` of it (I, n); without pooling the guess does not matter.

        Rows count by how well their channel is explained, and H is drawn to the guess by how wrong that is, both as
        the update itself shows. The last rounds take the positions that follow from H.

        Returns:
            H (I, n), not clamped; which pixels (n,) are determined: those that no window touches keep the guess.
        """
        x, positions = start.clamp(min=self.low), self.largest(start)
        pooled = self.windows.shape[1] > 1
        ridge = 0.0
        for left in reversed(range(ROUNDS if pooled else 2)):
            positions = self.search(x, positions) if left >= CONFIRMING else self.largest(x)
            matrix = self.matrix(positions)
            errors = self.errors(matrix, x)
            known = errors[self.alive].sort().values
            trusted = float(known[int(TRUSTED * len(known))])
            if pooled and ridge == 0.0:
                ridge = 1 / max(float(known.median()), 1e-300)
            weights = self.alive / ((errors + trusted).clamp(min=1e-300) * self.energy)
            free, guessed = self._least_squares(matrix, weights, start, ridge)
            x = free.clamp(min=self.low)
        close = ridge > 0 and ridge**-0.5 < CLOSE * float(free.std())
        return free, guessed < GUESSED if not close else torch.ones_like(guessed, dtype=torch.bool)

    def _least_squares(self, matrix: Tensor, weights: Tensor, prior: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        weighted = matrix * weights.repeat_interleave(self.weight.shape[2])[:, None]
        normal = weighted.T @ matrix
        diagonal = normal.diagonal()
        ridge = ridge + RIDGE * float(diagonal.mean())
        diagonal += ridge
        right = weighted.T @ (self.rows - matrix @ prior.T)
        inverse = torch.linalg.inv(normal)
        return prior + (inverse @ right).T, ridge * inverse.diagonal()
