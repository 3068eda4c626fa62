"""Claimed against audited: a private training audits below its claim, one without noise is refuted with exit 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedsec
from fedsec.cli import run as command_line
from tests.audit.networks import NAME

IMAGES = {"name": "synthetic-cxr:images=1600,shift=0", "canaries": 400}
STEPS: dict[str, Any] = {"rounds": 1, "local_steps": 60, "batch_size": 128, "engine": "serial", "device": "cpu"}


def audited(folder: Path, claim: float | None, *words: str) -> tuple[int, dict[str, Any]]:
    asked = ["audit", str(folder), "--model", NAME, "--attack", "membership:methods=loss", "--shadow", "0"]
    claimed = [] if claim is None else ["--claimed-epsilon", str(claim)]
    code = command_line([*asked, *claimed, "--json", str(folder / "audit.json"), *words])
    return code, json.loads((folder / "audit.json").read_text())


@pytest.mark.parametrize(
    ("kind", "defense", "refuted"),
    [
        ("dirac", "dp:epsilon=3,delta=1e-5", False),
        ("random", "dp:epsilon=3,delta=1e-5", False),
        ("dirac", "dp:noise_multiplier=1e-6", True),
    ],
)
def test_a_claim_of_epsilon_3(kind: str, defense: str, refuted: bool, tmp_path: Path) -> None:
    """Same training, same 400 canaries, same claim; only the noise differs."""
    model = {"name": NAME if kind == "dirac" else "tests.audit.networks:small"}
    tables = {"data": {**IMAGES, "canary": kind}, "model": model}
    fedsec.run(tables, defense=defense, clients=1, lr=0.01, baseline=False, out=tmp_path / "run", **STEPS)
    code, found = audited(tmp_path / "run", 3.0 if refuted else None, "--model", model["name"])
    dp = found["dp_audit"]
    assert dp["claimed"] == pytest.approx(3.0, rel=0.02) and dp["kind"] == kind
    assert dp["proven"] < dp["ceiling"]
    if refuted:
        assert code == 1 and dp["verdict"] == "contradicted" and dp["proven"] > 3
        assert found["outcome"]["title"] == "Claimed epsilon refuted"
    else:
        assert code == 0 and dp["verdict"] in ("consistent", "uninformative")
        assert 0 < dp["proven"] < 3  # these canaries do show something


@pytest.mark.parametrize(("noise", "refuted"), [(1.0, False), (1e-6, True)])
def test_a_claim_for_whole_clients(noise: float, refuted: bool, tmp_path: Path) -> None:
    """Four hospitals and 400 canary clients; three rounds at z = 1 claim ε = 7.9, and z = 0 is caught at ε = 3."""
    tables = {"data": {**IMAGES, "canary": "client_dirac"}, "model": {"name": NAME}}
    fedsec.run(
        tables, defense=f"dp_client:noise_multiplier={noise}", clients=4, baseline=False, out=tmp_path / "run",
        **{**STEPS, "rounds": 3, "local_steps": 1},
    )  # fmt: skip
    code, found = audited(tmp_path / "run", 3.0 if refuted else None)
    dp = found["dp_audit"]
    assert dp["unit"] == "client" and "not the production model" in dp["remarks"][0]
    assert (code, dp["verdict"] == "contradicted") == ((1, True) if refuted else (0, False))
    assert dp["proven"] > 3 if refuted else 0.3 < dp["proven"] < dp["claimed"]
