"""Every kind of bad input: one clear line, the documented exit code, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.test_checkpoint import Bomb


def fedsec(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line for real, in a folder of its own, with an empty data cache."""
    env = {k: v for k, v in os.environ.items() if k != "FEDSEC_DATA"}
    env |= {"XDG_CACHE_HOME": str(folder / ".cache"), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "fedsec", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def write_npz(path: Path, **changes: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for part, count in (("train", 60), ("val", 20), ("test", 20)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count, dtype=np.uint8) % 2)[:, None]
    np.savez(path, **{**arrays, **changes})  # type: ignore[arg-type]


CASES = {
    "unknown attack": (["--attack", "gradinversio"], 2, "did you mean 'gradinversion'"),
    "unknown defense": (["--defense", "dpp"], 2, "did you mean 'dp'"),
    "unknown parameter": (["--defense", "dp:epsilonn=3"], 2, "did you mean 'epsilon'"),
    "negative epsilon": (["--defense", "dp:epsilon=-1"], 2, "greater than 0"),
    "noise without a bound": (["--defense", "gaussian:epsilon=1"], 2, "clip"),
    "delta as large as 1/n": (["--defense", "dp:delta=0.5", "--data", "good.npz", "--clients", "3"], 4, "delta"),
    "clipping without noise called DP": (["--defense", "dp:noise_multiplier=0"], 4, "privacy"),
    "unknown option": (["--atack", "gradinversion"], 2, "--attack"),
    "unknown setting": (["--set", "federation.learning=1"], 2, "unknown parameter 'learning'"),
    "missing data set": (["--data", "pneumoniamnist"], 2, "fedsec data get pneumoniamnist"),
    "unknown data set": (["--data", "pneumoniamnst"], 2, "did you mean 'pneumoniamnist'"),
    "truncated npz": (["--data", "truncated.npz"], 2, "truncated.npz"),
    "labels out of range": (["--data", "labels.npz"], 2, "train_labels"),
    "object arrays": (["--data", "objects.npz"], 4, "objects.npz"),
    "hostile checkpoint": (["--data", "good.npz", "--set", "model.weights=bomb.pt"], 4, "not executed"),
    "missing checkpoint": (["--data", "good.npz", "--set", "model.weights=absent.pt"], 2, "no such model file"),
    "no CUDA": (["--device", "cuda:7"], 2, "CUDA"),
    "unknown device": (["--device", "quantum"], 2, "cpu"),
    "output not writable": (["--data", "good.npz", "--out", "/proc/fedsec"], 2, "--out"),
    "more clients than images": (["--data", "good.npz", "--clients", "100"], 2, "100 clients"),
    "unknown model": (["--model", "cn"], 2, "did you mean 'cnn'"),
    "unknown strategy": (["--strategy", "fedavgg"], 2, "did you mean 'fedavg'"),
    "participation": (["--participation", "1.5"], 2, "participation"),
    "missing config": (["--config", "absent.toml"], 2, "absent.toml"),
    "a round that does not exist": (["--attack", "gradinversion:rounds=99", "--data", "good.npz"], 2, "round"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad")
    write_npz(path / "good.npz")
    write_npz(path / "labels.npz", train_labels=np.full((60, 1), 9, dtype=np.uint8), class_names=np.array(["a", "b"]))
    write_npz(path / "objects.npz", train_labels=np.array([Bomb(path / "executed")] * 60, dtype=object))
    (path / "truncated.npz").write_bytes((path / "good.npz").read_bytes()[:5000])
    torch.save({"weights": Bomb(path / "executed")}, path / "bomb.pt")
    return path


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, folder: Path, tmp_path: Path) -> None:
    words, code, hint = CASES[case]
    for name in ("good", "labels", "objects", "truncated"):
        (tmp_path / f"{name}.npz").symlink_to(folder / f"{name}.npz")
    (tmp_path / "bomb.pt").symlink_to(folder / "bomb.pt")
    done = fedsec("run", *words, "--rounds", "1", "--set", "data.min_images=1", folder=tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == code, done.stderr
    assert len(errors) == 1
    assert hint in errors[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (folder / "executed").exists()
    assert not list(tmp_path.glob("runs/*/cells/*.json"))


def test_unknown_command(tmp_path: Path) -> None:
    done = fedsec("rum", folder=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'run'" in done.stderr
