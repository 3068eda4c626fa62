"""Networks against sorts: the 0–1 principle, and numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fedsec.robust import order
from fedsec.robust.order import closest_mean, columns_of, middle, network, order_mean
from tests.robust.cases import rows

CPU = torch.device("cpu")


def run(pruned: tuple[order.Comparator, ...], values: list[int]) -> list[int]:
    values = list(values)
    for low, high, keeps in pruned:
        a, b = values[low], values[high]
        if keeps != "high":
            values[low] = min(a, b)
        if keeps != "low":
            values[high] = max(a, b)
    return values


@pytest.mark.parametrize("n", range(2, 11))
def test_a_network_sorts_every_sequence_of_zeros_and_ones(n: int) -> None:
    """Then it sorts everything (Knuth's 0–1 principle); pruned, the wanted ranks still come out right."""
    everything = network(n, tuple(range(n)))
    pruned = network(n, middle(n))
    for bits in itertools.product((0, 1), repeat=n):
        assert run(everything, list(bits)) == sorted(bits)
        assert [run(pruned, list(bits))[r] for r in middle(n)] == [sorted(bits)[r] for r in middle(n)]
    operations = sum(2 if c.keeps == "both" else 1 for c in pruned)
    assert operations < 2 * len(everything) or n == 2


@pytest.mark.parametrize("n", [13, 20, 31, 32, 64])
def test_larger_networks_sort_random_sequences(n: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = list(rng.permutation(n))
        assert run(network(n, tuple(range(n))), values) == sorted(values)


@pytest.mark.parametrize("n", [1, 2, 3, 9, 10, 32, 33, 50])
def test_median_and_trimmed_mean_equal_numpy(n: int) -> None:
    x = rows(n, 5000)
    fill = columns_of([torch.tensor(row) for row in x], [1.0] * n)
    np.testing.assert_allclose(order_mean(fill, n, 5000, middle(n), CPU).numpy(), np.median(x, axis=0), rtol=1e-6)
    drop = n // 4
    expected = np.sort(x.astype(np.float64), axis=0)[drop : n - drop].mean(0)
    found = order_mean(fill, n, 5000, tuple(range(drop, n - drop)), CPU).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_network_and_sort_agree_on_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(15, 3000)
    fill = columns_of([torch.tensor(row) for row in x], [1.0] * 15)
    by_network = order_mean(fill, 15, 3000, middle(15), CPU)
    monkeypatch.setattr(order, "NETWORK_LIMIT", 1)
    assert torch.equal(by_network, order_mean(fill, 15, 3000, middle(15), CPU))


@pytest.mark.parametrize(("n", "keep"), [(7, 3), (8, 4), (5, 5), (9, 1)])
def test_closest_mean_equals_brute_force(n: int, keep: int) -> None:
    x = rows(n, 200)
    fill = columns_of([torch.tensor(row) for row in x], [1.0] * n)
    found = closest_mean(fill, n, 200, keep, CPU).numpy()
    for j in range(200):
        column = x[:, j].astype(np.float64)
        nearest = np.argsort(np.abs(column - np.median(column)))[:keep]
        np.testing.assert_allclose(found[j], column[nearest].mean(), rtol=1e-5, atol=1e-6)
