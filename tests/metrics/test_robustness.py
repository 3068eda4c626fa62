"""Detection, weight and damage by hand-made rounds."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fedsec.metrics.robustness import (
    detection_auroc,
    effective_clients,
    most_suspicious,
    robustness,
    without_effect,
)


def record(**changes: Any) -> dict[str, Any]:
    plain = {
        "participants": [0, 1, 2, 3],
        "malicious": [3],
        "suspicion": {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0},
        "weights": {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1},
        "failed": {},
        "tampering": {3: 2.0},
        "tampered": {3: 0},
        "deviation": 0.5,
    }
    return {**plain, **changes}


def test_auroc_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = dict(enumerate(rng.integers(0, 5, 12).astype(float)))
        malicious = [1, 5, 9]
        truth = [k in malicious for k in scores]
        assert detection_auroc(scores, malicious, ()) == pytest.approx(roc_auc_score(truth, list(scores.values())))


def test_rejected_clients_are_most_suspicious() -> None:
    assert detection_auroc({0: 9.0, 1: 1.0}, [2, 1], [2]) == pytest.approx(0.5)
    assert detection_auroc({0: 9.0, 1: 1.0}, [2], [2]) == 1.0
    assert detection_auroc({0: 1.0}, [], ()) != detection_auroc({0: 1.0}, [], ())
    assert most_suspicious({0: 1.0, 1: 5.0, 2: 5.0}, 2, [7]) == {7, 1}


def test_effective_clients() -> None:
    assert effective_clients({0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}) == pytest.approx(4)
    assert effective_clients({0: 1.0, 1: 0.0}) == pytest.approx(1)


def test_a_summary_by_hand_also_after_a_file() -> None:
    history = [record(), record(suspicion={0: 4.0, 1: 2.0, 2: 3.0, 3: 1.0}), record(malicious=[], tampering={})]
    for rounds in (history, json.loads(json.dumps(history))):
        found = robustness(rounds, 1, generator=np.random.default_rng(0))
        assert found["detection_auroc"].value == pytest.approx(0.5)
        assert found["detection_tpr"].value == pytest.approx(0.5)
        assert found["detection_fpr"].value == pytest.approx(1 / 6)
        assert found["attacker_weight"].value == pytest.approx(0.1)
        assert found["fair_share"] == 0.25
        assert found["aggregate_deviation"].value == pytest.approx(0.5)
        assert found["tampering"] == 2.0
        assert found["malicious_clients"] == [3]


def test_honest_rounds_have_only_the_honest_cost() -> None:
    found = robustness(
        [record(malicious=[], tampering={}, tampered={}, deviation=None)], 1, generator=np.random.default_rng(0)
    )
    assert set(found) == {"effective_clients"}


def test_an_attack_that_did_nothing_is_noticed() -> None:
    assert without_effect([record(tampering={3: 0.0})])
    assert not without_effect([record()])
    assert not without_effect([record(tampering={3: 0.0}, tampered={3: 5})])
    assert not without_effect([record(malicious=[])])
