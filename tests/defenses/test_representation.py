"""Soteria prunes what it says and nothing else; PRECODE draws its code, adds its term, and is quiet elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fedsec.defenses.dp import DPSGD
from fedsec.defenses.representation import (
    Bottleneck,
    Precode,
    Soteria,
    divergence,
    drawing,
    features_to_keep,
)
from torch import Tensor, nn

from fedsec import models
from fedsec.defense import Defense
from fedsec.errors import ConfigError
from fedsec.federation.round import client_update
from fedsec.federation.seats import Seats, Turn
from fedsec.types import FederationPlan, RoundContext
from tests.federation import toy

CTX = RoundContext(0, 1, 2, 0)


def seats(*defenses: Defense, norm: bool = False, **changes: Any) -> Seats:
    model: nn.Module = toy.network(norm)
    for defense in defenses:
        model = defense.prepare_model(model)
    table = toy.seats(model, recipe=toy.recipe(momentum=0.0, **changes))
    plan = FederationPlan(table.recipe, 1, (8,), layout=table.sharing.params)
    table.defenses = tuple(d.calibrate(plan) for d in defenses)
    return table


def upload(table: Seats, ctx: RoundContext = CTX, count: int = 4) -> dict[str, Tensor]:
    """The update of one step on one batch, by tensor."""
    state, (x, y) = toy.state(table), toy.images(count, seed=5)
    turn = Turn(0, state.params, state.buffers, ctx)
    update = client_update(table, turn, x, y, [torch.arange(count)])[0]
    return {n: t.clone() for n, t in table.sharing.params.views(update.delta).items()}


# --- Soteria ----------------------------------------------------------------------------------------------------


def test_the_rule_on_a_linear_map() -> None:
    """r = Wx: ∂r_i/∂x is row i of W, so that the features with the smallest ‖W_i‖/|r_i| go."""
    generator = torch.Generator().manual_seed(0)
    weight, images = torch.randn(20, 12, generator=generator), torch.randn(1, 1, 3, 4, generator=generator)
    ratio = weight.norm(dim=1) / (weight @ images.flatten()).abs()
    images.requires_grad_(True)
    kept = features_to_keep(images.flatten(1) @ weight.T, images, 0.4)
    assert kept.sum() == 12
    assert set(kept.nonzero()[:, 0].tolist()) == set(ratio.argsort()[8:].tolist())


def test_a_batch_counts_each_feature_where_it_is_alive() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    images = torch.tensor([[3.0, 1.0], [-2.0, 1.0]]).view(2, 1, 1, 2).requires_grad_(True)
    # ReLU features (3, 1, 4, 0) and (0, 1, 0, 1): ratios 1/3; 1; √2/4; √2 where alive.
    kept = features_to_keep((images.flatten(1) @ weight.T).relu(), images, 0.5)
    assert kept.tolist() == [0, 1, 0, 1]
    first = torch.tensor([[1.0], [0.0]])  # the last feature is zero in the first image: dead everywhere, pruned last
    kept = features_to_keep((images.flatten(1) @ weight.T).relu() * first, images, 0.75)
    assert kept.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.9])
def test_only_columns_of_the_layers_weight_are_pruned(fraction: float) -> None:
    plain, pruned = upload(seats()), upload(seats(Soteria(fraction)))
    alive = (plain["3.weight"] != 0).any(0)  # features that ReLU has set to zero have an empty column anyway
    gone = (pruned["3.weight"] == 0).all(0) & alive
    assert int(gone.sum()) == min(round(fraction * 256), int(alive.sum()))
    for name, tensor in plain.items():
        expected = tensor.masked_fill(gone, 0) if name == "3.weight" else tensor
        torch.testing.assert_close(pruned[name], expected, rtol=0, atol=1e-8)


def test_a_layer_can_be_named() -> None:
    assert torch.equal(upload(seats(Soteria(0.3, layer="3")))["3.weight"], upload(seats(Soteria(0.3)))["3.weight"])
    with pytest.raises(ConfigError, match=r"layer=0 is no fully connected layer of this model; it has 3"):
        seats(Soteria(0.3, layer="0"))


def test_batch_statistics_are_gathered_once() -> None:
    """The rule reads the step's own forward pass; a second one would move running statistics twice."""
    tables = [seats(norm=True), seats(Soteria(0.3), norm=True)]
    for table in tables:
        upload(table)
    one, two = (dict(t.model.named_buffers()) for t in tables)
    for name in one:
        assert torch.equal(one[name], two[name])


@pytest.mark.parametrize("order", [0, 1])
def test_soteria_and_dp_are_refused_together(order: int) -> None:
    pair: list[Defense] = [Soteria(0.3), DPSGD(noise_multiplier=1.0)]
    with pytest.raises(ConfigError, match="dp"):
        upload(seats(*(pair if order else pair[::-1])))


# --- PRECODE ----------------------------------------------------------------------------------------------------


def test_the_bottleneck_stands_before_the_last_layer() -> None:
    built = models.build("lenet", num_classes=2, in_channels=1, image_size=28, seed=0)
    before = dict(built.named_parameters())
    weight = before["net.fc.weight"].detach().clone()
    model = Precode(size=16).prepare_model(built)
    after = dict(model.named_parameters())
    assert set(after) - set(before) == {
        *(f"net.fc.bottleneck.{layer}.{part}" for layer in ("encode", "decode") for part in ("weight", "bias")),
        "net.fc.linear.weight",
        "net.fc.linear.bias",
    }
    assert torch.equal(after["net.fc.linear.weight"], weight)
    assert after["net.fc.bottleneck.encode.weight"].shape == (32, 588)
    assert model(torch.rand(3, 1, 28, 28)).shape == (3, 2)


def test_first_weights_follow_the_models_seed_and_nothing_global() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed + 100)
        model = models.build("lenet", num_classes=2, in_channels=1, image_size=28, seed=seed)
        torch.manual_seed(torch.initial_seed() + 1)
        before = torch.get_rng_state()
        prepared = Precode(size=16).prepare_model(model)
        assert torch.equal(torch.get_rng_state(), before)
        return prepared.get_parameter("net.fc.bottleneck.encode.weight").detach()

    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))
    assert float(first.abs().max()) <= 588**-0.5
    assert float(first.std()) == pytest.approx((588 * 3) ** -0.5, rel=0.02)


def test_divergence_is_torchs() -> None:
    mean, log_variance = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    code = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(code, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(divergence(mean, log_variance), expected)


def test_the_update_is_that_of_the_drawn_code_and_its_divergence() -> None:
    """The same loss written out once more, with the same draw."""
    table = seats(Precode(size=8, beta=0.3))
    model, (x, y) = copy.deepcopy(table.model), toy.images(4, seed=5)
    sent = upload(table)
    bottleneck, head = model[3].bottleneck, model[3].linear  # type: ignore[union-attr, index]
    mean, log_variance = bottleneck.encode(model[:3](x)).chunk(2, 1)  # type: ignore[index, operator]
    draw = torch.randn(mean.shape, generator=CTX.generator("precode-code"))
    code = mean + (0.5 * log_variance).exp() * draw
    kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
    loss = nn.functional.cross_entropy(head(bottleneck.decode(code)), y) + 0.3 * kl
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(sent[name], -table.recipe.lr * gradient, rtol=1e-4, atol=1e-7)


def test_codes_are_drawn_while_clients_train_in_either_mode_and_nowhere_else() -> None:
    table = seats(Precode(size=8))
    x = toy.images(4, seed=5)[0]
    assert torch.equal(table.model(x), table.model(x))
    with drawing(table.model, torch.Generator().manual_seed(0)):
        assert not torch.equal(table.model(x), table.model(x))
    for mode in ("train", "eval"):
        here = [
            upload(seats(Precode(size=8), mode=mode), RoundContext(0, r, 2, c)) for r, c in ((1, 0), (2, 0), (1, 1))
        ]
        assert not torch.equal(here[0]["0.weight"], here[1]["0.weight"])
        assert not torch.equal(here[0]["0.weight"], here[2]["0.weight"])
    again = copy.deepcopy(table.model)  # nothing of a training step is left in the model
    assert all(m.generator is None and m.terms is None for m in again.modules() if isinstance(m, Bottleneck))


@pytest.mark.parametrize("order", [0, 1])
def test_precode_and_dp_work_together(order: int) -> None:
    """Images keep their own gradients: with next to no noise and clipping, DP-SGD is the plain step, scaled."""
    quiet = DPSGD(noise_multiplier=1e-9, clip=1e3)
    pair: list[Defense] = [Precode(size=8), quiet]
    private, plain = upload(seats(*(pair if order else pair[::-1])), count=8), upload(seats(Precode(size=8)), count=8)
    for name, tensor in plain.items():
        torch.testing.assert_close(private[name], tensor, rtol=1e-3, atol=1e-5)
