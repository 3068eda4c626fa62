"""Do TensorBoard and MLflow hold the numbers of results.jsonl, once, and is nothing half-written left?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import fedsec
from fedsec.cli.track import command
from fedsec.errors import ConfigError
from fedsec.store import RunFolder
from fedsec.tracking import CELL, curves, numbers, track


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("track") / "run"
    fedsec.run(
        {
            "data": {"name": "synthetic-cxr", "max_train": 120},
            "model": {"name": "lenet"},
            "federation": {"clients": 2, "rounds": 2, "local_steps": 2, "engine": "serial"},
            "attack": ["gradinversion:images=2,rounds=last,budget_s=0.3"],
            "defense": ["gaussian:sigma=0.01"],
        },
        out=out,
    )
    return out


class TestNumbers:
    def test_estimates_become_three_and_rows_and_words_are_left_out(self) -> None:
        cell = {
            "utility": {"auc": {"value": 0.5, "low": 0.4, "high": None, "n": 3}, "classes": ["a"]},
            "leakage": {"images": [{"psnr": 1.0}], "verdict": "none", "psnr": math.inf, "exact": True},
            "cost": {"seconds": 2},
        }
        assert dict(numbers(cell)) == {"utility.auc": 0.5, "utility.auc.low": 0.4, "cost.seconds": 2.0}

    def test_every_cell_of_a_real_run_has_its_headline(self, finished: Path) -> None:
        for cell in RunFolder.open(finished).results():
            found = dict(numbers(cell))
            assert found["utility.auc"] == cell["utility"]["auc"]["value"]
            if "leakage" in cell:
                assert found["leakage.psnr"] == cell["leakage"]["psnr"]["value"]

    def test_curves_come_from_the_training(self, finished: Path) -> None:
        folder = RunFolder.open(finished)
        cell = next(folder.results())
        history = json.loads((folder.artifacts(cell["training"]) / "training.json").read_text())["history"]
        lines = curves(folder, cell)
        assert lines["round.validation_auc"] == [(h["round"], h["validation_auc"]) for h in history]


class TestTensorBoard:
    def test_scalars_equal_the_cells_and_a_second_call_adds_nothing(self, finished: Path, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        cells = list(RunFolder.open(finished).results())
        done = track(finished, "tensorboard", uri=str(tmp_path / "tb"))
        assert (done["written"], done["present"]) == (len(cells), 0)
        for cell in cells:
            events = EventAccumulator(str(tmp_path / "tb" / cell["id"]))
            events.Reload()
            (scalar,) = events.Scalars("utility/auc")
            assert scalar.value == pytest.approx(cell["utility"]["auc"]["value"], rel=1e-6)
            assert len(events.Scalars("round/validation_auc")) == 2
        again = track(finished, "tensorboard", uri=str(tmp_path / "tb"))
        assert (again["written"], again["present"]) == (0, len(cells))

    def test_what_a_killed_call_left_is_removed(self, finished: Path, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        (tmp_path / "tb" / ".half").mkdir(parents=True)
        track(finished, "tensorboard", uri=str(tmp_path / "tb"))
        assert not list((tmp_path / "tb").glob(".*"))


class TestMLflow:
    @pytest.fixture(params=["folder", "sqlite"])
    def store(self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        pytest.importorskip("mlflow")
        if request.param == "sqlite":
            pytest.importorskip("sqlalchemy")
            return f"sqlite:///{tmp_path / 'mlflow.db'}"
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        return (tmp_path / "mlruns").as_uri()

    def test_runs_equal_the_cells_and_a_second_call_adds_nothing(self, finished: Path, store: str) -> None:
        from mlflow.tracking import MlflowClient

        cells: dict[str, Any] = {cell["id"]: cell for cell in RunFolder.open(finished).results()}
        assert track(finished, "mlflow", uri=store)["written"] == len(cells)
        client = MlflowClient(tracking_uri=store)
        experiment = client.get_experiment_by_name("fedsec")
        assert experiment is not None
        found = {run.data.tags[CELL]: run for run in client.search_runs([experiment.experiment_id])}
        assert found.keys() == cells.keys()
        for key, run in found.items():
            assert run.data.metrics["utility.auc"] == cells[key]["utility"]["auc"]["value"]
            assert run.data.params["seed"] == "0"
            curve = client.get_metric_history(run.info.run_id, "round.validation_auc")
            assert [point.step for point in curve] == [1, 2]
        assert track(finished, "mlflow", uri=store)["written"] == 0

    def test_a_store_that_is_not_there_is_one_line(self, finished: Path) -> None:
        pytest.importorskip("mlflow")
        with pytest.raises(ConfigError, match="cannot use this store"):
            track(finished, "mlflow", uri="nonsense://x")


def test_the_command_says_what_it_did_and_refuses_other_folders(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    done = CliRunner().invoke(command, [str(finished), "--to", "tensorboard", "--uri", str(tmp_path / "tb")])
    assert done.exit_code == 0, done.output
    assert "2 cells written" in done.output
    with pytest.raises(ConfigError, match="not a run folder"):
        track(tmp_path, "tensorboard")
