"""What people read: the sentence, the report row, the seeds together; and no PSNR without its prior."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from fedsec.cli.tables import meaning, over_seeds, results_table


def estimate(value: float) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None, "n": 20}


def cell(seed: int = 0, **leakage: Any) -> dict[str, Any]:
    table = {"psnr": estimate(30), "prior_psnr": estimate(18.9), "verdict": "Leakage measured", **leakage}
    attack = {"name": "gradinversion"}
    return {"dataset": "d", "model": "m", "seed": seed, "attack": attack, "cost": {"seconds": 1.0}, "leakage": table}


def printed(*cells: dict[str, Any]) -> str:
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(results_table(cells))
    return console.export_text()


def test_the_report_row() -> None:
    text = printed(
        cell(bound_psnr=estimate(35.6), gap_db=estimate(1.0), nearest_public_psnr=estimate(22.4)), cell(seed=1)
    )
    for word in ("prior", "18.9", "nearest", "22.4", "bound", "35.6", "gap", "1.0"):
        assert word in text
    assert "bound" not in printed(cell())


def test_a_row_without_its_prior_is_refused() -> None:
    broken = cell()
    del broken["leakage"]["prior_psnr"]
    with pytest.raises(ValueError, match="without prior_psnr"):
        results_table([broken])


def test_a_rule_is_shown_with_what_it_prevents_and_what_it_costs() -> None:
    robust = {
        "attacker_weight": estimate(0.91),
        "fair_share": 0.3,
        "detection_auroc": estimate(0.04),
        "effective_clients": estimate(3.47),
        "attack_success_rate": estimate(0.62),
    }
    hit = {**cell(), "leakage": {}, "robustness": robust, "utility": {"sensitivity_at_90_specificity": estimate(0.805)}}
    text = printed(hit)
    for word in ("0.91 (fair 0.30)", "0.04", "3.5", "62 %", "0.805", "sens@90"):
        assert word in text
    assert "sens@90" not in printed({**cell(), "utility": hit["utility"]})


def test_the_sentence_carries_verdict_and_identification() -> None:
    found = meaning([cell(reid_rank1=estimate(0.4), reid_chance=0.005), {**cell(), "leakage": {}}])
    assert found == ["none (seed 0): Leakage measured. 40% of the patients are re-identified (chance 0.5%)."]


def test_seeds_are_pooled_with_the_spread_between_them() -> None:
    def images(level: float) -> list[dict[str, Any]]:
        return [{"victim": i, "psnr": level + 0.2 * i} for i in range(20)]

    found = over_seeds([cell(s, images=images(level)) for s, level in enumerate((20.0, 25.0, 30.0))])
    assert len(found) == 1 and found[0].startswith("none, 3 seeds: PSNR 26.9 [")
    low, high = (float(word) for word in found[0].partition("[")[2].partition("]")[0].split(", "))
    assert low < 23 and high > 30
    assert found[0].endswith("median over 60 images.")
    assert over_seeds([cell(images=images(20.0))]) == []
