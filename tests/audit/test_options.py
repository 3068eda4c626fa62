"""`--ledger`, `--history`, `--budget` and `fedsec.audit`: what a bare file is asked; what is refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsec
from fedsec import checkpoint, models
from fedsec.audit.claims import of_ledger
from fedsec.audit.figures import claimed_curve
from fedsec.audit.run import Wanted, audit
from fedsec.audit.subjects import Said
from fedsec.cli import run as command_line
from fedsec.config import Cell, read_resolved
from fedsec.errors import ConfigError, RefusedError
from fedsec.experiment import training_key_of
from fedsec.federation.assemble import assemble
from fedsec.metrics.membership import claimed_tpr
from fedsec.privacy.ledger import PARTS

DATA = "synthetic-cxr:images=2400,shift=0"
NAME = "tests.audit.networks:small"
LOSS = ("membership:methods=loss",)
SETTINGS: dict[str, Any] = {
    "clients": 4, "rounds": 3, "local_steps": 2, "lr": 0.05, "engine": "serial", "device": "cpu", "baseline": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A private run that a curious server watched: its parts, as files."""
    folder = tmp_path_factory.mktemp("private") / "run"
    fedsec.run(
        {"data": {"name": DATA, "max_train": 440}, "model": {"name": NAME}}, defense="dp:epsilon=3",
        attack="membership:methods=grad_cos,shadows=0", out=folder, **SETTINGS,
    )  # fmt: skip
    cell = Cell.from_json(read_resolved(folder / "resolved.json")[0])
    key = training_key_of(cell)
    members = folder.parent / "members.txt"
    members.write_text("\n".join(map(str, np.concatenate(assemble(cell).rows))))
    recipe = folder.parent / "recipe.toml"
    lines = [f"{k} = {v!r}".replace("'", '"') for k, v in SETTINGS.items() if k != "baseline"]
    recipe.write_text("\n".join(["[federation]", *lines]))
    return {
        "run": folder,
        "history": folder / "artifacts" / key,
        "model": folder / "artifacts" / key / "model.safetensors",
        "ledger": folder / "artifacts" / PARTS / f"{key}.jsonl",
        "members": members,
        "recipe": recipe,
    }


def said(files: dict[str, Path], **more: Any) -> Said:
    return Said(**{"data": DATA, "members": str(files["members"]), "nonmembers": "test", "model": NAME, **more})


def test_the_ledger_is_the_claim(private: dict[str, Path]) -> None:
    """ε as the run itself said, and a profile whose envelope lies below the curve of the one pair."""
    found = audit(private["model"], said(private, ledger=private["ledger"]), Wanted(attacks=LOSS, shadows=0))
    claim = found["claim"]
    assert claim["epsilon"] == pytest.approx(3, rel=0.02) and claim["unit"] == "sample"
    run = audit(private["run"], Said(model=NAME), Wanted(attacks=LOSS, shadows=0))
    assert run["claim"]["epsilon"] == pytest.approx(claim["epsilon"]) and run["claim"]["profile"] == claim["profile"]
    epsilons = [epsilon for epsilon, _ in claim["profile"]]
    assert epsilons == sorted(epsilons, reverse=True)  # a larger δ buys a smaller ε
    envelope = np.array([y for _, y in claimed_curve(claim, 1e-3)])
    single = claimed_tpr(np.geomspace(1e-3, 1, 80), claim["epsilon"], claim["delta"])
    assert (envelope <= single + 0.02).all() and (envelope < single - 0.05).any()


def test_a_ledger_of_other_data_or_without_a_claim_is_refused(private: dict[str, Path], tmp_path: Path) -> None:
    """A9."""
    other = tmp_path / "ledger.jsonl"
    text = private["ledger"].read_text()
    fingerprint = assemble(Cell.from_json(read_resolved(private["run"] / "resolved.json")[0])).dataset.fingerprint
    other.write_text(text.replace(fingerprint, "0" * len(fingerprint)))
    with pytest.raises(RefusedError, match="belongs to another run"):
        audit(private["model"], said(private, ledger=other), Wanted(attacks=LOSS, shadows=0))
    other.write_text("".join(line + "\n" for line in text.splitlines() if '"finished"' not in line))
    with pytest.raises(ConfigError, match="no finished training"):
        of_ledger(other)
    other.write_text(text.replace('"unit": "sample"', '"unit": null'))
    with pytest.raises((ConfigError, RefusedError)):
        of_ledger(other)
    with pytest.raises(ConfigError, match="no such file"):
        of_ledger(tmp_path / "absent.jsonl")


def test_a_bare_file_with_its_history_is_asked_by_the_updates(private: dict[str, Path]) -> None:
    wanted = Wanted(attacks=("membership:methods=loss+grad_cos,shadows=0",), shadows=0)
    found = audit(private["model"], said(private, recipe=private["recipe"], history=private["history"]), wanted)
    assert found["membership"]["attacks"]["grad_cos"]["view"] == "updates"
    without = audit(private["model"], said(private, recipe=private["recipe"]), wanted)
    assert "grad_cos" not in without["membership"]["attacks"]
    assert any("no update history" in note for note in without["notes"])


def test_a_history_that_does_not_fit_is_one_line(private: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs --recipe"):
        audit(private["model"], said(private, history=private["history"]), Wanted(attacks=LOSS, shadows=0))
    with pytest.raises(ConfigError, match=r"holds no history\.safetensors"):
        audit(private["model"], said(private, recipe=private["recipe"], history=tmp_path))
    net = models.build("lenet", num_classes=2, in_channels=1, image_size=28)
    checkpoint.save(tmp_path / "model.safetensors", net.state_dict(), {"model": "lenet", "num_classes": 2})
    shutil.copy(private["history"] / "history.safetensors", tmp_path)
    with pytest.raises(ConfigError, match="weights, the model has"):
        audit(
            tmp_path / "model.safetensors",
            said(private, recipe=private["recipe"], history=tmp_path, model=None),
            Wanted(attacks=LOSS, shadows=0),
        )


def test_a_budget_leaves_shadows_and_attacks_out_and_says_so(private: dict[str, Path], tmp_path: Path) -> None:
    wanted = Wanted(attacks=("membership:methods=loss+rmia", "modelinversion:steps=2,epochs=1"), shadows=6, budget=1e-3)
    found = audit(private["model"], said(private, recipe=private["recipe"]), wanted, cache=tmp_path)
    assert found["membership"]["attacks"]["rmia"]["shadows"] == 2 and "inversion" not in found
    assert any("2 of 6 shadow models" in note for note in found["notes"])
    assert any("modelinversion: left out" in note for note in found["notes"])


@pytest.mark.parametrize("text", ["fast", "0", "-3s"])
def test_a_budget_is_a_number_of_seconds(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["audit", str(tmp_path), "--budget", text]) == 2
    assert "write a number of seconds" in capsys.readouterr().err


def test_the_python_call_is_the_command(private: dict[str, Path], tmp_path: Path) -> None:
    found = fedsec.audit(
        private["run"], architecture=NAME, attacks=LOSS, shadows=0, thresholds={"auc": 0.01}, report=tmp_path / "a.html"
    )  # fmt: skip
    assert found["exit_code"] == 1 and (tmp_path / "a.html").is_file()
    with pytest.raises(ConfigError, match="unknown word 'epsilom'"):
        fedsec.audit(private["run"], epsilom=3)


def test_inversion_is_judged_by_a_model_that_saw_no_training_image(private: dict[str, Path]) -> None:
    """Both methods, each class: confidence of the attacked model beside that of an independent one."""
    wanted = Wanted(attacks=("modelinversion:steps=40,epochs=5,starts=2",), shadows=0)
    found = audit(private["model"], said(private), wanted)["inversion"]
    assert {(row["label"], row["method"]) for row in found["classes"]} == {
        (label, method) for label in ("no pneumonia", "pneumonia") for method in ("miface", "generative")
    }
    assert found["independent"]["accuracy"]["low"] > 0.6
    assert all(0 <= row["independent_confidence"] <= 1 for row in found["classes"])
