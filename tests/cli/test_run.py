"""The main job, as people type it: results, files, resuming, reproducing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_bad_input import fedsec, write_npz

SMALL = ["--data", "set.npz", "--model", "lenet", "--clients", "2", "--rounds", "2", "--engine", "serial"]
ATTACK = ["--attack", "gradinversion:method=cascade,images=2", "--defense", "dp:epsilon=8"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_npz(tmp_path / "set.npz")
    return tmp_path


def cells(folder: Path, *words: str) -> list[dict[str, Any]]:
    done = fedsec("run", *SMALL, *words, "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    result: list[dict[str, Any]] = json.loads(done.stdout)["cells"]
    return result


def test_the_main_job(folder: Path) -> None:
    none, dp = cells(folder, *ATTACK, "--out", "r")
    assert none.get("defense", []) == []
    assert dp["defense"] == [{"name": "dp", "epsilon": 8.0}]
    for cell in (none, dp):
        assert {"utility", "leakage", "cost", "assumptions"} <= cell.keys()
        assert set(cell["utility"]["auc"]) == {"value", "low", "high", "n"}
        assert cell["leakage"]["prior_psnr"]["value"] is not None
        assert cell["assumptions"]["labels"] in ("recovered", "set")  # under noise a set is tried
        assert set(cell["leakage"]["by_round"]) == {"1", "2"}
    assert none["leakage"]["psnr"]["value"] > 60  # LeNet, one image, one gradient: solved exactly
    assert dp["leakage"]["psnr"]["value"] < 40
    assert 0 < dp["privacy"]["epsilon"] <= 8.001
    assert "privacy" not in none

    run = folder / "r"
    assert {p.name for p in run.iterdir()} >= {"config.toml", "resolved.json", "env.json", "cells", "results.jsonl"}
    assert len((run / "results.jsonl").read_text().splitlines()) == 2
    assert not list(run.rglob(".*partial*")) and not [p for p in run.rglob(".*") if p.is_file()]
    shown = fedsec("show", "r", folder=folder)
    assert shown.returncode == 0 and "dp:epsilon=8" in shown.stdout
    drawn = fedsec("plot", "r", folder=folder)
    assert drawn.returncode == 0, drawn.stderr
    figures = [folder / line for line in drawn.stdout.splitlines()]
    assert {f.suffix for f in figures} == {".png", ".svg", ".csv"} and all(f.stat().st_size > 0 for f in figures)


def without_times(cell: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in cell.items() if k != "cost"}
    text = json.dumps(kept, sort_keys=True)
    clean: dict[str, Any] = json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if "seconds" not in k})
    return clean


def test_the_resolved_config_reproduces_bit_for_bit(folder: Path) -> None:
    first = cells(folder, *ATTACK, "--out", "a")
    done = fedsec("run", "--config", "a/resolved.json", "--out", "b", "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)["cells"]
    assert [without_times(c) for c in again] == [without_times(c) for c in first]
    for path in (folder / "a/artifacts").rglob("*.safetensors"):
        assert path.read_bytes() == (folder / "b" / path.relative_to(folder / "a")).read_bytes()


def test_the_same_line_recomputes_nothing(folder: Path) -> None:
    cells(folder, "--out", "r")
    before = {p: p.stat().st_mtime_ns for p in (folder / "r" / "artifacts").rglob("*")}
    done = fedsec("run", *SMALL, "--out", "r", folder=folder)
    assert "finished before, kept" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in (folder / "r" / "artifacts").rglob("*")} == before


def test_a_second_attack_uses_the_same_training(folder: Path) -> None:
    cells(folder, "--attack", "gradinversion:method=cascade,images=2", "--out", "r")
    cells(folder, "--attack", "gradinversion:method=analytic,images=2", "--out", "r")
    assert len(list((folder / "r" / "artifacts").glob("train-*"))) == 1


def test_killed_in_the_middle_and_resumed(folder: Path) -> None:
    words = [sys.executable, "-m", "fedsec", "run", *SMALL, "--seeds", "3", "--rounds", "6", "--out", "r"]
    env = {**os.environ, "XDG_CACHE_HOME": str(folder / ".cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=folder, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((folder / "r").glob("cells/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in (folder / "r" / "cells").glob("[!.]*.json")}
    assert 1 <= len(kept) < 3
    done = fedsec("run", *words[4:], folder=folder)
    assert done.returncode == 0, done.stderr
    after = {p.name: p.stat().st_mtime_ns for p in (folder / "r" / "cells").glob("*.json")}
    assert len(after) == 3
    assert all(after[name] == moment for name, moment in kept.items())
    assert len((folder / "r" / "results.jsonl").read_text().splitlines()) == 3


def test_processes_give_the_serial_result(folder: Path) -> None:
    serial = cells(folder, "--out", "s")[0]
    parallel = cells(folder, "--engine", "processes", "--out", "p")[0]
    assert parallel["utility"]["auc"]["value"] == pytest.approx(serial["utility"]["auc"]["value"], abs=1e-3)


def test_interrupted(folder: Path) -> None:
    words = [sys.executable, "-m", "fedsec", "run", *SMALL, "--rounds", "100000", "--out", "r"]
    process = subprocess.Popen(
        words,
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A test run that was itself started in the background hands down an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stderr is not None
        errors = process.stderr.readline()  # it has begun
        process.send_signal(signal.SIGINT)
        errors += process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors and "interrupted" in errors


def test_list_and_doctor(folder: Path) -> None:
    for kind, name in (("attacks", "gradinversion"), ("defenses", "dp"), ("models", "lenet"), ("strategies", "fedavg")):
        done = fedsec("list", kind, "-v", folder=folder)
        assert done.returncode == 0 and name in done.stdout
    assert "epsilon: float, default 8.0" in fedsec("list", "defenses", "-v", folder=folder).stdout
    done = fedsec("doctor", folder=folder)
    assert done.returncode == 0 and "BROKEN" not in done.stdout
    assert fedsec("data", "check", "set.npz", folder=folder).returncode == 0
    assert fedsec("show", "nowhere", folder=folder).returncode == 2
