"""Crafted updates against their definitions: bisection, closed forms, and the published constants."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fedsec.attacks.poisoning import crafted
from fedsec.attacks.poisoning.crafted import Known, alie_z, known_from

from tests.robust.cases import rows


def known(h: int = 7, d: int = 200, seed: int = 0) -> Known:
    return known_from([torch.tensor(row) for row in rows(h, d, seed)])


@pytest.mark.parametrize(
    ("clients", "malicious", "z"),
    [
        (10, 3, 0.180),
        (10, 4, 0.431),
        (20, 6, 0.366),
        (50, 10, 0.253),
        (50, 15, 0.484),
        (100, 20, 0.286),
        (10, 1, -0.140),
    ],
)
def test_alie_z(clients: int, malicious: int, z: float) -> None:
    assert alie_z(clients, malicious) == pytest.approx(z, abs=6e-4)


@pytest.mark.parametrize(("clients", "malicious"), [(5, 1), (10, 2), (20, 2), (50, 2)])
def test_alie_without_supporters_is_still_an_attack(clients: int, malicious: int) -> None:
    assert alie_z(clients, malicious) == pytest.approx(0, abs=1e-9)
    k = known()
    moved = k.mean - crafted.alie(k, clients, malicious)
    torch.testing.assert_close(moved, crafted.LEAST_Z * k.std)


def test_mean_and_std_are_those_of_the_rows() -> None:
    k = known()
    stacked = torch.stack(k.updates).double()
    torch.testing.assert_close(k.mean.double(), stacked.mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(k.std.double(), stacked.std(0), atol=1e-6, rtol=1e-5)


def bisect(allowed, high: float = 1.0) -> float:
    while allowed(high):
        high *= 2
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low


@pytest.mark.parametrize("direction", ["mean", "std", "sign"])
@pytest.mark.parametrize("seed", range(3))
def test_min_max_and_min_sum_equal_their_definitions(direction, seed: int) -> None:
    """Bisection on the conditions of the paper, in float64 rows."""
    k = known(seed=seed)
    p = k.direction(direction)
    x = torch.stack(k.updates).double().numpy()
    m, step = x.mean(0), p.double().numpy()
    squared = ((x[:, None] - x[None]) ** 2).sum(2)

    def within_max(gamma: float) -> bool:
        return ((m + gamma * step - x) ** 2).sum(1).max() <= squared.max()

    def within_sum(gamma: float) -> bool:
        return ((m + gamma * step - x) ** 2).sum() <= squared.sum(1).max()

    assert crafted.min_max_factor(k, p) == pytest.approx(bisect(within_max), rel=1e-4)
    assert crafted.min_sum_factor(k, p) == pytest.approx(bisect(within_sum), rel=1e-4)


def test_ipm_reverses_the_mean_beyond_its_threshold() -> None:
    """ε > (n − f)/f turns the plain mean around."""
    k = known(7)
    for epsilon, reversed_ in ((2.0, False), (3.0, True)):
        everybody = torch.stack([*k.updates, *[crafted.ipm(k, epsilon)] * 3])
        assert (float(everybody.mean(0) @ k.mean) < 0) == reversed_


@pytest.mark.parametrize("complete", [True, False])
def test_fang_lies_beyond_all_honest_values_on_the_other_side(complete: bool) -> None:
    k = known()
    made = crafted.fang(k, torch.Generator().manual_seed(0), complete)
    stacked = torch.stack(k.updates)
    up = k.mean < 0
    if complete:
        assert bool((made[up] >= stacked.amax(0)[up]).all())
        assert bool((made[~up] <= stacked.amin(0)[~up]).all())
    distance = (made - k.mean) / k.std
    assert bool((distance[up] > 0).all())
    assert bool((distance[~up] < 0).all())


def test_mimic_copies_the_one_that_stands_out() -> None:
    x = rows(7, 200, noise=0.1)
    x[4] += 3 * rows(1, 200, seed=5)[0]
    assert crafted.mimic_target(known_from([torch.tensor(r) for r in x])) == 4


def test_jitter_has_the_asked_size_and_differs_between_colluders() -> None:
    k = known(d=5000)
    one = crafted.jittered(k.mean, k.std, 0.1, torch.Generator().manual_seed(1))
    other = crafted.jittered(k.mean, k.std, 0.1, torch.Generator().manual_seed(2))
    assert float((one - k.mean).norm() / (0.1 * k.std).norm()) == pytest.approx(1, rel=0.05)
    assert not torch.equal(one, other)
    assert crafted.jittered(k.mean, k.std, 0.0, torch.Generator()) is k.mean


@pytest.mark.parametrize("kind", crafted.GARBAGE)
def test_garbage_is_what_it_says(kind: str) -> None:
    row = torch.ones(5)
    made = crafted.garbage(row, kind)
    bad = made is None or made.shape != row.shape or not made.is_floating_point()
    assert bad or not bool(torch.isfinite(made).all()) or not math.isfinite(float(made @ made))
    assert bool((row == 1).all())


def test_known_norm() -> None:
    k = known()
    norms = [np.linalg.norm(u.numpy()) for u in k.updates]
    assert k.median_norm == pytest.approx(np.median(norms), rel=1e-5)
    assert float(crafted.with_norm(k.mean, 2.0).norm()) == pytest.approx(2, rel=1e-5)
    assert float(crafted.with_norm(torch.zeros(3), 2.0).norm()) == 0
