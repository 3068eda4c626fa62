"""DP-SGD: calibration over the whole run, and what a private step really releases (pitfalls P1 to P13)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from fedsec.defenses.dp import DPSGD
from fedsec.defenses.dp_step import PrivateStep
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from fedsec import models, plugins
from fedsec.errors import ConfigError, RefusedError, RunError
from fedsec.federation.local import PlainStep
from fedsec.models.base import Normalised
from fedsec.privacy.accounting import Gaussian, compose
from fedsec.types import FederationPlan, LocalRecipe, RoundContext, Update

LR = 0.5
SIDE = 16


def recipe(**changes: object) -> LocalRecipe:
    base = LocalRecipe("multiclass", 2, LR, momentum=0.0, weight_decay=0.0, batch_size=8, epochs=1, steps=None)
    return replace(base, **changes)


def plan(sizes: tuple[int, ...] = (40,), rounds: int = 5, **changes: object) -> FederationPlan:
    return FederationPlan(recipe(**changes), rounds, sizes)


def network(name: str = "cnn") -> Normalised:
    return models.build(name, num_classes=2, in_channels=1, image_size=SIDE)


def private_step(defense: DPSGD, model: nn.Module, the_plan: FederationPlan, seed: int = 0) -> PrivateStep:
    step = defense.calibrate(the_plan).local_step(PlainStep(model, the_plan.recipe), RoundContext(seed, 1, 5, 0))
    assert isinstance(step, PrivateStep)
    return step


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def released(defense: DPSGD, x: Tensor, y: Tensor, model: nn.Module | None = None, seed: int = 0) -> Tensor:
    """What one plain SGD step at learning rate LR reveals: (clipped sum + noise) / divisor."""
    model = network() if model is None else model
    before = flat(model)
    private_step(defense, model, plan(), seed)(x, y)
    return (before - flat(model)) / LR


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, SIDE, SIDE, generator=generator), torch.randint(0, 2, (count,), generator=generator)


WEAK = DPSGD(noise_multiplier=1e-7)
"""Noise below every tolerance here: what is left is the clipped sum."""


# --- the budget ---------------------------------------------------------------------------------------------------


def test_the_budget_covers_all_rounds_with_each_clients_own_size() -> None:
    """P1, P2."""
    the_plan = plan((400, 100), rounds=10, batch_size=32)
    defense = DPSGD(epsilon=4.0).calibrate(the_plan)
    claim = defense.privacy()
    assert claim is not None
    assert claim.delta == 1e-5
    assert (claim.unit, claim.accountant) == ("sample", "prv")
    for client, (q, steps) in enumerate([(32 / 400, 13), (32 / 100, 4)]):
        schedule = defense.schedules[client]
        assert (schedule.q, schedule.steps, schedule.rounds) == (q, steps, 10)
        whole = compose([Gaussian(schedule.noise_multiplier, q, steps * 10)], 1e-5).epsilon
        assert 3.96 < whole <= 4.0
        assert claim.per_client[client] == whole
    assert defense.schedules[1].noise_multiplier > 1.5 * defense.schedules[0].noise_multiplier


def test_the_specifications_hospital() -> None:
    """n = 1,000, batches of 64, 50 rounds, z = 1.1: ε = 10.81 at q = 0.064."""
    claim = DPSGD(noise_multiplier=1.1).calibrate(plan((1000,), rounds=50, batch_size=64)).privacy()
    assert claim is not None
    assert claim.epsilon == pytest.approx(10.81, abs=0.02)


def test_shuffled_batches_need_an_assumption_and_show_both_numbers() -> None:
    """P3: 47.31 is the exact ε of 50 epochs without amplification."""
    with pytest.raises(RefusedError, match="assume_poisson=true"):
        DPSGD(sampler="shuffle")
    defense = DPSGD(noise_multiplier=1.1, sampler="shuffle", assume_poisson=True)
    the_plan = plan((1000,), rounds=50, batch_size=64)
    claim = defense.calibrate(the_plan).privacy()
    assert claim is not None
    assert claim.epsilon == pytest.approx(10.81, abs=0.02)
    assert "this run shuffled" in claim.assumptions[0]
    assert claim.assumptions[0].endswith("without amplification epsilon is 47.31")
    batches = list(private_step(defense, network(), the_plan).batches(1000, RoundContext(0, 1, 5, 0)))
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(1000))


def test_a_batch_of_everything_is_accounted_exactly() -> None:
    defense = DPSGD(epsilon=3.0).calibrate(plan((20,), rounds=50, batch_size=32))
    claim = defense.privacy()
    assert claim is not None
    assert (defense.schedules[0].q, defense.schedules[0].expected_batch, claim.accountant) == (1.0, 20.0, "gdp")
    assert claim.epsilon == pytest.approx(3.0, abs=1e-6)


def test_delta_follows_the_largest_client_and_is_never_above_one_image() -> None:
    """P12."""
    assert DPSGD(noise_multiplier=1.0).calibrate(plan((50_000, 20))).delta == 1 / 500_000
    with pytest.raises(RefusedError, match=r"delta=0\.03 is not below 1/40"):
        DPSGD(delta=0.03).calibrate(plan((40, 10)))


def test_clipping_without_noise_is_not_called_private() -> None:
    """P13."""
    with pytest.raises(RefusedError, match="clips without noise"):
        DPSGD(noise_multiplier=0.0)
    with pytest.raises(RefusedError, match="clips without noise"):
        plugins.build("defenses", plugins.PluginSpec.parse("dp:noise_multiplier=0"))
    with pytest.raises(ConfigError, match="epsilon"):
        plugins.build("defenses", plugins.PluginSpec.parse("dp:epsilon=0"))
    with pytest.raises(ConfigError, match="client 1 has no images"):
        DPSGD().calibrate(plan((40, 0)))


def test_claims_and_steps_need_a_plan() -> None:
    assert DPSGD().privacy() is None
    with pytest.raises(RunError, match="calibrate"):
        DPSGD().local_step(PlainStep(network(), recipe()), RoundContext(0, 1, 5, 0))


def test_the_adversary_knows_everything_but_the_noise() -> None:
    defense = DPSGD(noise_multiplier=1.5, clip=0.7).calibrate(plan((40, 6)))
    assert defense.public_knowledge(0) == {
        "clip_norm": 0.7,
        "clip_scope": "sample",
        "clip_order": 2,
        "noise": "gaussian",
        "noise_multiplier": 1.5,
        "batch_divisor": 8.0,
    }
    assert defense.public_knowledge(1)["batch_divisor"] == 6.0
    assert "noise_multiplier" not in defense.public_knowledge(-1)


def test_buffers_do_not_travel_beside_noised_updates() -> None:
    update = Update(0, torch.zeros(3), 10, buffers=torch.ones(2))
    with pytest.raises(RefusedError, match="2 buffer values without noise"):
        DPSGD().on_upload(update, RoundContext(0, 1, 5, 0))


# --- batches ------------------------------------------------------------------------------------------------------


def test_poisson_batches_have_the_rate_that_the_accountant_was_told() -> None:
    """P2: inclusion is independent with q = batch/n; batch sizes are binomial."""
    the_plan = plan((100,), batch_size=8, epochs=None, steps=4000)
    step = private_step(DPSGD(noise_multiplier=1.0), network("lenet"), the_plan)
    batches = list(step.batches(100, RoundContext(0, 1, 5, 0)))
    assert len(batches) == 4000
    counts = torch.stack([torch.bincount(b, minlength=100) for b in batches])
    assert counts.max() == 1
    sizes = counts.sum(1).double()
    # Binomial(100, 0.08): mean 8, variance 7.36; four standard errors.
    assert sizes.mean().item() == pytest.approx(8, abs=4 * math.sqrt(7.36 / 4000))
    assert sizes.var().item() == pytest.approx(7.36, rel=0.1)
    per_image = counts.sum(0).numpy()
    assert stats.chisquare(per_image).pvalue > 1e-4
    together = (counts[:, 0] * counts[:, 1]).double().mean().item()
    assert together == pytest.approx(0.08**2, abs=4 * math.sqrt(0.08**2 / 4000))


def test_batches_follow_the_epochs_of_the_plan_and_the_seed() -> None:
    the_plan = plan((20,), batch_size=8, epochs=3)
    draws = [
        [b.tolist() for b in private_step(DPSGD(noise_multiplier=1.0), network(), the_plan, seed).batches(20, None)]
        for seed in (0, 0, 1)
    ]
    assert len(draws[0]) == 3 * 3
    assert draws[0] == draws[1] != draws[2]


# --- one step -----------------------------------------------------------------------------------------------------


def clipped_sum(model: nn.Module, x: Tensor, y: Tensor, clip: float) -> Tensor:
    """Abadi et al. 2016, algorithm 1, image by image."""
    total = torch.zeros_like(flat(model))
    for image, label in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(model(image[None]), label[None])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        total += gradient * min(1.0, clip / gradient.norm().item())
    return total


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("clip", [0.3, 1e4])
def test_the_step_is_the_clipped_sum_over_the_expected_batch(
    mode: str, memory: torch.memory_format, clip: float
) -> None:
    """P4, P7: one bound over all tensors, and a constant divisor."""
    x, y = images(5)
    expected = clipped_sum(network(), x, y, clip) / 8
    model = network().to(memory_format=memory).train(mode == "train")
    result = released(DPSGD(noise_multiplier=1e-9, clip=clip), x.to(memory_format=memory), y, model)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.0, 1.0, 1e3]), clip=st.floats(0.01, 2.0))
def test_one_more_image_changes_the_sum_by_at_most_the_clip_norm(seed: int, scale: float, clip: float) -> None:
    """P7: the sensitivity that the accountant stands on, for any data."""
    x, y = images(4, seed)
    x[3] *= scale
    defense = DPSGD(noise_multiplier=1e-9, clip=clip)
    model = network("lenet")
    with_it = released(defense, x, y, copy.deepcopy(model)).double() * 8
    without = released(defense, x[:3], y[:3], copy.deepcopy(model)).double() * 8
    assert (with_it - without).norm().item() <= clip * (1 + 1e-5)


def test_noise_of_the_sum_is_multiplier_times_clip() -> None:
    """P8: 57,218 draws on an empty batch, where nothing else is released."""
    empty = torch.zeros(0, 1, SIDE, SIDE), torch.zeros(0, dtype=torch.long)
    noise = released(DPSGD(noise_multiplier=1.7, clip=0.4), *empty) * 8
    assert noise.std().item() == pytest.approx(1.7 * 0.4, rel=0.03)
    assert abs(noise.mean().item()) < 4 * 1.7 * 0.4 / math.sqrt(len(noise))
    assert stats.kstest(noise[:5000].numpy() / 0.68, "norm").pvalue > 1e-4


@pytest.mark.parametrize("size", [0, 1, 8, 16])
def test_the_divisor_ignores_the_batch_that_was_drawn(size: int) -> None:
    """P4."""
    x, y = images(size)
    result = released(DPSGD(noise_multiplier=2.0, clip=0.1), x, y)
    assert result.std().item() == pytest.approx(2.0 * 0.1 / 8, rel=0.05)


def test_an_empty_batch_moves_the_weights_and_costs_nothing_else() -> None:
    model = network()
    step = private_step(DPSGD(noise_multiplier=1.0), model, plan())
    before = flat(model)
    loss = step(torch.zeros(0, 1, SIDE, SIDE), torch.zeros(0, dtype=torch.long))
    assert loss.item() == 0.0
    assert (flat(model) - before).norm() > 0
    assert torch.isfinite(step(*images(3)))


def test_large_batches_in_pieces_are_one_step() -> None:
    x, y = images(11)
    whole = released(WEAK, x, y)
    noise = released(DPSGD(noise_multiplier=1.0), x, y)
    small = {"engine": "hooks", "max_memory": 16e-9 * len(whole)}
    assert private_step(replace(WEAK, **small), network(), plan())._engine.piece == 4
    torch.testing.assert_close(released(replace(WEAK, **small), x, y), whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(released(DPSGD(noise_multiplier=1.0, **small), x, y), noise, rtol=1e-4, atol=1e-5)


def test_the_returned_loss_is_the_mean_over_the_batch() -> None:
    x, y = images(7)
    model = network()
    expected = nn.functional.cross_entropy(model(x), y).item()
    assert private_step(WEAK, model, plan())(x, y).item() == pytest.approx(expected, rel=1e-5)


def test_momentum_is_post_processing() -> None:
    """Two steps with momentum m: the first noised gradient enters again, m times."""
    x, y = images(6)
    empty = x[:0], y[:0]
    the_plan = plan(momentum=0.9)
    model = network()
    step = private_step(DPSGD(noise_multiplier=1.0), model, the_plan)
    start = flat(model)
    step(x, y)
    first = (start - flat(model)) / LR
    second_start = flat(model)
    step(*empty)
    second = (second_start - flat(model)) / LR
    residual = second - 0.9 * first
    assert residual.std().item() == pytest.approx(1 / 8, rel=0.03)
    assert torch.corrcoef(torch.stack([residual, first]))[0, 1].abs() < 0.03


def test_repeated_rounds_leave_no_hooks_and_no_prefixes() -> None:
    model = network()
    names = list(model.state_dict())
    for number in range(4):
        step = (
            DPSGD(noise_multiplier=1.0)
            .calibrate(plan())
            .local_step(PlainStep(model, recipe()), RoundContext(0, number, 5, 0))
        )
        step(*images(4))
    assert list(model.state_dict()) == names
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_seeded_noise_is_reproducible_and_system_noise_is_not() -> None:
    """P8, and 3.10 of the specification."""
    x, y = images(4)
    defense = DPSGD(noise_multiplier=1.0)
    assert torch.equal(released(defense, x, y), released(defense, x, y))
    assert not torch.equal(released(defense, x, y), released(defense, x, y, seed=1))
    system = DPSGD(noise_multiplier=1.0, secure_rng=True)
    assert not torch.equal(released(system, x, y), released(system, x, y))

    def sampled(d: DPSGD) -> Iterator[list[int]]:
        return (b.tolist() for b in private_step(d, network(), plan((200,))).batches(200, RoundContext(0, 1, 5, 0)))

    assert list(sampled(defense)) == list(sampled(defense))
    assert list(sampled(system)) != list(sampled(system))
    for d, words in ((defense, "anybody with the seed"), (system, "not reproducible")):
        claim = d.calibrate(plan()).privacy()
        assert claim is not None
        assert any(words in text for text in claim.assumptions)


def test_noise_is_fresh_in_every_round_and_client() -> None:
    empty = torch.zeros(0, 1, SIDE, SIDE), torch.zeros(0, dtype=torch.long)
    defense = DPSGD(noise_multiplier=1.0).calibrate(plan((40, 40)))
    draws = []
    for ctx in (RoundContext(0, 1, 5, 0), RoundContext(0, 2, 5, 0), RoundContext(0, 1, 5, 1)):
        model = network()
        before = flat(model)
        step = defense.local_step(PlainStep(model, recipe()), ctx)
        for _ in range(2):
            step(*empty)
            draws.append(before - flat(model))
            before = flat(model)
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(6)
    assert correlations.abs().max() < 0.03


def test_unknown_labels_are_refused() -> None:
    x, _ = images(3)
    y = torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [1.0, 1.0]])
    step = private_step(WEAK, network(), plan(task="multilabel"))
    with pytest.raises(RefusedError, match="unknown labels"):
        step(x, y)
    assert torch.isfinite(step(x, torch.nan_to_num(y)))


def test_batch_norm_is_replaced_and_trains_privately() -> None:
    """P5."""
    model = models.build("resnet18", num_classes=2, in_channels=1, image_size=SIDE, norm="batch")
    names = [name for name, _ in model.named_parameters()]
    prepared = DPSGD().prepare_model(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in prepared.modules())
    assert [name for name, _ in prepared.named_parameters()] == names
    assert torch.isfinite(released(DPSGD(noise_multiplier=1.0), *images(2), model=prepared)).all()
