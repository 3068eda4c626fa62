"""φ must equal what a real client sends, through every step that the attack claims to know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fedsec.attacks.gradinversion.observation import Observation, observe
from fedsec.attacks.gradinversion.prior import Prior
from fedsec.attacks.gradinversion.simulation import frozen_copy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsec import plugins
from fedsec.findings import PublicData

from . import cases, defended


def relative(observation: Observation, x: Tensor, y: Tensor) -> float:
    simulated = observation.simulation.flat(x, y) * observation.weights
    return float((simulated - observation.gradient * observation.weights).norm()) / observation.norm


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (1, {}),
        (3, {}),
        (1, {"momentum": 0.9, "weight_decay": 0.01}),
        (1, {"lr": 0.1, "steps": 3}),
        (4, {"lr": 0.1, "steps": 2, "batch_size": 2}),
        (5, {"lr": 0.1, "steps": 4, "batch_size": 2, "momentum": 0.9, "weight_decay": 0.05}),
        (3, {"mode": "train"}),
    ],
)
def test_simulation_equals_the_upload_of_torch_sgd(blob_prior: Prior, count: int, changes: dict[str, Any]) -> None:
    model, data = cases.small_cnn(), cases.blobs(count, seed=1)
    observation = cases.observation_of(model, data.images, data.labels, blob_prior, cases.recipe(**changes))
    # Rounding of the stored parameters, about 6e-8 of them, divided by what a step moves them.
    assert relative(observation, data.images, data.labels) < 2e-5


def test_single_upload_matches_to_a_millionth(blob_prior: Prior) -> None:
    model, data = cases.lenet(shape=(1, 16, 16)), cases.blobs(2, seed=1)
    observation = cases.observation_of(model, data.images, data.labels, blob_prior)
    assert relative(observation, data.images, data.labels) < 1e-6


def test_train_mode_uses_batch_moments_and_differs_from_eval_mode(blob_prior: Prior) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
    model, data, plan = cases.Normalised(net), cases.blobs(3, seed=1), cases.recipe(mode="train")
    view = cases.view_of(model, cases.upload(model, data.images, data.labels, plan), 3, plan)
    shape = tuple(data.images.shape[1:])
    right = observe(view, model, blob_prior, shape)
    wrong = observe(view, model, blob_prior, shape, mode="eval")
    assert relative(right, data.images, data.labels) < 1e-5
    assert relative(wrong, data.images, data.labels) > 1e-2


def test_copy_leaves_running_statistics_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5)).train()
    before = model[0].running_mean.clone()
    twin = frozen_copy(model, "train")
    twin(torch.rand(4, 1, 8, 8))
    assert torch.equal(model[0].running_mean, before)
    assert not twin[1].training  # the client's dropout draw is unknown


def sample_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    rows = []
    for i in range(len(x)):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        rows.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    return rows


def test_dp_sgd_sum_of_clipped_gradients(blob_prior: Prior) -> None:
    """Abadi et al. 2016, without noise: (1/L)·Σ g_i·min(1, C/‖g_i‖), worked out image by image."""
    model, data, lr, divisor = cases.small_cnn(), cases.blobs(3, seed=1), 0.1, 16.0
    rows = sample_gradients(model, data.images, data.labels)
    clip = sorted(float(r.norm()) for r in rows)[1]  # two of three are clipped or on the edge
    total = torch.stack([r * min(1.0, clip / float(r.norm())) for r in rows]).sum(0)
    known = {"dp": {"clip_norm": clip, "clip_scope": "sample", "noise_multiplier": 0.5, "batch_divisor": divisor}}
    plan = cases.recipe(lr=lr)
    view = cases.view_of(model, -lr * total / divisor, 3, plan, knowledge=known)
    observation = observe(view, model, blob_prior, (1, 16, 16))
    assert relative(observation, data.images, data.labels) < 1e-5
    assert observation.noise_std == pytest.approx(0.5 * clip)  # noise on the sum, in the sum's units
    assert torch.allclose(observation.gradient, total, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_update_clipping(blob_prior: Prior, order: int) -> None:
    model, data, plan = cases.small_cnn(), cases.blobs(2, seed=1), cases.recipe(lr=0.1)
    delta = cases.upload(model, data.images, data.labels, plan)
    clip = 0.25 * float(delta.norm(order))
    known = {"gaussian": {"clip_norm": clip, "clip_scope": "update", "clip_order": order}}
    view = cases.view_of(model, 0.25 * delta, 2, plan, knowledge=known)
    assert relative(observe(view, model, blob_prior, (1, 16, 16)), data.images, data.labels) < 2e-5
    naive = observe(view, model, blob_prior, (1, 16, 16), adaptive=False)
    assert relative(naive, data.images, data.labels) == pytest.approx(3, rel=1e-3)  # four times too long


def test_multilabel_loss_leaves_unknown_labels_out(blob_prior: Prior, blobs: PublicData) -> None:
    model, x = cases.small_cnn(classes=3), cases.blobs(2, seed=1).images
    y = torch.tensor([[1.0, float("nan"), 0.0], [0.0, 1.0, 1.0]])
    logits = model(x)
    known = ~y.isnan()
    loss = nn.functional.binary_cross_entropy_with_logits(logits[known], y[known])
    grads = torch.autograd.grad(loss, list(model.parameters()))
    plan = cases.recipe(task="multilabel", num_classes=3)
    delta = -torch.cat([g.reshape(-1) for g in grads])
    observation = observe(cases.view_of(model, delta, 2, plan), model, blob_prior, (1, 16, 16))
    assert relative(observation, x, y) < 1e-6


def test_differentiable_through_an_all_zero_clipped_gradient(blob_prior: Prior) -> None:
    model = cases.small_cnn()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    data = cases.blobs(1, seed=1)
    known = {"dp": {"clip_norm": 1.0, "clip_scope": "sample"}}
    view = cases.view_of(
        model, torch.zeros(sum(p.numel() for p in model.parameters())), 1, cases.recipe(), knowledge=known
    )
    observation = observe(view, model, blob_prior, (1, 16, 16))
    x = data.images.clone().requires_grad_(True)
    observation.simulation.flat(x, data.labels).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


STACKS = {
    "none": 3,
    "gaussian:clip=0.5,sigma=0": 3,
    "laplace:clip=100,sigma=0": 3,
    "dp:clip=5,noise_multiplier=1e-12": 3,
    "topk:fraction=0.2": 3,
    "gaussian:clip=0.5,sigma=0+topk:fraction=0.2": 3,
    "soteria:fraction=0.4": 3,
    # Whatever is drawn behind it, one image's gradients in front of the bottleneck follow from its own bias gradient.
    "precode:size=16": 1,
    "precode:size=16,beta=1+gaussian:clip=0.5,sigma=0": 1,
}
"""Defenses without their noise, and the largest batch for which nothing that they do is unknown."""


@pytest.mark.parametrize("word", STACKS)
@settings(deadline=None, max_examples=4)
@given(data=st.data())
def test_the_true_batch_explains_what_was_sent(word: str, data: st.DataObject) -> None:
    """φ(x, y) = g through the hooks of a real round, for whatever was sent and can be known."""
    seed = data.draw(st.integers(1, 1000), label="seed")
    count = data.draw(st.integers(1, STACKS[word]), label="images")
    shape, batch = (1, 16, 16), cases.blobs(count, seed=seed)
    defenses = tuple(plugins.build("defenses", spec) for spec in plugins.parse_stack(word))
    model = defended.prepared(cases.lenet(shape=shape, seed=seed), defenses)
    y = cases.unlikely(model, batch.images)  # gradients far above the rounding of the parameters
    table = defended.seats_of(model, defenses, cases.recipe(), size=1)
    observation = observe(defended.view_of(table, [(batch.images, y)], seed=seed), model, PRIOR, shape)
    # Where clipping has made the update small, the rounding of the parameters is coarser than a millionth of it.
    assume(observation.relative_floor < 1e-5)  # a drawn code may leave next to no loss
    # An L1 norm adds up all entries in float32, in an order that is not ours.
    exact = 5e-6 if word.startswith("laplace") else 1e-6
    assert relative(observation, batch.images, y) < max(exact, 2 * observation.relative_floor)


PRIOR = cases.prior_of(cases.blobs(64))


def test_the_divergence_of_a_bottleneck_is_part_of_the_loss() -> None:
    """Several images: the draws are unknown, but where none is made, φ is exact with its term and wrong without it."""
    (defense,) = (plugins.build("defenses", plugins.PluginSpec("precode", {"size": 16, "beta": 0.5})),)
    model, batch = defended.prepared(cases.lenet(shape=(1, 16, 16)), (defense,)), cases.blobs(3, seed=1)
    view = defended.view_of(defended.seats_of(model, (), cases.recipe()), [(batch.images, batch.labels)])
    observation = observe(view, model, PRIOR, (1, 16, 16))
    assert relative(observation, batch.images, batch.labels) < 1e-6
    model.net[7].bottleneck.beta = 0.0  # type: ignore[union-attr, index]
    assert relative(observe(view, model, PRIOR, (1, 16, 16)), batch.images, batch.labels) > 1e-3


def test_plain_autograd_gives_the_same_where_the_simulation_stops_early() -> None:
    """Parameters behind the stop have gradient zero in either way of differentiating."""
    (defense,) = (plugins.build("defenses", plugins.PluginSpec("precode", {"size": 16})),)
    model, batch = defended.prepared(cases.lenet(shape=(1, 16, 16)), (defense,)), cases.blobs(1, seed=1)
    view = defended.view_of(defended.seats_of(model, (defense,), cases.recipe()), [(batch.images, batch.labels)])
    observation = observe(view, model, PRIOR, (1, 16, 16))
    one = observation.simulation.flat(batch.images, batch.labels)
    two = observation.eager.simulation.flat(batch.images, batch.labels)
    torch.testing.assert_close(one, two.detach(), rtol=1e-5, atol=1e-6)
    assert not one[observation.weights == 0].any()
