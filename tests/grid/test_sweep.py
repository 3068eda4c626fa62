"""Does a sweep train once what cells share, survive kill -9 and failures, and end as an undisturbed one does?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fedsec
from fedsec import experiment
from fedsec.errors import ConfigError, RunError
from fedsec.grid import run as grid
from fedsec.grid.tasks import Task
from fedsec.grid.workers import Outcome, Workers, attempt
from fedsec.progress import Progress
from fedsec.store import RunFolder

TABLES: dict[str, Any] = {
    "data": {"name": "synthetic-cxr:images=260"},
    "model": {"name": "lenet"},
    "federation": {"clients": 2, "rounds": 2, "local_steps": 1},
    "attack": [
        {"name": "gradinversion", "method": "analytic", "images": [1, 2]},
        {"name": "poisoning", "fraction": 0.5},
    ],
    "defense": [{"name": "topk", "fraction": 0.1}],
}
TOML = """
seeds = 2
defense = "topk:fraction=0.1"
attack = ["none", "poisoning:fraction=0.5"]
[data]
name = "synthetic-cxr:images=260"
[model]
name = "lenet"
[federation]
clients = 2
rounds = 4
local_epochs = 1
"""


class Inline:
    """Workers that work when they are asked for their outcome, in this process."""

    def __init__(self, count: int, artifacts: Path, data_dir: Path | None) -> None:
        self.task: Task | None = None
        self.held: str | None = None
        self.arguments = (artifacts, data_dir, {})

    def idle(self) -> list[Any]:
        return [self] if self.task is None else []

    def busy(self) -> list[Task]:
        return [self.task] if self.task else []

    def submit(self, task: Task) -> None:
        self.task, self.held = task, task.training

    def wait(self, timeout: float | None) -> list[Outcome]:
        assert self.task is not None
        task, self.task = self.task, None
        return [Outcome(task, *attempt(task, *self.arguments), 1.0)]

    def close(self) -> None:
        pass


class Told(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def untimed(value: Any) -> Any:
    """Without anything that a clock decides."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if "second" not in k}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def results(folder: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {cell["id"]: untimed(cell) for cell in lines}


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """In-process workers; counts trainings and cells that were computed."""
    counts: Counter[str] = Counter()
    train, run_cell = experiment.train, experiment.run_cell

    def counted_train(federation: Any, *rest: Any) -> Any:
        counts["train " + str(federation.cell.key())] += 1
        return train(federation, *rest)

    def counted_cell(cell: Any, *rest: Any, **more: Any) -> Any:
        counts["cell " + cell.key()] += 1
        return run_cell(cell, *rest, **more)

    monkeypatch.setattr(grid, "Workers", Inline)
    monkeypatch.setattr("fedsec.leakage.train_encoder", lambda *inputs: None)  # two CPU seconds a cell
    monkeypatch.setattr(experiment, "train", counted_train)
    monkeypatch.setattr(experiment, "run_cell", counted_cell)
    return counts


def test_shared_trainings_are_done_once_and_a_rerun_does_nothing(inline: Counter[str], tmp_path: Path) -> None:
    done = fedsec.sweep(TABLES, out=tmp_path / "s")
    assert len(done["cells"]) == 6 and not done["failed"] and done["unfinished"] == 0
    # Two curious servers share the training of a defense; a malicious client has its own.
    assert sorted(inline.values()) == [1] * 10
    assert len({c["training"] for c in done["cells"]}) == 4
    again = fedsec.sweep(TABLES, out=tmp_path / "s")
    assert again["cells"] == done["cells"] and sum(inline.values()) == 10
    alone = fedsec.run({**TABLES, "attack": TABLES["attack"][:1]}, out=tmp_path / "r", engine="serial", baseline=False)
    by_id = {c["id"]: untimed(c) for c in done["cells"]}
    assert all(by_id[c["id"]] == untimed(c) for c in alone["cells"])  # `run` gives what `sweep` gives
    assert all(c["cost"]["attack_seconds"] <= c["cost"]["cell_seconds"] for c in alone["cells"])


def test_a_failed_cell_is_recorded_and_the_rest_goes_on(
    inline: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conclude = experiment.conclude

    def broken(attack: Any, target: Any) -> Any:
        if attack.images == 2:
            raise RuntimeError("two are too many\nat some length")
        return conclude(attack, target)

    tables = {**TABLES, "attack": TABLES["attack"][:1]}
    told = Told()
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "conclude", broken)
        done = fedsec.sweep(tables, out=tmp_path / "s", progress=told)
    assert len(done["cells"]) == 2 and len(done["failed"]) == 2
    assert done["failed"][0]["reason"].startswith("RuntimeError: two are too many (test_sweep.py:")
    assert any(line.startswith("failed: gradinversion:method=analytic,images=2") for line in told.lines)
    folder = RunFolder.open(tmp_path / "s")
    assert {r["id"] for r in folder.failed()} == {r["id"] for r in done["failed"]}
    before = sum(inline.values())
    mended = fedsec.sweep(tables, out=tmp_path / "s")
    assert len(mended["cells"]) == 4 and not mended["failed"] and not folder.failed()
    assert sum(inline.values()) == before + 2  # two cells, no training


def test_a_training_that_fails_takes_its_cells_along(
    inline: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = experiment.train

    def broken(federation: Any, *rest: Any) -> Any:
        if federation.cell.defense:
            raise RunError("no gradient")
        return train(federation, *rest)

    monkeypatch.setattr(experiment, "train", broken)
    done = fedsec.sweep({**TABLES, "attack": TABLES["attack"][:1]}, out=tmp_path / "s")
    assert [len(done[k]) for k in ("cells", "failed")] == [2, 2]
    assert {r["stage"] for r in done["failed"]} == {"training"}
    assert {r["reason"] for r in done["failed"]} == {"no gradient"}


def test_time_is_up(inline: Counter[str], tmp_path: Path) -> None:
    done = fedsec.sweep(TABLES, out=tmp_path / "s", max_minutes=0)
    assert done["cells"] == [] and done["unfinished"] == 6 and not inline


def test_nothing_runs_when_something_is_misspelt_or_cannot_be_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'topk'"):
        fedsec.sweep({**TABLES, "defense": "topkk"}, out=tmp_path / "s")
    with pytest.raises(ConfigError, match="engine=processes"):
        fedsec.sweep(TABLES, out=tmp_path / "s", jobs=2, engine="processes")
    with pytest.raises(ConfigError, match="at least one process"):
        fedsec.sweep(TABLES, out=tmp_path / "s", jobs=0)
    assert not (tmp_path / "s").exists()
    with pytest.raises(ConfigError, match="nowhere"):
        fedsec.sweep({**TABLES, "data": {"name": "./nowhere.npz"}}, out=tmp_path / "s")


def test_one_sweep_a_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "s")
    with folder.alone(), pytest.raises(ConfigError, match="another process"), RunFolder(tmp_path / "s").alone():
        pass
    with RunFolder(tmp_path / "s").alone():
        pass


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_task(tmp_path: Path) -> None:
    cells = grid.plan({**TABLES, "federation": {"clients": 2, "rounds": 100_000}}, out=tmp_path, jobs=1)
    workers = Workers(1, tmp_path / "artifacts", None)
    try:
        task = cells.schedule().next()
        assert task is not None
        workers.idle()[0].submit(task)
        first = workers.pool[0].process
        os.kill(first.pid, signal.SIGKILL)
        (outcome,) = workers.wait(60)
        assert outcome.failed and "SIGKILL" in outcome.reason and "--jobs 1" in outcome.reason
        assert workers.pool[0].process is not first and workers.idle()
    finally:
        workers.close()


def start(folder: Path, out: str, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "fedsec", "sweep", "g.toml", "--out", out, "--jobs", "2", *more]
    env = {**os.environ, "XDG_CACHE_HOME": str(folder / ".cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_cells(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob("cells/[!.]*.json"))) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_twice_and_resumed_it_gives_what_an_undisturbed_sweep_gives(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text(TOML)
    _, errors = (undisturbed := start(tmp_path, "a")).communicate(timeout=300)
    assert undisturbed.returncode == 0, errors
    seen: dict[str, int] = {}
    for count in (1, 4):
        process = start(tmp_path, "b")
        wait_for_cells(tmp_path / "b", count, process)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        moments = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "b").glob("cells/[!.]*.json")}
        assert count <= len(moments) < 8, errors
        assert all(moments[name] == moment for name, moment in seen.items())  # no finished cell was written again
        seen = moments
    _, errors = (last := start(tmp_path, "b")).communicate(timeout=300)
    assert last.returncode == 0, errors
    moments = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "b").glob("cells/*.json")}
    assert all(moments[name] == moment for name, moment in seen.items())
    assert len(results(tmp_path / "a")) == 8
    assert results(tmp_path / "b") == results(tmp_path / "a")
    assert not [p for p in (tmp_path / "b").rglob(".*") if p.name != ".lock"]


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text(TOML)
    process = start(tmp_path, "r", "--set", "seeds=40")
    wait_for_cells(tmp_path / "r", 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors and "Traceback" not in errors
    kept = len(list((tmp_path / "r").glob("cells/*.json")))
    assert 2 <= kept < 160
    assert len(results(tmp_path / "r")) == kept
