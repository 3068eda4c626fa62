"""One cell, start to end: a measure without its assumptions is refused; bound, gap and prior stand where they can."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import fedsec
from fedsec import experiment
from fedsec.attack import Attack
from fedsec.config import Cell, DataConfig, FederationConfig, ModelConfig
from fedsec.experiment import conclude, public_data
from fedsec.federation.assemble import assemble
from fedsec.federation.victims import Victim
from fedsec.findings import Findings, Limits, PublicData, Reconstruction, Target, VictimPlan
from fedsec.leakage import STAMP, public_prior
from fedsec.metrics.image import pixel_hash
from fedsec.types import RoundContext, Seat

STATED = {"labels": "oracle", "victim_batch": 1, "victim_mode": "train", "view": "individual"}
TINY = {"data": {"name": "synthetic-cxr:images=260"}, "model": {"name": "lenet"}}
SMALL: dict[str, Any] = {"clients": 2, "rounds": 1, "local_epochs": 1, "engine": "serial", "device": "cpu"}


@dataclass(frozen=True)
class Guess(Attack):
    """Hands in the public mean image."""

    name: ClassVar[str] = "guess"
    seat: ClassVar[Seat] = "server"
    goal: ClassVar[str] = "nothing"
    stated: tuple[str, ...] = STAMP
    naive: int = 0
    possible: int = 0

    def victims(self) -> VictimPlan:
        return VictimPlan(rounds=(1,), images=2, batch=1)

    def conclude(self, target: Target) -> Findings:
        mean = target.public.images.mean(0, keepdim=True)
        found = tuple(Reconstruction(mean, torch.zeros(1, dtype=torch.long), "guess") for _ in target.views)
        return Findings(found, {k: v for k, v in STATED.items() if k in self.stated}, naive=found[: self.naive])

    def limits(self, target: Target, truths: Any) -> tuple[Limits, ...]:
        return tuple(
            Limits(float((x - target.public.images.mean(0)).pow(2).mean())) for x, _ in truths[: self.possible]
        )


def target(views: int = 2) -> Target:
    public = PublicData("p", torch.rand(4, 1, 8, 8), torch.zeros(4))
    nothing: Any = None
    return Target(nothing, nothing, (nothing,) * views, public, (1, 8, 8), RoundContext(0, 1, 1), torch.device("cpu"))


@pytest.mark.parametrize("key", STAMP)
def test_reconstructions_without_their_assumptions_are_refused(key: str) -> None:
    assert conclude(Guess(), target()).reconstructions
    with pytest.raises(ValueError, match=f"guess: its findings do not state {key}"):
        conclude(Guess(stated=tuple(k for k in STAMP if k != key)), target())


def test_naive_reconstructions_come_for_every_view_or_none() -> None:
    with pytest.raises(ValueError, match="1 naive reconstructions for 2 views"):
        conclude(Guess(naive=1), target())


def run(attack: Attack, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """One cell with an attack that is not installed."""
    real = experiment.build_stack
    monkeypatch.setattr(experiment, "build_stack", lambda cell: replace_attack(real(cell), attack))
    data, model = DataConfig(name="synthetic-cxr:images=260"), ModelConfig(name="lenet")
    return experiment.run_cell(Cell(data=data, model=model, federation=FederationConfig(**SMALL)), folder)


def replace_attack(stack: Any, attack: Attack) -> Any:
    return (stack[0], attack, *stack[2:])


def test_limits_and_naive_attack_of_any_attack_enter_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cell = run(Guess(naive=2, possible=2), monkeypatch, tmp_path)
    leakage = cell["leakage"]
    assert leakage["bound_psnr"]["value"] == pytest.approx(leakage["prior_psnr_of_mean_mse"]["value"], abs=1e-4)
    assert leakage["gap_db"]["value"] == pytest.approx(0, abs=1e-4)
    assert leakage["verdict"].startswith("The update carries almost no image information beyond the prior")
    assert leakage["adaptive_gap"]["value"] == 0
    assert leakage["naive"]["psnr"] == leakage["psnr"]
    assert set(leakage["naive"]) == {"psnr", "psnr_of_mean_mse", "ssim", "reid_rank1"}
    assert cell["assumptions"]["model_state"] == {"1": {"rounds_trained": 0}}
    assert cell["cost"]["measure_seconds"] > 0


def test_limits_come_for_every_view_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 limits for 2 views"):
        run(Guess(possible=1), monkeypatch, tmp_path)


def test_a_bound_stands_beside_noise_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: the worst round is repeated in front, and the adaptive and the naive attack are compared."""
    monkeypatch.setattr(experiment, "usable_cores", lambda: 1)  # starting processes takes longer than the attack
    attack = "gradinversion:images=1,rounds=first,budget_s=1,adaptive=both"
    done = fedsec.run(TINY, attack=attack, defense="gaussian:sigma=0.01", out=tmp_path / "run", **SMALL)
    exact, noisy = (cell["leakage"] for cell in done["cells"])
    for key in ("bound_psnr", "gap_db"):
        assert key not in exact and key not in exact["by_round"]["1"]
        assert noisy[key] == noisy["by_round"]["1"][key]
    assert "no bound: the observation is exact" in exact["limit_notes"]
    assert exact["jacobian_rank"] == 784 and exact["rank_index_noise"] == 1
    assert exact["rank_index_structural"] == noisy["rank_index_structural"] == 1
    assert noisy["rank_index_noise"] < 1
    gap = noisy["bound_psnr"]["value"] - noisy["psnr_of_mean_mse"]["value"]
    assert noisy["gap_db"]["value"] == pytest.approx(gap, abs=1e-6)
    difference = noisy["psnr_of_mean_mse"]["value"] - noisy["naive"]["psnr_of_mean_mse"]["value"]
    assert noisy["adaptive_gap"]["value"] == pytest.approx(difference, abs=1e-6)
    assert {"model_state", "epochs", "server", *STAMP} <= done["cells"][1]["assumptions"].keys()


def test_public_images_are_fresh_and_counted_once() -> None:
    cell = Cell(
        data=DataConfig(name="synthetic-cxr:images=260"),
        model=ModelConfig(name="lenet"),
        federation=FederationConfig(**{**SMALL, "local_epochs": 1}),
    )
    federation = assemble(cell)
    rows = federation.dataset.rows(split="val")
    stolen, labels = federation.dataset.batch(rows[:3])
    victims = [Victim(0, 1, rows[:3], stolen, labels)]
    twice = [*rows, *rows[5:8]]
    dataset = federation.dataset.select(twice)
    public = public_data(replace(federation, dataset=dataset), victims)
    digests = pixel_hash(public.images)
    assert not set(digests) & set(pixel_hash(stolen))
    assert len(digests) == len(set(digests)) == len(rows) - 3
    share = public_prior(public, victims)["same_class_share"]
    assert share == pytest.approx(float(torch.isin(public.labels, labels).float().mean()))
    assert public_prior(public, [replace(victims[0], labels=labels * 0 + 7)])["same_class_share"] == 0
