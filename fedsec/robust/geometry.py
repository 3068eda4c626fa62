"""How do a round's updates lie to each other? One pass over them serves every rule that weighs whole updates.

Every such rule is a function of inner products alone, so ten more rules on the same round, or an attack's search for
the worst factor, cost no further pass over the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.blas import ssyrk
from torch import Tensor

CHUNK = 65_536
"""Columns that a weighted sum works on at once."""
BLOCK = 2**18
"""Floats of scratch in which the products are made: they stay in the cache. Four times as many from `DENSE` rows on."""
DENSE = 24
"""Rows from which a symmetric product is faster than a general one."""
SAFE = 1e-2
"""Smallest squared distance, as a share of the largest from the centre, that float32 products still resolve well."""
NEAR = 1e-6
"""Two rows whose squared distance is at most this share of q_i + q_j are compared exactly: below, float32 products
have no digits left."""

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Geometry:
    """How m rows u_1 … u_m lie to each other, in float64."""

    products: Matrix
    """(m, m) ⟨u_i, u_j⟩."""
    squared_distances: Matrix
    """(m, m) ‖u_i − u_j‖², with digits of their own (products of rows that are alike have none left), exactly 0 for
    equal rows."""
    cosine_distances: Matrix
    """(m, m) 1 − cos(u_i, u_j), 1 where either row is zero, 0 on the diagonal."""

    def __len__(self) -> int:
        return len(self.products)

    @cached_property
    def norms(self) -> Vector:
        """(m,) ‖u_i‖."""
        norms: Vector = np.sqrt(np.maximum(0.0, np.diagonal(self.products)))
        return norms

    @cached_property
    def centred(self) -> Matrix:
        """(m, m) inner products of the rows minus their mean, by double centring of the distances."""
        half = -0.5 * self.squared_distances
        centred: Matrix = half - half.mean(0) - half.mean(1)[:, None] + half.mean()
        return centred

    def norm_of(self, coefficients: Vector) -> float:
        """‖Σ_k c_k u_k‖; with full digits where the coefficients sum to 0, as in a difference of means."""
        even = abs(coefficients.sum()) <= 1e-12 * np.abs(coefficients).sum()
        inner = -0.5 * self.squared_distances if even else self.products
        return math.sqrt(max(0.0, float(coefficients @ inner @ coefficients)))

    def distances_to(self, weights: Vector) -> Vector:
        """(m,) ‖u_i − Σ_k w_k u_k‖; with full digits where the weights sum to 1."""
        if abs(weights.sum() - 1) <= 1e-12:
            mixed = self.squared_distances @ weights
            squared = mixed - 0.5 * (weights @ mixed)
        else:
            inner = self.products @ weights
            squared = np.diagonal(self.products) - 2 * inner + weights @ inner
        distances: Vector = np.sqrt(np.maximum(0.0, squared))
        return distances

    def mixed(self, mixing: Matrix) -> Geometry:
        """The geometry of the rows Σ_k T_ik u_k, for T (k, m) whose rows all sum to the same number."""
        inner = mixing @ (-0.5 * self.squared_distances) @ mixing.T
        diagonal = np.diagonal(inner)
        squared = np.maximum(0.0, diagonal[:, None] + diagonal - 2 * inner)
        np.fill_diagonal(squared, 0.0)
        return from_products(mixing @ self.products @ mixing.T, squared)

    def scaled(self, factors: Vector) -> Geometry:
        """The geometry of the rows s_i·u_i, s_i ≥ 0.

        ‖s_i u_i − s_j u_j‖² = s_i s_j D²_ij + (s_i − s_j)(s_i q_i − s_j q_j), with q_i = ‖u_i‖².
        """
        if (factors == 1).all():
            return self
        outer = np.outer(factors, factors)
        weighted = factors * np.diagonal(self.products)
        squared = outer * self.squared_distances
        squared += (factors[:, None] - factors) * (weighted[:, None] - weighted)
        cosine = np.where(outer > 0, self.cosine_distances, 1.0)
        np.fill_diagonal(cosine, 0.0)
        return Geometry(outer * self.products, np.maximum(0.0, squared), cosine)

    def part(self, rows: Sequence[int]) -> Geometry:
        """The geometry of some of the rows."""
        pick = np.ix_(list(rows), list(rows))
        return Geometry(self.products[pick], self.squared_distances[pick], self.cosine_distances[pick])


def from_products(products: Matrix, squared_distances: Matrix) -> Geometry:
    """Cosines from inner products, with the distances as they are."""
    norms = np.sqrt(np.maximum(0.0, np.diagonal(products)))
    scale = np.outer(norms, norms)
    cosine = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    distances = np.clip(1.0 - cosine, 0.0, 2.0)
    np.fill_diagonal(distances, 0.0)
    return Geometry(products, squared_distances, distances)


NOT_MEASURED = Geometry(np.empty((0, 0)), np.empty((0, 0)), np.empty((0, 0)))
"""For rules that never look at it."""


@torch.no_grad()
def measure(rows: Sequence[Tensor], factors: Sequence[float] | None = None, chunk: int | None = None) -> Geometry:
    """One pass over m vectors.

    Rows are centred before they are multiplied, and the products of blocks are summed in float64: a float32 Gram
    matrix of rows as they come loses the digits of their distances once the rows are alike. Any row among them will do
    as the centre; where it proves to lie far off, the pass is repeated with their mean. The centre travels along as
    one more row, which gives the products that are not centred.

    Args:
        rows: m tensors (d,), any floating-point type, never modified.
        factors: scale of each row, such as a clip.
        chunk: columns at once; scratch is (m + 1)·chunk floats.
    """
    scales = list(factors) if factors is not None else [1.0] * len(rows)
    width = max(1, min(chunk or _width(len(rows)), rows[0].numel()))
    inner = _pass(rows, scales, [len(rows) // 2], width)
    geometry = _geometry(inner)
    spread = np.diagonal(inner)[:-1].max()
    apart = geometry.squared_distances[~np.eye(len(rows), dtype=bool)]
    if len(rows) > 1 and apart.min() < SAFE * spread:
        geometry = _geometry(_pass(rows, scales, list(range(len(rows))), width))
    return _exact_where_near(geometry, rows, scales, width)


def _width(count: int) -> int:
    return BLOCK * (4 if count > DENSE else 1) // (count + 1)


def _pass(rows: Sequence[Tensor], scales: Sequence[float], centre: Sequence[int], width: int) -> Matrix:
    """Products (m + 1, m + 1) of the rows minus the mean of the rows `centre`, and of that mean."""
    count, length = len(rows), rows[0].numel()
    device = rows[0].device
    scratch = torch.empty(count + 1, width, dtype=torch.float32, device=device)
    scaled = torch.empty(width, dtype=torch.float32, device=device)
    total = torch.zeros(count + 1, count + 1, dtype=torch.float64, device=device)
    symmetric = device.type == "cpu" and count > DENSE
    for start in range(0, length, width):
        stop = min(start + width, length)
        block = scratch[:, : stop - start] if stop - start == width else scratch.new_empty(count + 1, stop - start)
        middle = block[count].zero_()
        for i in centre:
            middle.add_(rows[i][start:stop], alpha=scales[i] / len(centre))
        for i, (row, scale) in enumerate(zip(rows, scales, strict=True)):
            part = row[start:stop]
            if scale != 1.0:
                part = torch.mul(part, scale, out=scaled[: stop - start])
            torch.sub(part, middle, out=block[i])
        if symmetric:  # half of the products, which pays from a few dozen rows on
            upper = ssyrk(1.0, block.numpy().T, trans=1)
            total += torch.from_numpy(np.triu(upper) + np.triu(upper, 1).T)
        else:
            total += block @ block.T
    inner: Matrix = total.cpu().numpy()
    return inner


def _geometry(inner: Matrix) -> Geometry:
    centred, across, square = inner[:-1, :-1], inner[:-1, -1], inner[-1, -1]
    centred = (centred + centred.T) / 2
    diagonal = np.diagonal(centred)
    squared = np.maximum(0.0, diagonal[:, None] + diagonal - 2 * centred)
    np.fill_diagonal(squared, 0.0)
    products = centred + across[:, None] + across + square
    np.fill_diagonal(products, np.maximum(0.0, np.diagonal(products)))
    return from_products(products, squared)


def _exact_where_near(geometry: Geometry, rows: Sequence[Tensor], scales: Sequence[float], width: int) -> Geometry:
    """Equal rows get equal entries, and nearly equal ones distances from float64 differences.

    Ties decide rules that rank: without this, rounding would break them at random.
    """
    squares = np.diagonal(geometry.products)
    near = geometry.squared_distances <= NEAR * (squares[:, None] + squares)
    pairs = list(zip(*np.nonzero(np.triu(near, 1)), strict=True))
    if not pairs:
        return geometry
    products, squared = geometry.products.copy(), geometry.squared_distances.copy()
    cosine = geometry.cosine_distances.copy()
    first = list(range(len(rows)))
    for i, j in pairs:
        if first[i] != i or first[j] != j:
            continue
        if scales[i] == scales[j] and torch.equal(rows[i], rows[j]):
            first[j] = i
            continue
        squared[i, j], cosine[i, j] = _differences(rows[i], rows[j], scales[i], scales[j], width)
        squared[j, i], cosine[j, i] = squared[i, j], cosine[i, j]
    pick = np.ix_(first, first)
    return Geometry(products[pick], squared[pick], cosine[pick])


def _differences(a: Tensor, b: Tensor, scale_a: float, scale_b: float, chunk: int) -> tuple[float, float]:
    """(‖a − b‖², 1 − cos(a, b)) in float64, the second as ½‖a/‖a‖ − b/‖b‖‖²."""
    spans = [slice(s, s + chunk) for s in range(0, a.numel(), chunk)]
    norms = [sum(float(row[s].double().square().sum()) for s in spans) ** 0.5 for row in (a, b)]
    squared = cosine = 0.0
    for span in spans:
        left, right = a[span].double(), b[span].double()
        squared += float((scale_a * left - scale_b * right).square().sum())
        if min(norms) > 0:
            cosine += float((left / norms[0] - right / norms[1]).square().sum()) / 2
    return squared, cosine if min(norms) > 0 else 1.0


@torch.no_grad()
def distances_from(rows: Sequence[Tensor], point: Tensor, factors: Sequence[float], chunk: int = CHUNK) -> Vector:
    """(m,) ‖s_i u_i − p‖ in one pass, without a copy of any row.

    Args:
        rows: m tensors (d,). point: p (d,). factors: s_i. chunk: columns at once.
    """
    squares = np.zeros(len(rows))
    scratch = torch.empty(min(chunk, point.numel()), dtype=torch.float32, device=point.device)
    for start in range(0, point.numel(), chunk):
        centre = point[start : start + chunk]
        difference = scratch[: len(centre)]
        for i, (row, factor) in enumerate(zip(rows, factors, strict=True)):
            # centre − s·u: the subtraction takes a factor on its second term for nothing.
            torch.sub(centre, row[start : start + chunk], alpha=factor, out=difference)
            squares[i] += float(torch.dot(difference, difference))
    distances: Vector = np.sqrt(squares)
    return distances


@torch.no_grad()
def combine(rows: Sequence[Tensor], coefficients: Sequence[float], chunk: int = CHUNK) -> Tensor:
    """Σ_i c_i u_i (d,) float32; rows with a zero coefficient are not read."""
    used = [(row, float(c)) for row, c in zip(rows, coefficients, strict=True) if c != 0]
    out = torch.empty(rows[0].numel(), dtype=torch.float32, device=rows[0].device)
    if not used:
        return out.zero_()
    for start in range(0, out.numel(), chunk):
        part = out[start : start + chunk]
        torch.mul(used[0][0][start : start + chunk], used[0][1], out=part)
        for row, c in used[1:]:
            part.add_(row[start : start + chunk], alpha=c)
    return out
