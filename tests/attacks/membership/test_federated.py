"""Membership and origin from updates: closed forms against autograd, a reference, and a training that leaks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student
from torch import nn
from torch.nn import functional as F

import fedsec
from fedsec.types import Task

federated: Any = importlib.import_module("fedsec.attacks.membership.federated")


def network(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, outputs))


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_the_last_layer_has_its_gradient_in_closed_form(task: Task) -> None:
    """(p - y) ⊗ h is what autograd gives for each image's own loss; unknown labels count for nothing."""
    model = network(3)
    x = torch.rand(5, 1, 8, 8)
    if task == "multilabel":
        y = torch.tensor([[0.0, 1, 1], [1, 0, 0], [1, float("nan"), 0], [0, 0, 0], [1, 1, 1]])
    else:
        y = torch.tensor([0, 2, 1, 1, 0])
    errors, features = federated.last_layer(model, "3", x, y, task, torch.device("cpu"))
    layer = model[3]  # type: ignore[index]
    for i in range(5):
        logits = model(x[i : i + 1])
        if task == "multilabel":
            known = ~torch.isnan(y[i])
            loss = F.binary_cross_entropy_with_logits(logits[0][known], y[i][known])
        else:
            loss = F.cross_entropy(logits, y[i : i + 1])
        weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias])
        torch.testing.assert_close(torch.outer(errors[i], features[i]), weight)
        torch.testing.assert_close(errors[i], bias)


def test_the_layer_that_makes_the_logits_is_not_always_the_last_one_listed() -> None:
    class Headed(nn.Module):
        def __init__(self, scaled: bool) -> None:
            super().__init__()
            self.net, self.beside, self.scaled = network(3), nn.Linear(16, 3), scaled

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.net(x)
            return 2 * logits if self.scaled else logits

    x = torch.rand(1, 1, 8, 8)
    assert federated.logits_layer(Headed(False), x) == "net.3"
    assert federated.logits_layer(Headed(True), x) is None, "its update is not (p - y) times the features"


def rounds(clients: int, images: int, count: int = 3) -> list[Any]:
    draw = np.random.default_rng(0)
    return [
        federated.Measured(tuple(range(clients)), *(draw.normal(size=(clients, images)) for _ in range(3)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("clients", [5, 12])
def test_one_against_all_is_its_definition(clients: int) -> None:
    """Reference by loops: the others' mean and standard deviation, a tail, the mean over rounds, the best client."""
    measured, images = rounds(clients, 6), 6
    log_tails: NDArray[np.float64] = np.zeros((clients, images))
    standard: NDArray[np.float64] = np.zeros((clients, images))
    for r in measured:
        variances = np.array([np.delete(r.cosine, k, 0).var(0, ddof=1) for k in range(clients)])
        for k in range(clients):
            others = np.delete(r.cosine, k, 0)
            spread = np.sqrt(np.maximum(variances[k], variances.mean()))
            z = (r.cosine[k] - others.mean(0)) / (spread * np.sqrt(1 + 1 / (clients - 1)))
            tail = student(clients - 2).cdf(z) if clients < 10 else norm.cdf(z)
            log_tails[k] += np.log(tail) / len(measured)
            standard[k] += z / len(measured)
    score, who = federated.one_against_all(measured)
    np.testing.assert_allclose(score, log_tails.max(0), rtol=1e-6)
    np.testing.assert_array_equal(who, standard.argmax(0))


def test_clients_that_are_absent_from_a_round_are_averaged_over_their_own() -> None:
    """Participation below one: a client counts in the rounds that it took part in, whatever their number."""
    one, two = rounds(3, 4, 2)
    partial = federated.Measured((0, 2), *(v[[0, 2]] for v in (two.cosine, two.difference, two.log_p)))
    guessed = federated.lowest_loss([one, partial])
    means = [(one.log_p[0] + two.log_p[0]) / 2, one.log_p[1], (one.log_p[2] + two.log_p[2]) / 2]
    np.testing.assert_array_equal(guessed, np.argmax(means, 0))


METHODS = "membership:methods=grad_cos+grad_diff+loss_series+all_for_one,shadows=0"


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and labels without any pattern: what is known of them was memorised."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 300), ("val", 520), ("test", 60)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 2, (count, 1)).astype(np.uint8)
    path = tmp_path_factory.mktemp("noise") / "noise.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def attacked(noise: Path, out: Path, **more: Any) -> dict[str, Any]:
    tables = {"data": {"name": str(noise)}, "model": {"name": "tests.audit.networks:mlp"}}
    found = fedsec.run(
        tables, attack=METHODS, clients=5, rounds=6, local_epochs=4, lr=0.003, batch_size=16, engine="serial",
        device="cpu", out=out, **{"baseline": False, **more},
    )  # fmt: skip
    result: dict[str, Any] = found["cells"][-1]
    return result


def test_updates_tell_members_and_their_hospital(noise: Path, tmp_path: Path) -> None:
    """Five hospitals that memorise 60 images each; non-members are half of the validation part."""
    leakage = attacked(noise, tmp_path / "run")["leakage"]
    for name in ("grad_cos", "grad_diff", "loss_series", "all_for_one"):
        attack = leakage["membership"]["attacks"][name]
        assert attack["view"] == "updates" and attack["auc"]["low"] > 0.6, (name, attack["auc"])
    source = leakage["source"]
    assert source["accuracy"]["low"] > 0.5 and source["lift"]["low"] > 0.2
    assert source["baselines"]["one in K"] == pytest.approx(0.2)
    assert source["baselines"]["pixels alone"] < 0.35  # nothing to see in the images themselves


def test_a_hidden_sum_gives_no_client_away(noise: Path, tmp_path: Path) -> None:
    """A20: secure aggregation shows the sum alone; the methods that need single updates say so."""
    found = attacked(noise, tmp_path / "run", defense="secagg")
    attacks = found["leakage"]["membership"]["attacks"]
    assert set(attacks) == {"grad_cos", "grad_diff", "loss_series"}
    assert {a["view"] for a in attacks.values()} == {"sum"} and "source" not in found["leakage"]
    assert any("aggregate only" in note for note in found["notes"])
