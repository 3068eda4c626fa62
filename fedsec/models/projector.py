"""Parallel-beam projections of an image and their exact transpose: what unrolled reconstruction is made of."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fedsec.errors import ConfigError

LARGEST = 128
"""Side in pixels; the matrix has 2 · views · side² entries."""
POWER_ITERATIONS = 50


class Projector:
    """Line integrals A of images on [-1, 1]², as one sparse matrix, so that the adjoint is its exact transpose.

    Every pixel centre t = x cos θ + y sin θ gives its value to the two nearest bins with linear weights, times pixel
    area / bin width. Views stand at the angles π v/V, bins on [-√2, √2].

    Args:
        side: of the images in pixels. views: V. bins: B of each view.

    Raises:
        ConfigError: images larger than 128 pixels, whose matrix would be too large.
    """

    def __init__(self, side: int, views: int, bins: int) -> None:
        if side > LARGEST:
            raise ConfigError(f"projections of {side}x{side} pixels: the matrix fits up to {LARGEST}; give data.size")
        self.side, self.views, self.bins = side, views, bins
        indices, values = _entries(side, views, bins)
        shape = (views * bins, side * side)
        forward = torch.sparse_coo_tensor(indices, values, shape, check_invariants=True).coalesce()
        backward = torch.sparse_coo_tensor(indices.flip(0), values, shape[::-1], check_invariants=True).coalesce()
        # Both directions as rows, which is what products are fast with; double precision, cast where it is used.
        self._matrices = {(torch.float64, torch.device("cpu")): (forward, backward)}
        self.norm_squared = self._largest_eigenvalue()

    def project(self, images: Tensor) -> Tensor:
        """A x: (..., side, side) -> (..., V, B)."""
        sinograms: Tensor = self._apply(images, 0).unflatten(-1, (self.views, self.bins))
        return sinograms

    def backproject(self, sinograms: Tensor) -> Tensor:
        """Aᵀ y: (..., V, B) -> (..., side, side)."""
        images: Tensor = self._apply(sinograms, 1).unflatten(-1, (self.side, self.side))
        return images

    def __deepcopy__(self, memo: object) -> Projector:
        """Nothing of it ever changes: copies of a model share it."""
        return self

    def _apply(self, x: Tensor, direction: int) -> Tensor:
        flat = x.flatten(-2)
        columns = flat.reshape(-1, flat.shape[-1]).T
        return _Product.apply(columns, self, direction).T.reshape(*flat.shape[:-1], -1)  # type: ignore[no-any-return]

    def matrix(self, like: Tensor, direction: int) -> Tensor:
        """The sparse A (0) or Aᵀ (1) in the precision and on the device of a tensor."""
        key = (like.dtype, like.device)
        if key not in self._matrices:
            forward, backward = next(iter(self._matrices.values()))
            self._matrices[key] = forward.to(*key[::-1]), backward.to(*key[::-1])
        return self._matrices[key][direction]

    def _largest_eigenvalue(self) -> float:
        """‖A‖², by power iteration from a constant image (A has no negative entry, so neither has its vector)."""
        image = torch.full((self.side, self.side), 1 / self.side, dtype=torch.float64)
        value = torch.ones((), dtype=torch.float64)
        for _ in range(POWER_ITERATIONS):
            image = self.backproject(self.project(image))
            value = torch.linalg.vector_norm(image)
            image = image / value
        return float(value)


class _Product(torch.autograd.Function):
    """Matrix times dense columns; differentiable as often as one likes, and under `torch.func`.

    The sparse matrix stays out of the arguments: function transforms cannot wrap one.
    """

    @staticmethod
    def forward(columns: Tensor, projector: Projector, direction: int) -> Tensor:
        return torch.sparse.mm(projector.matrix(columns, direction), columns)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Projector, int], output: Tensor) -> None:
        ctx.projector, ctx.direction = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Product.apply(gradients[0], ctx.projector, 1 - ctx.direction), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return _Product.apply(tangents[0], ctx.projector, ctx.direction)  # type: ignore[no-any-return]

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int, None, None], columns: Tensor, projector: Projector, direction: int
    ) -> tuple[Tensor, int]:
        """A mapped batch is further columns."""
        together = columns.movedim(dims[0], -1)
        product = _Product.apply(together.flatten(1), projector, direction)
        return product.unflatten(1, together.shape[1:]), 2


def _entries(side: int, views: int, bins: int) -> tuple[Tensor, Tensor]:
    """(2, n) positions and (n,) values of the matrix."""
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    angles = torch.arange(views, dtype=torch.float64)[:, None] * math.pi / views
    width = 2 * math.sqrt(2) / bins
    t = x.flatten() * angles.cos() + y.flatten() * angles.sin()
    place = (t + math.sqrt(2)) / width - 0.5
    left = place.floor()
    share = place - left
    pixels = torch.arange(side * side).expand(views, -1)
    first = torch.arange(views)[:, None] * bins
    rows, columns, values = [], [], []
    for bin_, weight in ((left.long(), 1 - share), (left.long() + 1, share)):
        inside = (bin_ >= 0) & (bin_ < bins)
        rows.append((first + bin_)[inside])
        columns.append(pixels[inside])
        values.append(weight[inside] * (2 / side) ** 2 / width)
    return torch.stack([torch.cat(rows), torch.cat(columns)]), torch.cat(values)
