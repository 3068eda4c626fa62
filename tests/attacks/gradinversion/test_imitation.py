"""Can the attacker imitate what a client minimises under each strategy? Held against real uploads, given the truth."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attacks.gradinversion.observation import Observation, observe
from attacks.gradinversion.prior import fit_prior
from fedsec.config import Cell, FederationConfig, ModelConfig
from fedsec.experiment import open_stage, public_data
from fedsec.federation import victims
from fedsec.federation.assemble import resolve
from fedsec.findings import VictimPlan
from fedsec.types import ServerView

ROUND = 2


def seen(
    strategy: str, tmp_path: Path, batch: int = 1, steps: int = 1, number: int = ROUND, **changes: str
) -> tuple[list[ServerView], list, Observation]:
    """Views of two victims in the second of two rounds (or in `number`), the truth, and the first one's observation."""
    base = Cell()
    cell = resolve(
        replace(
            base,
            data=replace(base.data, name="synthetic-cxr:images=240"),
            model=ModelConfig(name="cnn", norm=changes.get("norm", "group")),  # type: ignore[arg-type]
            federation=FederationConfig(clients=3, rounds=ROUND, strategy=strategy, engine="serial"),
        )
    )
    stage = open_stage(cell, tmp_path, keep=(number,))
    plan = VictimPlan((number,), 2 * batch, batch, local_steps=steps)
    views, truths = victims.observe(stage.federation, stage.training, plan)
    public = public_data(stage.federation, truths)
    model = stage.federation.build_model()
    return views, truths, observe(views[0], model, fit_prior(public), stage.federation.dataset.image_shape)


def error(observation: Observation, truth: victims.Victim, plain: bool = False) -> float:
    """How far the simulated upload of the true images is from the real one, relatively."""
    simulation = observation.simulation
    simulation = replace(simulation, loss_of=None) if plain else simulation
    simulated = simulation.flat(truth.images, truth.labels)
    return float((simulated - observation.gradient).norm() / observation.gradient.norm())


@pytest.mark.parametrize("strategy", ["dann", "moon", "focal", "feature_stats"])
def test_losses_that_the_server_knows_are_imitated_exactly(strategy: str, tmp_path: Path) -> None:
    _, truths, observation = seen(strategy, tmp_path, batch=2)
    assert error(observation, truths[0]) < 1e-4
    assert error(observation, truths[0], plain=True) > 10 * error(observation, truths[0])
    assert any("strategy's loss is simulated" in note for note in observation.notes)


@pytest.mark.parametrize("strategy", ["pfedme:lam=15", "fedprox:mu=5"])
def test_pulls_and_repeated_steps_are_imitated_exactly(strategy: str, tmp_path: Path) -> None:
    _, truths, observation = seen(strategy, tmp_path, steps=3 if "prox" in strategy else 1)
    assert observation.simulation.steps == (3 if "prox" in strategy else 5)
    assert error(observation, truths[0]) < 1e-3
    free = replace(observation, simulation=replace(observation.simulation, pull=0.0))
    assert error(free, truths[0]) > 10 * error(observation, truths[0])


@pytest.mark.parametrize("rates", ["1", "0.5"])
def test_a_slice_is_attacked_as_the_network_it_is(rates: str, tmp_path: Path) -> None:
    views, truths, observation = seen(f"heterofl:rates={rates}", tmp_path)
    assert (len(observation.gradient) < len(views[0].params)) == (rates != "1")
    assert error(observation, truths[0]) < 1e-4


@pytest.mark.parametrize("strategy", ["ekd", "fedmas"])
def test_a_random_teacher_is_everybodys(strategy: str, tmp_path: Path) -> None:
    _, truths, observation = seen(strategy, tmp_path, batch=4, norm="batch")
    assert error(observation, truths[0]) < 0.3 < error(observation, truths[0], plain=True)


@pytest.mark.parametrize("strategy", ["bsm", "ldam", "cb", "fedslid", "ekd"])
def test_one_image_needs_no_class_counts(strategy: str, tmp_path: Path) -> None:
    """They are the client's secret, and act on the slope at the logits alone, which the bias shows."""
    _, truths, observation = seen(strategy, tmp_path)
    assert error(observation, truths[0]) < 1e-4


@pytest.mark.parametrize("strategy", ["ldam", "fedslid"])
def test_for_batches_class_counts_are_those_of_public_images(strategy: str, tmp_path: Path) -> None:
    _, truths, observation = seen(strategy, tmp_path, batch=4)
    assert error(observation, truths[0]) < error(observation, truths[0], plain=True) < 0.5


def test_a_victim_counts_all_of_its_clients_images(tmp_path: Path) -> None:
    """With counts of one image, balanced softmax has no gradient left, and nothing would seem to leak."""
    views, _, observation = seen("bsm", tmp_path)
    assert observation.norm > 1e-2
    assert views[0].updates[0].num_samples == 1


def test_the_tasks_own_loss_needs_no_imitation(tmp_path: Path) -> None:
    views, truths, observation = seen("fedavg", tmp_path)
    assert views[0].imitation is None and observation.simulation.loss_of is None
    assert error(observation, truths[0]) < 1e-4


def test_an_imitation_travels_and_holds_no_secret(tmp_path: Path) -> None:
    views, truths, _ = seen("moon", tmp_path)
    imitation = pickle.loads(pickle.dumps(views[0].imitation))
    assert set(imitation.remembered) == {"previous", "previous_buffers"}
    assert imitation.ctx.client == truths[0].client and imitation.ctx.round == ROUND
    assert imitation.ctx.seed != imitation.ctx.origin == 0  # its draws are not the client's


@pytest.mark.parametrize("strategy", ["dann", "ldam"])
def test_it_can_be_differentiated_in_every_way_that_attacks_do(strategy: str, tmp_path: Path) -> None:
    _, truths, observation = seen(strategy, tmp_path)
    x, y = truths[0].images, truths[0].labels

    def square(images: torch.Tensor, eager: bool = False) -> torch.Tensor:
        return (observation.eager if eager else observation).simulation.flat(images, y).square().sum()

    gradient = torch.func.grad(square)(x)
    leaf = x.clone().requires_grad_(True)
    (eager,) = torch.autograd.grad(square(leaf, eager=True), leaf)
    assert torch.allclose(gradient, eager, rtol=1e-3, atol=1e-6 * float(gradient.abs().max()))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    _, forward = torch.func.jvp(square, (x,), (direction,))
    assert float(forward) == pytest.approx(float((gradient * direction).sum()), rel=1e-2)
    both = torch.func.vmap(torch.func.grad(square))(torch.stack([x, x.flip(-1)]))
    assert torch.allclose(both[0], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
    double = observation.simulation.double
    assert double.flat(x.double(), y).dtype == torch.float64


@pytest.mark.parametrize("strategy", ["partial", "siteaware_gnn"])
def test_no_clients_own_head_reaches_an_attacker(strategy: str, tmp_path: Path) -> None:
    """It is told the head of the first round, when everybody's is public, and no later one."""
    _, truths, observation = seen(strategy, tmp_path, number=1)
    assert error(observation, truths[0]) < 1e-4
    _, truths, observation = seen(strategy, tmp_path, number=2)
    assert error(observation, truths[0]) > 0.01


def test_images_of_nobody_join_the_clients_own(tmp_path: Path) -> None:
    cell = resolve(replace(Cell(), federation=FederationConfig(clients=3, rounds=1, engine="serial")))
    stage = open_stage(cell, tmp_path, keep=(1,))
    views, truths = victims.observe(stage.federation, stage.training, VictimPlan((1,), 2, 1, split="test"))
    owned = stage.federation.rows[truths[0].client]
    assert not set(truths[0].rows) & set(owned)
    assert views[0].updates[0].num_samples == 1
    model = stage.federation.build_model()
    prior = fit_prior(public_data(stage.federation, truths))
    assert error(observe(views[0], model, prior, stage.federation.dataset.image_shape), truths[0]) < 1e-4
