"""The search on paper predicts what happens on real rows, and finds stronger attacks than fixed factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fedsec.attacks.poisoning.crafted import known_from
from fedsec.attacks.poisoning.rule_aware import FAMILIES, Board, damage, search
from fedsec.defenses.robust.bulyan import Bulyan
from fedsec.defenses.robust.centered_clipping import CenteredClipping
from fedsec.defenses.robust.dnc import DnC
from fedsec.defenses.robust.dos import DOS, DOSClipped, DOSGuarded
from fedsec.defenses.robust.fedavg import FedAvg
from fedsec.defenses.robust.geometric_median import GeometricMedian
from fedsec.defenses.robust.krum import Krum, MultiKrum
from fedsec.defenses.robust.median import Median
from fedsec.defenses.robust.norm_clip import NormClip
from fedsec.defenses.robust.trimmed_mean import TrimmedMean

from fedsec.robust.aggregator import RuleAggregator
from tests.robust.cases import one_round, rows

RULES = {
    r.name: r
    for r in (
        FedAvg(),
        NormClip(c=1.0),
        Krum(declared_f=3),
        MultiKrum(declared_f=3),
        GeometricMedian(),
        CenteredClipping(),
        DnC(declared_f=3),
        DOS(),
        DOSClipped(),
        DOSGuarded(),
        Krum(declared_f=3, pre="nnm"),
    )
}


def on_real_rows(rule, honest: np.ndarray, row: torch.Tensor, malicious: int) -> float:
    everybody = np.concatenate([honest, np.repeat(row.numpy()[None], malicious, axis=0)])
    result = one_round(RuleAggregator(rule), everybody)
    mean = honest.astype(np.float64).mean(0)
    return float(np.linalg.norm(result.delta.double().numpy() - mean) / np.linalg.norm(mean))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_algebra_equals_real_rows(name: str, family) -> None:
    honest = rows(7, 400)
    known = known_from([torch.tensor(r) for r in honest])
    board = Board.of(known)
    for factor in (0.3, 1.5, 20.0):
        coefficients = board.candidate(family, factor)
        row = sum(float(c) * z for c, z in zip(coefficients, board.rows, strict=True))
        predicted = damage(board, RULES[name], coefficients, 3, "deviation")
        assert predicted == pytest.approx(on_real_rows(RULES[name], honest, row, 3), rel=2e-3, abs=1e-4)


BY_COORDINATE = {
    r.name: r for r in (Median(), TrimmedMean(declared_f=3), Bulyan(declared_f=1), TrimmedMean(declared_f=3, pre="nnm"))
}


@pytest.mark.parametrize("name", BY_COORDINATE)
@pytest.mark.parametrize("family", FAMILIES)
def test_rules_by_coordinate_are_tried_as_they_are(name: str, family) -> None:
    honest = rows(7, 400)
    board = Board.of(known_from([torch.tensor(r) for r in honest]))
    assert board.sampled() is board
    for factor in (0.3, 1.5, 20.0):
        coefficients = board.candidate(family, factor)
        row = sum(float(c) * z for c, z in zip(coefficients, board.rows, strict=True))
        predicted = damage(board, BY_COORDINATE[name], coefficients, 3, "deviation")
        assert predicted == pytest.approx(on_real_rows(BY_COORDINATE[name], honest, row, 3), rel=2e-3, abs=1e-4)


def test_a_sample_of_the_coordinates_predicts_all_of_them() -> None:
    honest = rows(7, 300_000)
    known = known_from([torch.tensor(r) for r in honest])
    found = search(known, Median(), 3)
    assert found.value == pytest.approx(on_real_rows(Median(), honest, found.row, 3), rel=0.02)
    assert len(found.row) == 300_000
    opposed = search(known, TrimmedMean(declared_f=1), 3, "reverse", families=("ipm",))
    assert opposed.value > -1, "the plain mean scores -1: three attackers against one expected must do better"


@pytest.mark.parametrize("name", ["krum", "multi_krum", "dos", "geometric_median"])
def test_the_search_beats_fixed_factors(name: str) -> None:
    honest = rows(7, 400)
    known = known_from([torch.tensor(r) for r in honest])
    found = search(known, RULES[name], 3)
    real = on_real_rows(RULES[name], honest, found.row, 3)
    assert found.value == pytest.approx(real, rel=2e-3)
    board = Board.of(known)
    fixed = [damage(board, RULES[name], board.candidate("ipm", e), 3, "deviation") for e in (0.1, 0.5)]
    fixed += [damage(board, RULES[name], board.candidate("alie", z), 3, "deviation") for z in (0.3, 1.0, 1.5)]
    assert found.value >= max(fixed) * 0.99
    assert found.evaluations == 60


def test_objectives() -> None:
    known = known_from([torch.tensor(r) for r in rows(7, 400)])
    assert search(known, FedAvg(kappa=float("inf")), 3, "weight").value == pytest.approx(0.3)
    assert search(known, FedAvg(kappa=float("inf")), 3, "reverse").value > 10
    assert search(known, DOSGuarded(), 3, "weight").value <= 0.3 + 1e-9
