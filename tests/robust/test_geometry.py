"""Inner products and distances of a round against float64, and the traps of float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from fedsec.robust.geometry import combine, distances_from, measure
from tests.robust.cases import rows


def of(x: np.ndarray, **options: object):
    return measure([torch.tensor(row) for row in x], **options)


@pytest.mark.parametrize("n", [2, 7, 30])
def test_equals_float64(n: int) -> None:
    x = rows(n, 5000)
    exact = x.astype(np.float64)
    found = of(x)
    np.testing.assert_allclose(found.products, exact @ exact.T, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(found.squared_distances, cdist(exact, exact, "sqeuclidean"), rtol=1e-6)
    np.testing.assert_allclose(found.cosine_distances, cdist(exact, exact, "cosine"), atol=1e-6)


def test_keeps_the_digits_of_distances_between_updates_that_are_alike() -> None:
    """Norms of 1000, distances of 1: the difference of float32 products has no digit of it."""
    x = rows(10, 5000, noise=1e-3) * 10
    exact = cdist(x.astype(np.float64), x.astype(np.float64), "sqeuclidean")
    naive = x @ x.T
    naive = np.diagonal(naive)[:, None] + np.diagonal(naive) - 2 * naive
    off = ~np.eye(10, dtype=bool)
    assert np.abs(naive / np.where(off, exact, 1) - 1)[off].max() > 0.01
    np.testing.assert_allclose(of(x).squared_distances, exact, rtol=1e-5)


def test_a_far_row_leaves_the_others_their_digits_once_it_is_clipped() -> None:
    """It may even be the row that serves as the centre."""
    x = rows(11, 2000)
    x[5] *= 1e8
    factors = [1.0] * 11
    factors[5] = 1e-7
    clipped = x.astype(np.float64) * np.array(factors)[:, None]
    found = of(x, factors=factors).squared_distances
    np.testing.assert_allclose(found, cdist(clipped, clipped, "sqeuclidean"), rtol=1e-4)


def test_equal_rows_have_equal_entries_and_near_ones_exact_distances() -> None:
    x = rows(6, 3000)
    x[4] = x[1]
    x[5] = x[1]
    x[5, 7] = np.nextafter(x[5, 7], np.float32(np.inf))
    found = of(x)
    assert found.squared_distances[1, 4] == 0
    np.testing.assert_array_equal(found.squared_distances[1, :4], found.squared_distances[4, :4])
    step = float(x[5, 7]) - float(x[1, 7])
    np.testing.assert_allclose(found.squared_distances[1, 5], step**2, rtol=1e-9)
    assert 0 < found.cosine_distances[1, 5] < 1e-12


def test_zero_rows_are_at_cosine_distance_one() -> None:
    x = rows(4)
    x[2] = 0
    found = of(x)
    np.testing.assert_array_equal(found.cosine_distances[2], [1, 1, 0, 1])
    assert found.norms[2] == 0


@given(st.integers(2, 6), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_algebra_equals_rows(n: int, seed: int) -> None:
    """Scaling, mixing and combining rows on paper gives what measuring the new rows gives."""
    rng = np.random.default_rng(seed)
    x = rows(n, 40, seed)
    exact = x.astype(np.float64)
    found = of(x)
    factors = rng.uniform(0, 2, n)
    scaled = exact * factors[:, None]
    np.testing.assert_allclose(
        found.scaled(factors).squared_distances, cdist(scaled, scaled, "sqeuclidean"), rtol=1e-5, atol=1e-4
    )
    mixing = rng.dirichlet(np.ones(n), size=3)
    mixed = mixing @ exact
    np.testing.assert_allclose(
        found.mixed(mixing).squared_distances, cdist(mixed, mixed, "sqeuclidean"), rtol=1e-5, atol=1e-4
    )
    weights = rng.dirichlet(np.ones(n))
    for coefficients in (weights, weights * 0.5):
        truth = np.linalg.norm(exact - coefficients @ exact, axis=1)
        np.testing.assert_allclose(found.distances_to(coefficients), truth, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(found.norm_of(coefficients), np.linalg.norm(coefficients @ exact), rtol=1e-4)
    centred = exact - exact.mean(0)
    np.testing.assert_allclose(found.centred, centred @ centred.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 100, 777, 100_000])
def test_chunks_do_not_matter(chunk: int) -> None:
    x = rows(5, 2000)
    np.testing.assert_allclose(of(x, chunk=chunk).squared_distances, of(x).squared_distances, rtol=1e-5)
    tensors = [torch.tensor(row) for row in x]
    weights = [0.5, 0.0, -1.0, 2.0, 0.25]
    expected = np.asarray(weights) @ x.astype(np.float64)
    np.testing.assert_allclose(combine(tensors, weights, chunk=chunk).double().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_distances_from_a_point(chunk: int) -> None:
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(3))
    point, factors = x[0] * 0.5 + 1, [1.0, 0.5, 2.0, 0.1]
    expected = [float((f * row.double() - point.double()).norm()) for f, row in zip(factors, x, strict=True)]
    np.testing.assert_allclose(distances_from(list(x), point, factors, chunk), expected, rtol=1e-6)


def test_no_row_is_modified() -> None:
    x = [torch.tensor(row) for row in rows(5)]
    before = [row.clone() for row in x]
    measure(x, factors=[0.5] * 5)
    combine(x, [1.0] * 5)
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))
