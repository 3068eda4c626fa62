"""The table beside the linear baseline: its measures, and a run of it on synthetic X-rays with several findings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import fedsec
from experiments import findings_table


def test_any_finding_is_the_chance_of_at_least_one_and_absent_findings_are_named() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((80, 3)) < 0.3).astype(np.float64)
    labels[:, 2] = 0
    scores = rng.random((80, 3))
    found = findings_table.measured(scores, labels, np.arange(80), ("a", "b", "c"))
    expected = [roc_auc_score(labels[:, k], scores[:, k]) for k in (0, 1)]
    assert found["auc"]["value"] == pytest.approx(np.mean(expected))
    assert found["absent"] == ["c"]
    assert set(found["by_finding"]) == {"a", "b"}
    either = 1 - (1 - scores[:, 0]) * (1 - scores[:, 1]) * (1 - scores[:, 2])
    assert found["any_finding"]["value"] == pytest.approx(roc_auc_score(labels.max(1), either))


def test_a_table_of_networks_and_the_linear_baseline(tmp_path: Path) -> None:
    tables: dict[str, Any] = {
        "data": {"name": "synthetic-cxr:images=400,labels=multi"},
        "model": {"name": "lenet"},
        "federation": {"engine": "serial", "topology": ["federated", "local"], "clients": 2, "local_epochs": 1},
    }
    fedsec.run(tables, rounds=1, out=tmp_path / "run")
    rows = findings_table.table(tmp_path / "run", None)
    assert list(rows) == [
        "PCA + logistic regression",
        "lenet, federated, none, seed 0",
        "lenet, local, none, seed 0",
    ]
    assert "any_finding" not in rows["lenet, local, none, seed 0"]
    text = findings_table.printed(rows)
    assert text.count("\n| ") == 3 and "absent from the test part: none" in text


def test_the_released_model_gives_what_the_run_reported(tmp_path: Path) -> None:
    from fedsec import config
    from fedsec.federation.assemble import resolve

    tables: dict[str, Any] = {
        "data": {"name": "synthetic-cxr:images=400,labels=multi"},
        "model": {"name": "lenet"},
        "federation": {"engine": "serial", "clients": 2, "local_epochs": 1, "rounds": 1},
    }
    cell = resolve(config.expand(tables)[0])
    reported = fedsec.run(tables, out=tmp_path / "run")["cells"][0]["utility"]["auc"]["value"]
    assert findings_table.network(cell, tmp_path / "run", None)["auc"]["value"] == pytest.approx(reported)
