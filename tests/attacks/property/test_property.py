"""Property inference: shares are what they say, the judge cannot see the truth, and a training tells its share."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsec
from fedsec.errors import ConfigError
from fedsec.plugins import PluginSpec, build

shares: Any = importlib.import_module("fedsec.attacks.property.shares")


def test_training_sets_have_their_shares_and_never_a_query() -> None:
    draw = np.random.default_rng(0)
    has, known = draw.random(1000) < 0.4, draw.random(1000) < 0.9
    plan = shares.subsets(has, known, (0.3, 0.7), 5, draw)
    sizes = {len(rows) for rows in plan.sets}
    assert len(plan.sets) == 10 and len(sizes) == 1 and min(sizes) >= shares.FEWEST
    for rows, large in zip(plan.sets, plan.large, strict=True):
        assert known[rows].all() and len(np.unique(rows)) == len(rows)
        assert has[rows].mean() == pytest.approx(0.7 if large else 0.3, abs=1 / len(rows))
        assert not np.isin(rows, plan.queries).any()
    assert plan.large.sum() == 5
    assert shares.subsets(has[:60], known[:60], (0.3, 0.7), 5, draw) is None


def test_the_judge_tells_shifted_answers_and_guesses_otherwise() -> None:
    draw = np.random.default_rng(0)
    large = np.arange(40) % 2 == 1
    noise = draw.normal(size=(40, 6))
    right, said = shares.judged(list(noise + 2 * large[:, None]), large, np.full(6, 2.0), draw)
    assert right >= 38 and said
    null = [shares.judged(list(draw.normal(size=(40, 6))), large, np.zeros(6), draw)[0] for _ in range(30)]
    assert 17 < np.mean(null) < 22.5  # cross-validated: no better than guessing


@pytest.mark.parametrize(
    ("params", "says"),
    [({"low": 0.7, "high": 0.3}, "low must be the smaller"), ({"shadows": 21}, "even number")],
)
def test_settings_that_make_no_sense_are_refused(params: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build("attacks", PluginSpec("property", params))


def test_the_share_of_a_class_shows_in_the_model(tmp_path: Path) -> None:
    """One class is a fifth or four fifths of the training: the answers to fixed queries differ for everybody to see."""
    spec = "property:trait=class,value=1,low=0.2,high=0.8,shadows=20"
    found = fedsec.run(
        {"data": {"name": "synthetic-cxr:images=2600,shift=0"}, "model": {"name": "tests.audit.networks:small"}},
        attack=spec, clients=1, rounds=1, local_epochs=8, lr=0.05, engine="serial", device="cpu", baseline=False,
        out=tmp_path / "run",
    )["cells"][0]["leakage"]["property"]  # fmt: skip
    (row,) = found["rows"]
    assert row["accuracy"]["low"] > 0.6 and row["shadows"] == 20
    assert 0.2 < row["truth"] < 0.8 and row["guess"] in (0.2, 0.8)
    assert "told apart" in found["verdict"]


def test_an_attribute_that_the_data_do_not_know_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the data set knows"):
        fedsec.run(
            {"data": {"name": "synthetic-cxr:images=2600"}, "model": {"name": "tests.audit.networks:small"}},
            attack="property:trait=shoe_size,shadows=20", clients=1, rounds=1, local_steps=1, engine="serial",
            device="cpu", baseline=False, out=tmp_path / "run",
        )  # fmt: skip
