"""Every rule against a brute-force float64 reference, and the properties that it must or must not have."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from fedsec.defenses.robust.bulyan import Bulyan, select_by_krum
from fedsec.defenses.robust.centered_clipping import CenteredClipping
from fedsec.defenses.robust.dnc import DnC
from fedsec.defenses.robust.dos import DOS, DOSClipped, DOSGuarded, copod_scores
from fedsec.defenses.robust.fedavg import FedAvg
from fedsec.defenses.robust.flame import FLAME
from fedsec.defenses.robust.foolsgold import FoolsGold
from fedsec.defenses.robust.geometric_median import GeometricMedian
from fedsec.defenses.robust.krum import Krum, MultiKrum
from fedsec.defenses.robust.median import Median
from fedsec.defenses.robust.norm_clip import NormClip
from fedsec.defenses.robust.trimmed_mean import TrimmedMean
from scipy.spatial.distance import cdist

from fedsec.robust.rule import Infeasible, Rule, WeightRule
from tests.robust.cases import aggregate, rows, see

F = 2
RULES: dict[str, Rule] = {
    "fedavg": FedAvg(),
    "norm_clip": NormClip(c=0.9),
    "median": Median(),
    "trimmed_mean": TrimmedMean(declared_f=F),
    "krum": Krum(declared_f=F),
    "multi_krum": MultiKrum(declared_f=F),
    "bulyan": Bulyan(declared_f=F),
    "geometric_median": GeometricMedian(),
    "centered_clipping": CenteredClipping(),
    "dnc": DnC(declared_f=F),
    "foolsgold": FoolsGold(),
    "flame": FLAME(noise=0),
    "dos": DOS(),
    "dos_clipped": DOSClipped(c=0.9),
    "dos_guarded": DOSGuarded(),
    "nnm+krum": Krum(declared_f=F, pre="nnm"),
    "nnm+trimmed_mean": TrimmedMean(declared_f=F, pre="nnm"),
    "bucketing+median": Median(pre="bucketing"),
    "bucketing+geometric_median": GeometricMedian(pre="bucketing"),
}
rule_names = pytest.mark.parametrize("name", RULES)


def krum_reference(x: np.ndarray, f: int) -> np.ndarray:
    n = len(x)
    scores = []
    for i in range(n):
        distances = sorted(float(((x[i] - x[j]) ** 2).sum()) for j in range(n) if j != i)
        scores.append(sum(distances[: n - f - 2]))
    return np.array(scores)


def copod_reference(samples: np.ndarray) -> np.ndarray:
    """Counts by loops."""
    n, columns = samples.shape
    total = np.zeros(n)
    for j in range(columns):
        column = samples[:, j]
        third = ((column - column.mean()) ** 3).mean()
        side = 0 if abs(third) <= 1e-12 * (np.abs(column - column.mean()) ** 3).mean() else math.copysign(1, third)
        for i in range(n):
            left = -math.log(sum(v <= column[i] for v in column) / n)
            right = -math.log(sum(v >= column[i] for v in column) / n)
            chosen = left if side == -1 else right if side == 1 else left + right
            total[i] += max(chosen, (left + right) / 2)
    return total


def dos_reference(x: np.ndarray) -> np.ndarray:
    r = copod_reference(cdist(x, x)) + copod_reference(np.maximum(cdist(x, x, "cosine"), 0))
    weights = np.exp(-(r - r.min()))
    return weights / weights.sum()


def test_krum_and_multi_krum() -> None:
    for seed in range(30):
        x = rows(9, 50, seed)
        scores = krum_reference(x.astype(np.float64), F)
        np.testing.assert_array_equal(aggregate(Krum(declared_f=F), x), x[np.argmin(scores)])
        chosen = np.argsort(scores)[: 9 - F]
        expected = x[chosen].astype(np.float64).mean(0)
        np.testing.assert_allclose(aggregate(MultiKrum(declared_f=F), x), expected, atol=3e-7)


def test_krum_breaks_ties_by_client_id_not_position() -> None:
    x = np.repeat(rows(1), 7, axis=0)
    found = Krum(declared_f=2).weigh(see(x, Krum(declared_f=2), clients=(5, 3, 9, 1, 7, 8, 6)))
    assert found.coefficients.argmax() == 3


def test_bulyan_selects_without_repetition_and_equals_brute_force() -> None:
    """A peer stores indices of the shrunken array and picks one client six times."""
    for seed in range(40):
        x = rows(11, 40, seed).astype(np.float64)
        x[3] *= 30
        x[8] *= -30
        squared = cdist(x, x, "sqeuclidean")
        left, expected = list(range(11)), []
        while len(expected) < 11 - 2 * F:
            scores = {}
            for i in left:
                distances = sorted(squared[i, j] for j in left if j != i)
                scores[i] = sum(distances[: max(1, len(left) - F - 2)])
            best = min(left, key=lambda i: (scores[i], i))
            expected.append(best)
            left.remove(best)
        chosen = select_by_krum(squared, F, range(11))
        assert chosen == expected
        assert len(set(chosen)) == len(chosen)


def test_bulyan_equals_brute_force() -> None:
    x = rows(11, 60)
    chosen = select_by_krum(cdist(x.astype(np.float64), x.astype(np.float64), "sqeuclidean"), F, range(11))
    picked = x[chosen].astype(np.float64)
    expected = []
    for column in picked.T:
        order = np.argsort(np.abs(column - np.median(column)))
        expected.append(column[order[: len(chosen) - 2 * F]].mean())
    np.testing.assert_allclose(aggregate(Bulyan(declared_f=F), x), expected, atol=1e-6)


def test_geometric_median_minimises_the_total_distance() -> None:
    x = rows(8, 12)
    exact = x.astype(np.float64)

    def total(z: np.ndarray) -> float:
        return float(np.linalg.norm(exact - z, axis=1).sum())

    best = scipy.optimize.minimize(total, exact.mean(0), method="BFGS", options={"gtol": 1e-10})
    found = aggregate(GeometricMedian(), x)
    assert total(found) <= best.fun * (1 + 1e-8)
    np.testing.assert_allclose(found, best.x, atol=1e-4)


def test_geometric_median_may_coincide_with_an_update() -> None:
    x = np.repeat(rows(1), 6, axis=0)
    x[5] += 1
    np.testing.assert_allclose(aggregate(GeometricMedian(), x), x[0], atol=1e-5)


def test_dnc_equals_the_singular_vector_of_the_centred_updates() -> None:
    for seed in range(20):
        x = rows(10, 40, seed)
        centred = x.astype(np.float64) - x.astype(np.float64).mean(0)
        top = np.linalg.svd(centred, full_matrices=False)[2][0]
        scores = (centred @ top) ** 2
        found = DnC(declared_f=F).weigh(see(x, DnC(declared_f=F)))
        np.testing.assert_allclose(found.suspicion, scores, rtol=1e-4, atol=1e-6)
        assert set(np.flatnonzero(found.coefficients == 0)) == set(np.argsort(scores)[-F:])


def test_dos_weights_equal_the_equations() -> None:
    for seed in range(20):
        n = (5, 10, 12)[seed % 3]
        x = rows(n, 300, seed)
        found = DOS().weigh(see(x, DOS())).coefficients
        np.testing.assert_allclose(found, dos_reference(x.astype(np.float64)), atol=1e-12)


def test_dos_weights_with_duplicate_rows_equal_the_equations() -> None:
    """Ties decide: without exact ones the weights are off by up to 0.37."""
    for seed in range(10):
        x = rows(10, 300, seed)
        x[8] = x[7]
        x[9] = x[7]
        exact = x.astype(np.float64)
        squared, cosine = cdist(exact, exact), np.maximum(cdist(exact, exact, "cosine"), 0)
        for matrix in (squared, cosine):  # the reference's own rounding breaks ties as well
            matrix[8:] = matrix[7]
            matrix[:, 8:] = matrix[:, 7:8]
        r = copod_reference(squared) + copod_reference(cosine)
        weights = np.exp(-(r - r.min()))
        np.testing.assert_allclose(DOS().weigh(see(x, DOS())).coefficients, weights / weights.sum(), atol=1e-12)


def test_copod_equals_pyod() -> None:
    copod = pytest.importorskip("pyod.models.copod")
    samples = np.random.default_rng(0).standard_normal((12, 6))
    model = copod.COPOD().fit(samples)
    np.testing.assert_allclose(copod_scores(samples), model.decision_function(samples), atol=1e-12)


def test_copod_takes_both_sides_where_a_column_is_symmetric() -> None:
    samples = np.array([[-1.0], [-1.0], [1.0], [1.0]])
    np.testing.assert_allclose(copod_scores(samples), np.full(4, -math.log(0.5)))


def test_dos_suppresses_what_it_is_made_for() -> None:
    """Spec §6.3: one row × −100 → ≤ 1e-12; three pure noise rows → ≤ 1e-3; four sign-flipped rows → ≤ 1e-2."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        direction = rng.standard_normal(2000)
        honest = (direction + 0.3 * rng.standard_normal((10, 2000))).astype(np.float32)
        far, noise, flipped = honest.copy(), honest.copy(), honest.copy()
        far[9] *= -100
        noise[7:] = rng.standard_normal((3, 2000))
        flipped[6:] *= -1
        assert DOS().weigh(see(far, DOS())).coefficients[9] <= 1e-12
        assert DOS().weigh(see(noise, DOS())).coefficients[7:].sum() <= 1e-3
        assert DOS().weigh(see(flipped, DOS())).coefficients[6:].sum() <= 1e-2


def test_dos_does_not_underflow_with_many_clients() -> None:
    x = rows(100, 200)
    x[0] *= 1e6
    weights = DOS().weigh(see(x, DOS())).coefficients
    assert np.isfinite(weights).all()
    assert weights.sum() == pytest.approx(1)


def test_identical_colluders_beat_dos_and_not_its_guarded_form() -> None:
    """The hole that the guarded form closes, told straight."""
    honest = rows(7, 3000)
    crafted = honest.mean(0) - 1.5 * honest.std(0, ddof=1)
    x = np.concatenate([honest, np.repeat(crafted[None], 3, axis=0)]).astype(np.float32)
    assert DOS().weigh(see(x, DOS())).coefficients[7:].sum() > 0.5
    assert DOSGuarded().weigh(see(x, DOSGuarded())).coefficients[7:].sum() <= 0.1 + 1e-12


@pytest.mark.parametrize(("n", "f"), [(5, 1), (10, 3), (20, 6), (50, 15)])
def test_guarded_dos_never_gives_attackers_more_than_their_share(n: int, f: int) -> None:
    for seed in range(10):
        honest = rows(n - f, 500, seed)
        m, sd = honest.mean(0), honest.std(0, ddof=1)
        rng = np.random.default_rng(seed)
        for crafted in (m - 1.5 * sd, -0.5 * m, honest[0], 0 * m, 100 * m):
            for jitter in (0.0, 1e-3, 0.3):
                evil = crafted + jitter * sd * rng.standard_normal((f, 500))
                x = np.concatenate([honest, evil]).astype(np.float32)
                weights = DOSGuarded().weigh(see(x, DOSGuarded())).coefficients
                assert weights[n - f :].sum() <= f / n + 1e-12
    weights = DOSGuarded().weigh(see(rows(n, 500), DOSGuarded())).coefficients
    assert weights.sum() ** 2 / (weights**2).sum() >= 0.5 * n


def test_foolsgold_by_hand() -> None:
    """Two clients in step, one on its own: the pair is suppressed."""
    x = np.array([[1.0, 0.0], [1.0, 0.001], [0.0, 1.0]], dtype=np.float32)
    found = FoolsGold().weigh(see(x, FoolsGold())).coefficients
    np.testing.assert_allclose(found, [0, 0, 1], atol=1e-6)


def test_foolsgold_has_no_answer_where_all_are_alike() -> None:
    with pytest.raises(Infeasible):
        FoolsGold().weigh(see(np.repeat(rows(1), 4, axis=0), FoolsGold()))


def test_norm_clip_bounds_the_step() -> None:
    x = rows(5)
    x[0] *= 100
    assert np.linalg.norm(aggregate(NormClip(bound="fixed", c=0.5), x)) <= 0.5 + 1e-6


def test_declared_f_zero_is_the_mean() -> None:
    x = rows(9)
    for rule in (TrimmedMean(declared_f=0), MultiKrum(declared_f=0), DnC(declared_f=0)):
        np.testing.assert_allclose(aggregate(rule, x), x.astype(np.float64).mean(0), atol=1e-6)


@rule_names
def test_permutation_of_clients_changes_nothing(name: str) -> None:
    rule, x = RULES[name], rows(11)
    order = np.random.default_rng(3).permutation(11)
    shares = np.random.default_rng(4).dirichlet(np.ones(11))
    one = aggregate(rule, x, shares=shares)
    other = aggregate(rule, x[order], clients=tuple(int(i) for i in order), shares=shares[order])
    np.testing.assert_allclose(one, other, atol=2e-6)


@rule_names
def test_equal_updates_are_returned(name: str) -> None:
    if name == "foolsgold":
        pytest.skip("has no answer where all are alike, tested above")
    x = np.repeat(rows(1), 11, axis=0)
    factor = {"dos_clipped": 0.9, "norm_clip": 0.9}.get(name, 1.0)
    np.testing.assert_allclose(aggregate(RULES[name], x), factor * x[0], rtol=1e-5, atol=1e-6)


@rule_names
def test_scale(name: str) -> None:
    x = rows(11)
    np.testing.assert_allclose(aggregate(RULES[name], 4 * x), 4 * aggregate(RULES[name], x), rtol=1e-4, atol=1e-5)


MOVES = {"fedavg", "median", "trimmed_mean", "krum", "multi_krum", "bulyan", "geometric_median", "dnc"}
MOVES |= {"nnm+krum", "nnm+trimmed_mean", "bucketing+median", "bucketing+geometric_median"}


@rule_names
def test_translation(name: str) -> None:
    """Distance and coordinate rules move with the updates; rules with norms or angles must not (checked too)."""
    if name == "centered_clipping":
        pytest.skip("moves with its own last aggregate, tested with the aggregator")
    rule, x = RULES[name], rows(11)
    shift = 5 * rows(1, seed=9)[0]
    moved = aggregate(rule, x + shift) - shift
    assert np.allclose(moved, aggregate(rule, x), atol=1e-4) == (name in MOVES)


@rule_names
def test_rotation(name: str) -> None:
    rule = RULES[name]
    x = rows(11, 32)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((32, 32)))[0]
    turned = aggregate(rule, (x.astype(np.float64) @ rotation).astype(np.float32))
    same = np.allclose(turned, aggregate(rule, x) @ rotation, atol=1e-4)
    by_coordinate = rule.kind == "coordinates"
    assert same != by_coordinate


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_coordinate_rules_stay_among_honest_values(name: str) -> None:
    x = rows(9)
    x[0], x[4] = 1e30, -1e30
    honest = np.delete(x, [0, 4], axis=0)
    found = aggregate(RULES[name], x)
    assert (found >= honest.min(0) - 1e-6).all()
    assert (found <= honest.max(0) + 1e-6).all()


@pytest.mark.parametrize(
    ("rule", "needed"),
    [
        (TrimmedMean, lambda f: 2 * f + 1),
        (Krum, lambda f: 2 * f + 3),
        (MultiKrum, lambda f: 2 * f + 3),
        (Bulyan, lambda f: 4 * f + 3),
    ],
)
def test_requirements_hold_exactly_at_their_bound(rule: Any, needed: Any) -> None:
    for f in range(4):
        assert rule().feasible(needed(f), f)
        assert not rule().feasible(needed(f) - 1, f)


@rule_names
def test_suspicion_is_always_there(name: str) -> None:
    rule = RULES[name]
    x = rows(11)
    if isinstance(rule, WeightRule):
        found = rule.decide(see(x, rule))
        assert found.suspicion.shape == (11,)
        assert np.isfinite(found.suspicion).all()
