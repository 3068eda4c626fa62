"""The input of a convolution, from its output and its weight gradient: one linear least-squares problem.

Notation: input x (I, n) with n pixels, output z (O, n′) before the activation, δ = ∂ℓ/∂z, kernel taps q = 1…k².
Gradient rows say Σ_p δ[o,p]·x[i,τ(p,q)] = dW[o,i,q], with the same matrix A for every input channel; forward rows say
Σ_{i,q} W[o,i,q]·x[i,τ(p,q)] = z[o,p] − a[o]. Neither kind suffices on real nets, and they must be weighted by their
errors. Gradient rows: Zhu and Blaschko 2021 (R-GAP, 2010.07733); Eltaras et al. 2024 (R-CONV, 2406.04227).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from .candidate import NotApplicable
from .clock import uncounted

MAX_SYSTEM = 5_000
"""Largest dense system that is factored: 200 MB and some 2 s."""
INACCURATE = 1e-6
"""Relative residual of the normal equations above which the cheaper factorisation is not trusted."""
Rows = Literal["both", "gradient", "forward"]


@dataclass(frozen=True)
class Geometry:
    """Shape of a convolution: input (channels, height, width), output likewise, and its index map."""

    input: tuple[int, int, int]
    output: tuple[int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @cached_property
    def pixels(self) -> int:
        """n."""
        return self.input[1] * self.input[2]

    @cached_property
    def positions(self) -> int:
        """n′."""
        return self.output[1] * self.output[2]

    def taps(self, device: torch.device) -> Tensor:
        """τ: (k², n′) int64, the input pixel that each tap touches at each position; n where it is in the padding."""
        return _taps(self, device)


@lru_cache(maxsize=64)
@uncounted()
def _taps(geometry: Geometry, device: torch.device) -> Tensor:
    _, height, width = geometry.input
    number = torch.arange(1, geometry.pixels + 1, dtype=torch.float64, device=device).view(1, 1, height, width)
    patches = F.unfold(number, geometry.kernel, geometry.dilation, geometry.padding, geometry.stride)
    tau = patches[0].round().long() - 1
    return torch.where(tau < 0, geometry.pixels, tau)


def gradient_matrix(delta: Tensor, geometry: Geometry) -> Tensor:
    """A (O·k², n) with A[(o,q), t] = Σ_{p: τ(p,q)=t} δ[o,p]; `delta` is (O, n′)."""
    tau = geometry.taps(delta.device)
    out = delta.new_zeros(len(delta), len(tau), geometry.pixels + 1)
    # A tap touches a pixel from one position at most, so assignment is the sum.
    out.scatter_(2, tau.expand(len(delta), -1, -1), delta[:, None, :].expand(-1, len(tau), -1))
    return out[..., :-1].reshape(-1, geometry.pixels)


def forward_matrix(weight: Tensor, geometry: Geometry, channel: int | None = None) -> Tensor:
    """Fᵀ (I·n, O·n′), the transpose of the convolution's matrix, or its rows (n, O·n′) of one input channel.

    `weight` is (O, I, k²).
    """
    tau = geometry.taps(weight.device)
    if channel is not None:
        weight = weight[:, channel : channel + 1]
    outputs, channels, taps = weight.shape
    # The row of the padding comes last, so that leaving it out copies nothing.
    out = weight.new_zeros(geometry.pixels + 1, channels, outputs, geometry.positions)
    index = tau.view(taps, 1, 1, -1).expand(-1, channels, outputs, -1)
    out.scatter_(0, index, weight.permute(2, 1, 0)[..., None].expand(-1, -1, -1, geometry.positions))
    kept = out[:-1].reshape(geometry.pixels, channels, -1)
    return kept.transpose(0, 1).reshape(channels * geometry.pixels, -1)


def constraints(geometry: Geometry, kept: int, rows: Rows = "both") -> tuple[int, int]:
    """(constraints, unknowns) by counting rows; `kept` outputs are known."""
    channels = geometry.input[0]
    per_channel = min(geometry.output[0] * geometry.kernel[0] * geometry.kernel[1], geometry.pixels)
    counted = (channels * per_channel if rows != "forward" else 0) + (kept if rows != "gradient" else 0)
    return counted, channels * geometry.pixels


def solve_input(
    weight: Tensor,
    weight_gradient: Tensor,
    delta: Tensor,
    preactivation: Tensor,
    row_weights: Tensor,
    geometry: Geometry,
    rows: Rows = "both",
) -> Tensor:
    """x (I, n), the weighted least-squares input of a convolution. Everything is float64.

    Args:
        weight: (O, I, k²).
        weight_gradient: dW, (O, I, k²).
        delta: δ, (O, n′).
        preactivation: z minus the bias, (O, n′).
        row_weights: (O, n′), one over the error of each forward row, at most 1; 0 leaves a row out.
        geometry: the shapes.
        rows: which kind of rows to use; anything but "both" is for ablation.

    Gradient rows get the single weight 1/mean|dW|. A ridge of 1e-13 of the mean diagonal keeps the Cholesky factor
    alive. Where the outputs are fewer than the unknowns, Woodbury's identity factors the smaller system if it can.
    """
    channels, n = geometry.input[0], geometry.pixels
    outputs, unknowns = delta.numel(), channels * n
    # Woodbury's identity inverts the gradient rows of one channel: they must determine its pixels by themselves.
    smaller = outputs < unknowns and geometry.output[0] * weight.shape[2] >= n
    size = outputs if smaller else unknowns
    if size > MAX_SYSTEM:
        raise NotApplicable(f"a system of {size:,} unknowns is above the limit of {MAX_SYSTEM:,}")
    scale = 1.0 / weight_gradient.abs().mean().clamp(min=1e-300) ** 2 if rows != "forward" else 0.0
    squared = row_weights.reshape(-1) ** 2 if rows != "gradient" else torch.zeros_like(row_weights).reshape(-1)
    matrix = gradient_matrix(delta, geometry)
    gram = scale * (matrix.T @ matrix)
    rhs = scale * (weight_gradient.transpose(0, 1).reshape(channels, -1) @ matrix)
    operator = _Convolution(weight, geometry)
    rhs = rhs + operator.transpose(squared.view_as(delta) * preactivation)
    solution = (_woodbury if smaller else _normal)(operator, gram, squared, rhs)
    if smaller and unknowns <= MAX_SYSTEM:
        left = rhs - _product(operator, gram, squared, solution)
        if not float(left.norm()) <= INACCURATE * float(rhs.norm()):  # those rows were short of rank all the same
            return _normal(operator, gram, squared, rhs)
    return solution


class _Convolution:
    """F and Fᵀ of a convolution without bias on (I, n) and (O, n′)."""

    def __init__(self, weight: Tensor, geometry: Geometry) -> None:
        self.weight, self.geometry = weight, geometry
        self.kernel = weight.view(*weight.shape[:2], *geometry.kernel)

    def forward(self, x: Tensor) -> Tensor:
        g = self.geometry
        out = F.conv2d(x.view(1, *g.input), self.kernel, None, g.stride, g.padding, g.dilation)
        return out.view(g.output[0], -1)

    def transpose(self, z: Tensor) -> Tensor:
        g = self.geometry
        grad: Tensor = conv2d_input(
            (1, *g.input), self.kernel, z.reshape(1, *g.output), g.stride, g.padding, g.dilation
        )
        return grad.view(g.input[0], -1)

    def gram(self, squared: Tensor) -> Tensor:
        """Fᵀ·diag(squared)·F, (I·n, I·n), assembled position by position."""
        g = self.geometry
        outputs, channels, taps = self.weight.shape
        n = g.pixels
        if len(squared) * (channels * n) ** 2 < 250 * g.positions * (channels * taps) ** 2:  # by measured cost
            dense = forward_matrix(self.weight, g) * squared.sqrt()
            return dense @ dense.T
        flat = self.weight.reshape(outputs, -1)
        local = torch.einsum("op,ou,ov->puv", squared.view(outputs, -1), flat, flat)
        offset = torch.arange(channels, device=flat.device)[:, None, None] * (n + 1)
        index = (offset + g.taps(flat.device)).reshape(channels * taps, -1).T
        side = channels * (n + 1)
        total = flat.new_zeros(side * side)
        total.index_add_(0, (index[:, :, None] * side + index[:, None, :]).reshape(-1), local.reshape(-1))
        return total.view(channels, n + 1, channels, n + 1)[:, :n, :, :n].reshape(channels * n, channels * n)


def _normal(operator: _Convolution, gram: Tensor, squared: Tensor, rhs: Tensor) -> Tensor:
    channels, n = rhs.shape
    system = operator.gram(squared)
    blocks = system.view(channels, n, channels, n)
    for i in range(channels):
        blocks[i, :, i] += gram
    diagonal = system.diagonal()
    diagonal += 1e-13 * diagonal.mean()
    return torch.cholesky_solve(rhs.reshape(-1, 1), _cholesky(system)).view(channels, n)


def _woodbury(operator: _Convolution, gram: Tensor, squared: Tensor, rhs: Tensor) -> Tensor:
    channels, n = rhs.shape
    gram = gram.clone()
    gram.diagonal().add_(1e-12 * gram.diagonal().mean().clamp(min=1e-300))
    factor = _cholesky(gram)
    root = squared.sqrt()
    inner = torch.eye(len(squared), dtype=rhs.dtype, device=rhs.device)
    # Multiplying by the inverted factor avoids the copies of a triangular solve; refinement repairs its rounding.
    whiten = torch.linalg.solve_triangular(factor, torch.eye(n, dtype=rhs.dtype, device=rhs.device), upper=False)
    for i in range(channels):
        half = whiten @ (forward_matrix(operator.weight, operator.geometry, i) * root)
        inner.addmm_(half.T, half)
    inner_factor = _cholesky(inner)
    shape = (operator.geometry.output[0], -1)

    def apply_inverse(b: Tensor) -> Tensor:
        y = torch.cholesky_solve(b.T, factor).T
        inside = root * operator.forward(y).reshape(-1)
        inside = root * torch.cholesky_solve(inside[:, None], inner_factor)[:, 0]
        return y - torch.cholesky_solve(operator.transpose(inside.view(shape)).T, factor).T

    x = apply_inverse(rhs)
    for _ in range(2):
        x = x + apply_inverse(rhs - _product(operator, gram, squared, x))
    return x


def _product(operator: _Convolution, gram: Tensor, squared: Tensor, x: Tensor) -> Tensor:
    """The normal equations' matrix times x (I, n)."""
    return x @ gram + operator.transpose(squared.view(operator.geometry.output[0], -1) * operator.forward(x))


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise NotApplicable(f"the system is rank-short: pivot {int(info)} of {len(matrix)} is not positive")
    return factor
