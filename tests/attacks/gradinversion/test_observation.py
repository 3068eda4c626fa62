"""From a view to g: units, noise, masks, sums, and what the adversary must not see."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from fedsec.attacks.gradinversion.candidate import Candidate
from fedsec.attacks.gradinversion.certificate import assess
from fedsec.attacks.gradinversion.observation import Observation, observe
from fedsec.attacks.gradinversion.prior import Prior

from fedsec import plugins
from fedsec.defense import Defense
from fedsec.types import RoundContext

from . import cases, defended

SHAPE = (1, 16, 16)


def test_no_field_could_hold_the_truth() -> None:
    names = {f.name for f in dataclasses.fields(Observation)}
    assert not names & {"truth", "images", "original", "x", "target"}


def test_a_flipped_sign_is_detected(blob_prior: Prior) -> None:
    model, data, plan = cases.lenet(shape=SHAPE), cases.blobs(1, seed=1), cases.recipe()
    delta = cases.upload(model, data.images, data.labels, plan)
    wrong = observe(cases.view_of(model, -delta, 1, plan), model, blob_prior, SHAPE)
    checked = assess(Candidate(data.images, data.labels, "test"), wrong)
    assert checked.kappa == pytest.approx(-1, abs=1e-4)
    assert any("sign" in note for note in checked.notes)
    assert checked.certified == 0


def test_rounding_floor_has_the_size_of_real_rounding(blob_prior: Prior) -> None:
    """The floor against the float32 update of a client whose exact float64 gradient is known."""
    model, data = cases.lenet(shape=SHAPE), cases.blobs(1, seed=1)
    plan = cases.recipe(lr=0.003)
    observation = cases.observation_of(model, data.images, data.labels, blob_prior, plan)
    exact = observation.simulation.double.flat(data.images.double(), data.labels)
    ratio = float((observation.gradient - exact).norm() / observation.floor.norm())
    assert 0.7 < ratio < 1.4


def test_update_noise_is_divided_by_what_a_step_moves(blob_prior: Prior) -> None:
    model, plan = cases.lenet(shape=SHAPE), cases.recipe(lr=0.5, steps=4)
    size = sum(p.numel() for p in model.parameters())
    known = {"gaussian": {"noise": "gaussian", "noise_std": 0.2}, "laplace": {"noise": "laplace", "noise_std": 0.1}}
    view = cases.view_of(model, torch.ones(size), 1, plan, knowledge=known)
    observation = observe(view, model, blob_prior, SHAPE)
    assert observation.noise_std == pytest.approx((0.2**2 + 0.1**2) ** 0.5 / 2)
    assert observation.noise == "laplace"
    assert observe(view, model, blob_prior, SHAPE, adaptive=False).noise_std == 0


def test_dp_sgd_noise_averages_over_steps_and_clients(blob_prior: Prior) -> None:
    model = cases.lenet(shape=SHAPE)
    size = sum(p.numel() for p in model.parameters())
    known = {"dp": {"clip_norm": 2.0, "clip_scope": "sample", "noise_multiplier": 1.5, "batch_divisor": 8.0}}
    view = cases.view_of(model, torch.ones(size), 0, cases.recipe(steps=4), knowledge=known, clients=9)
    assert observe(view, model, blob_prior, SHAPE).noise_std == pytest.approx(3.0 / 2 / 3)


def test_a_hidden_sum_is_one_batch_of_all_clients(blob_prior: Prior) -> None:
    """The mean of equally weighted clients' gradients is the gradient of their joint batch."""
    model, plan = cases.lenet(shape=SHAPE), cases.recipe(batch_size=2)
    data = cases.blobs(6, seed=1)
    deltas = [cases.upload(model, data.images[i : i + 2], data.labels[i : i + 2], plan) for i in (0, 2, 4)]
    view = cases.view_of(model, torch.stack(deltas).mean(0), 0, plan, clients=3, oracle=data.labels[:2])
    observation = observe(view, model, blob_prior, SHAPE)
    assert observation.batch == 6
    assert observation.labels is None  # two of six labels are no labels
    difference = observation.simulation.flat(data.images, data.labels) - observation.gradient
    assert float(difference.norm()) < 1e-6 * observation.norm


def test_noise_level_is_estimated_where_it_is_not_published(blob_prior: Prior) -> None:
    model, data, plan = cases.mlp(pixels=256), cases.blobs(1, seed=1), cases.recipe()
    delta = cases.upload(model, data.images, data.labels, plan)
    std = 0.3 * float(delta.norm()) / len(delta) ** 0.5
    noisy = delta + std * torch.randn(len(delta), generator=torch.Generator().manual_seed(3))
    view = cases.view_of(model, noisy, 1, plan, knowledge={"noise": {"noise": "gaussian"}})
    assert observe(view, model, blob_prior, SHAPE).noise_std == pytest.approx(std, rel=0.05)


def test_masked_entries_carry_no_weight(blob_prior: Prior) -> None:
    model, data, plan = cases.lenet(shape=SHAPE), cases.blobs(1, seed=1), cases.recipe()
    delta = cases.upload(model, data.images, data.labels, plan)
    mask = torch.rand(len(delta), generator=torch.Generator().manual_seed(0)) < 0.5
    garbage = torch.where(mask, delta, torch.full_like(delta, 1e6))
    view = cases.view_of(model, garbage, 1, plan, knowledge={"he": {"mask": mask}})
    checked = assess(Candidate(data.images, data.labels, "test"), observe(view, model, blob_prior, SHAPE))
    assert checked.residual < 1e-6


def test_attack_randomness_is_none_of_a_defenses() -> None:
    """A defense draws with its client and round; no view's seed can be one of those."""
    ctx = RoundContext(0, 1, 1)
    mine = {ctx.entropy(f"gradinversion/view-{i}") for i in range(50)}
    theirs = {
        RoundContext(0, r, 1, c).entropy(p) for r in range(3) for c in (None, 0, 1) for p in ("noise", "dp", "batches")
    }
    assert len(mine) == 50
    assert not mine & theirs


def test_private_layers_are_reported(blob_prior: Prior) -> None:
    model, data, plan = cases.lenet(shape=SHAPE), cases.blobs(1, seed=1), cases.recipe()
    shared = tuple(n for n, _ in model.named_parameters() if not n.startswith("net.7"))
    delta = cases.upload(model, data.images, data.labels, plan, names=shared)
    observation = observe(cases.view_of(model, delta, 1, plan, names=shared), model, blob_prior, SHAPE)
    assert observation.simulation.names == shared
    assert any("not shared" in note for note in observation.notes)


# --- what an upload shows of its defense --------------------------------------------------------------------------


def stack(word: str) -> tuple[Defense, ...]:
    return tuple(plugins.build("defenses", spec) for spec in plugins.parse_stack(word))


def seen(word: str, prior: Prior, count: int = 1, **changes: Any) -> Observation:
    """A LeNet client's upload through a stack of defenses, observed by an adversary who knows the stack."""
    defenses, data = stack(word), cases.blobs(count, seed=1)
    plan = cases.recipe(**changes)
    model = defended.prepared(cases.lenet(shape=SHAPE), defenses)
    view = defended.view_of(defended.seats_of(model, defenses, plan), [(data.images, data.labels)])
    return observe(view, model, prior, SHAPE)


def test_a_sparse_update_shows_its_mask(blob_prior: Prior) -> None:
    observation = seen("topk:fraction=0.1", blob_prior)
    assert observation.kept is not None
    assert int(observation.kept.sum()) == round(0.1 * len(observation.gradient))
    assert torch.equal(observation.kept, observation.gradient != 0)
    assert observation.knowledge == ("topk: sparse",)
    assert observation.simulation.names == tuple(observation.gradients)


def test_noise_on_a_sparse_update_does_not_hide_which_entries_stand_out(blob_prior: Prior) -> None:
    """Unsent entries carry the noise alone: a normal variable beyond three standard deviations, 0.27 % of them."""
    sparse = seen("topk:fraction=0.05", blob_prior)
    assert sparse.kept is not None
    noisy = seen(f"topk:fraction=0.05+gaussian:sigma={1e-3 * sparse.norm:g}", blob_prior)
    assert noisy.kept is not None
    assert bool((noisy.gradient != 0).all())
    assert float((noisy.kept & ~sparse.kept).sum() / (~sparse.kept).sum()) < 0.01
    assert float((noisy.kept & sparse.kept).sum() / sparse.kept.sum()) > 0.9
    before = seen("gaussian:sigma=1e-3+topk:fraction=0.05", blob_prior)  # the other order leaves exact zeros
    assert torch.equal(before.weights > 0, before.gradient != 0)


@pytest.mark.parametrize(
    ("word", "cells"), [("int8", 12), ("int8:stochastic=true", 6), ("int8:bits=4,granularity=vector", 12)]
)
def test_quantisation_counts_as_rounding(word: str, cells: int, blob_prior: Prior) -> None:
    """The server reads the step off the upload: cells 2^(bits−1) − 1 of which reach to the largest entry."""
    observation = seen(word, blob_prior, lr=0.5)
    largest = {n: float(g.abs().max()) for n, g in observation.gradients.items()}
    levels = 7 if "bits=4" in word else 127
    for name, std in observation.stds.items():
        top = max(largest.values()) if "vector" in word else largest[name]
        assert float(std.min()) == pytest.approx(top / levels / cells**0.5, rel=1e-3)
        assert float(std.max()) == pytest.approx(top / levels / cells**0.5, rel=1e-3)
    assert observation.noise_std == 0


def test_a_step_that_is_fixed_beforehand_is_taken_as_it_is(blob_prior: Prior) -> None:
    model, plan = cases.lenet(shape=SHAPE), cases.recipe(lr=0.5)
    size = sum(p.numel() for p in model.parameters())
    steps = torch.linspace(0.1, 1.0, size)
    for step in (0.3, steps):
        known = {"rounding": {"quantisation_step": step}}
        view = cases.view_of(model, torch.ones(size), 1, plan, knowledge=known)
        expected = torch.as_tensor(step) / 0.5 / 12**0.5
        assert torch.allclose(observe(view, model, blob_prior, SHAPE).std, expected.expand(size), rtol=1e-3)


def test_what_follows_each_clients_data_cannot_be_read_off_a_sum(blob_prior: Prior) -> None:
    defenses, data = stack("topk:fraction=0.1+int8"), cases.blobs(3, seed=1)
    model, plan = cases.lenet(shape=SHAPE), cases.recipe(batch_size=1)
    table = defended.seats_of(model, defenses, plan, clients=3, hidden=True)
    batches = [(data.images[i : i + 1], data.labels[i : i + 1]) for i in range(3)]
    observation = observe(defended.view_of(table, batches), model, blob_prior, SHAPE)
    assert torch.equal(observation.weights > 0, observation.gradient != 0)  # what nobody sent
    assert observation.noise_std > 0  # the size of the steps is estimated from the sum
    assert any("which client" in note for note in observation.notes)
    assert any("estimated" in note for note in observation.notes)


def test_pruned_columns_are_dropped_and_no_others(blob_prior: Prior) -> None:
    observation = seen("soteria:fraction=0.3", blob_prior)
    weights = observation.named(observation.weights)
    dropped = (weights["net.7.weight"] == 0).all(0)
    assert int(dropped.sum()) == round(0.3 * 192)
    assert int((observation.weights == 0).sum()) == 2 * int(dropped.sum())
    assert not observation.gradients["net.7.weight"][:, dropped].any()
    assert "net.7.bias" in observation.complete  # labels can be read
    # Under noise no column is zero, and over several steps columns are pruned in some of them: the layer goes.
    for word, changes in (("soteria+gaussian:sigma=0.1", {}), ("soteria", {"steps": 2})):
        weights = seen(word, blob_prior, **changes).named(seen(word, blob_prior, **changes).weights)
        assert not weights.pop("net.7.weight").any()
        assert all(bool(w.all()) for w in weights.values())


def test_weight_decay_does_not_hide_pruned_columns(blob_prior: Prior) -> None:
    observation = seen("soteria:fraction=0.3", blob_prior, weight_decay=0.01, lr=0.1)
    assert int((observation.named(observation.weights)["net.7.weight"] == 0).all(0).sum()) == round(0.3 * 192)


def test_a_random_layer_ends_what_is_matched_but_not_what_is_read(blob_prior: Prior) -> None:
    observation = seen("precode:size=16", blob_prior)
    unmatched = {n for n, w in observation.named(observation.weights).items() if not w.any()}
    assert unmatched == {
        "net.7.bottleneck.decode.weight",
        "net.7.bottleneck.decode.bias",
        "net.7.linear.weight",
        "net.7.linear.bias",
    }
    assert observation.simulation.stop is not None
    assert observation.simulation.stop.module == "net.7.bottleneck.encode"
    assert observation.as_sent.complete == set(observation.simulation.names)


def test_of_clipped_updates_in_a_sum_only_the_direction_is_matched(blob_prior: Prior) -> None:
    """Every client scales its update by a factor of its own that nobody sees."""
    defenses, data = stack("gaussian:clip=0.5,sigma=0"), cases.blobs(2, seed=1)
    model, plan = cases.lenet(shape=SHAPE), cases.recipe(batch_size=1)
    same = data.images[:1], data.labels[:1]
    table = defended.seats_of(model, defenses, plan, clients=2, hidden=True)
    observation = observe(defended.view_of(table, [same, same]), model, blob_prior, SHAPE)
    assert observation.norm == pytest.approx(0.5, rel=1e-4)
    x, y = torch.cat([same[0], same[0]]), torch.cat([same[1], same[1]])
    assert float((observation.simulation.flat(x, y) - observation.gradient).norm()) < 1e-5 * observation.norm
    assert float(observation.simulation.flat(data.images, data.labels).norm()) == pytest.approx(0.5, rel=1e-4)


def test_noise_of_the_defense_cannot_be_drawn_again_by_the_attack(blob_prior: Prior) -> None:
    """An attack holds a context of the same seed, round and client; its streams are others."""
    table = defended.seats_of(cases.lenet(shape=SHAPE), stack("gaussian:sigma=1"), cases.recipe())
    data = cases.blobs(1, seed=1)
    clean = defended.view_of(replace_defenses(table), [(data.images, data.labels)])
    noise = defended.update_of(defended.view_of(table, [(data.images, data.labels)])).delta
    noise = noise - defended.update_of(clean).delta
    own = RoundContext(0, 1, 10, 0)
    again = torch.empty_like(noise).normal_(generator=own.generator("gaussian-noise"))
    assert float(torch.corrcoef(torch.stack([noise, again]))[0, 1]) > 0.99  # whoever has the seed itself can
    for ctx in (own.adversary(), dataclasses.replace(own, client=None).adversary().for_client(0)):
        drawn = torch.empty_like(noise).normal_(generator=ctx.generator("gaussian-noise"))
        assert abs(float(torch.corrcoef(torch.stack([noise, drawn]))[0, 1])) < 5 / len(noise) ** 0.5


def replace_defenses(table: defended.Seats) -> defended.Seats:
    """The same seats without a defense."""
    return dataclasses.replace(table, defenses=())
