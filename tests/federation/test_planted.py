"""Canaries that are gradients or clients: they take the real path, and what is read of them is what was released."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedsec
from fedsec import data as data_sets
from fedsec.config import expand
from fedsec.data.canaries import CanaryKind, plant
from fedsec.data.partition import partition
from fedsec.defense import Defense
from fedsec.errors import ConfigError
from fedsec.federation.assemble import Federation, assemble, resolve
from fedsec.federation.local import PlainStep, plain_objective
from fedsec.federation.planted import Directions, PlantedStep, Witness
from fedsec.types import Layout, LocalRecipe, RoundContext

DATA = "synthetic-cxr:images=400"
RECIPE = LocalRecipe("binary", 2, lr=0.1, momentum=0.9, weight_decay=0.01, batch_size=8, epochs=None, steps=5)
CTX = RoundContext(3, 1, 1, 0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 2))


def directions(model: nn.Module, count: int, dirac: bool) -> Directions:
    return Directions(Layout.of(dict(model.named_parameters())), count, 1, dirac)


def batch(canaries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight images, of which the first few are canaries 0, 1, …"""
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(2, (8,), generator=generator)
    y[:canaries] = -1 - torch.arange(canaries)
    return torch.rand(8, 1, 28, 28, generator=generator), y


@pytest.mark.parametrize("dirac", [True, False])
@pytest.mark.parametrize("engine", ["ghost", "hooks", "vmap", "microbatch"])
def test_a_canary_image_is_clipped_and_summed_as_any_other(engine: str, dirac: bool) -> None:
    """The released sum is that of the real images plus clip·v for each canary, whatever engine computes it."""
    steps: Any = importlib.import_module("fedsec.defenses.dp_step")
    model, clip = network(), 0.5
    vectors = directions(model, 3, dirac)
    (x, y), still = batch(3), replace(RECIPE, momentum=0.0, weight_decay=0.0)
    schedule = steps.Schedule(8, 1e-12, 1.0, 5, 1)

    def change(inner: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        steps.PrivateStep(inner, schedule, clip, CTX, engine)(x, y)
        moved = {n: (before[n] - p.detach()) * 8 / still.lr for n, p in model.named_parameters()}
        model.load_state_dict(before)
        return vectors.layout.flatten(moved)

    with_canaries = change(PlantedStep(model, still, vectors, 2 * clip), x, y)
    real = change(PlainStep(model, still), x[3:], y[3:])
    expected = real + clip * sum(vectors.vector(j) for j in range(3))
    torch.testing.assert_close(with_canaries, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dirac", [True, False])
def test_the_witness_reads_the_gradient_behind_momentum_and_weight_decay(dirac: bool) -> None:
    model = network()
    vectors = directions(model, 4, dirac)
    seen: list[torch.Tensor] = []

    def recording(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = plain_objective(RECIPE.task)(network, x, y)
        names = [n for n, _ in network.named_parameters()]
        parts = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        seen.append(vectors.layout.flatten(dict(zip(names, parts, strict=True))))
        return loss

    witness = Witness(PlainStep(model, RECIPE, recording), RECIPE, vectors, np.arange(4), {}, 8)
    for _ in range(4):
        witness(*batch(0))
    expected = sum(vectors.project(g).double().numpy() for g in seen)
    np.testing.assert_allclose(witness.score(), expected, atol=1e-4)


def federation(kind: CanaryKind, count: int, defense: str = "none", **more: Any) -> Federation:
    tables = {
        "data": {"name": DATA, "canaries": count, "canary": kind},
        "federation": {"clients": 2, "rounds": 2, "local_steps": 2, "engine": "serial", "device": "cpu", **more},
        "defense": [] if defense == "none" else [defense],
        "baseline": False,
    }
    return assemble(resolve(expand(tables)[0]))


def test_gradient_canaries_leave_labels_and_images_alone() -> None:
    """Only the copies that clients train on are marked; members, evaluation and accounting see the data set."""
    found = federation("dirac", 40)
    canaries = found.canaries
    assert canaries is not None and found.seats.planted is not None
    assert found.dataset.fingerprint == data_sets.load(DATA).fingerprint
    marked = np.concatenate([rows[(y < 0).numpy()] for rows, (_, y) in zip(found.rows, found.clients, strict=True)])
    assert sorted(marked) == sorted(canaries.planted)
    for k, (rows, (_, y)) in enumerate(zip(found.rows, found.clients, strict=True)):
        for row, label in zip(rows, y.tolist(), strict=True):
            if label < 0:
                assert canaries.rows[-1 - label] == row and found.seats.planted.owner[-1 - label] == k
    assert not np.isin(canaries.rows[~canaries.included], np.concatenate(found.rows)).any()


def test_coins_are_fair_and_committed() -> None:
    """A11: the share of heads is ½ within four standard errors."""
    dataset = data_sets.load(DATA)
    dealt = partition(dataset, dataset.rows(split="train"), expand({"baseline": False})[0].data, 4, 0)
    first, again, other = (plant(dataset, dealt, 2000, seed, "client_dirac")[2] for seed in (0, 0, 1))
    assert abs(first.included.mean() - 0.5) < 4 * 0.5 / 2000**0.5
    assert first.commitment == again.commitment != other.commitment


@pytest.mark.parametrize("engine", ["serial", "processes"])
def test_clients_that_were_planted_move_the_model_along_their_vector(engine: str, tmp_path: Path) -> None:
    found = fedsec.run(
        {"data": {"name": DATA, "canaries": 100, "canary": "client_random"}},
        defense="dp_client:noise_multiplier=0.001", rounds=2,
        clients=3, local_steps=1, engine=engine, device="cpu", baseline=False, out=tmp_path / "run",
    )["cells"][0]["dp_audit"]  # fmt: skip
    assert found["unit"] == "client" and found["canaries"] == 100
    assert found["proven"] > 2  # 50 guesses, all right: 2.2 at a tenth of the error


@pytest.mark.parametrize(
    ("kind", "defense", "says"),
    [
        ("client_dirac", "dp:epsilon=3", "protects a sample"),
        ("dirac", "dp_client:epsilon=8", "protects a client"),
        ("client_dirac", "krum", "weighs or hides"),
        ("client_dirac", "secagg", "weighs or hides"),
    ],
)
def test_canaries_that_cannot_test_the_claim_are_refused_before_training(
    kind: CanaryKind, defense: str, says: str
) -> None:
    """A27."""
    with pytest.raises(ConfigError, match=says):
        federation(kind, 40, defense, clients=4)


def test_a_finer_canary_may_refute_a_claim_for_patients() -> None:
    """Who protects all images of a patient protects each of them; a client is no patient."""
    canaries = federation("dirac", 40).canaries
    assert canaries is not None
    canaries.check_unit("patient")
    with pytest.raises(ConfigError, match="no comparison"):
        canaries.check_unit("client (central)")


def test_an_adversary_that_changes_the_training_is_refused() -> None:
    tables = {
        "data": {"name": DATA, "canaries": 40, "canary": "dirac"},
        "attack": "poisoning",
        "federation": {"clients": 5, "device": "cpu", "engine": "serial"},
        "baseline": False,
    }
    with pytest.raises(ConfigError, match="use another run"):
        assemble(resolve(expand(tables)[0]))


def test_random_directions_that_do_not_fit_are_refused() -> None:
    layout = Layout(("w",), ((10_000_000,),))
    with pytest.raises(ConfigError, match="take dirac"):
        Directions(layout, 20, 0, False).vector(0)
    with pytest.raises(ConfigError, match="one for each"):
        Directions(Layout(("w",), ((10,),)), 20, 0, True).vector(0)


def test_defenses_know_of_the_marks_through_any_wrapper() -> None:
    """A stack of two defenses puts a step around the step: the marks are still found."""
    from fedsec.defense import prescribed

    class Around:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

    model = network()
    step: Any = Around(Around(PlantedStep(model, RECIPE, directions(model, 3, True), 1.0)))
    found = prescribed(step, batch(2)[1])
    assert found is not None and found.tolist() == [True, True] + 6 * [False]
    plain: Any = Around(PlainStep(model, RECIPE))
    assert prescribed(plain, batch(2)[1]) is None and isinstance(Defense(), Defense)
