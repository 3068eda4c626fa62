"""Long-tailed losses, Fed-MAS, label graphs, replay, adaptation, inverted images, and schedules of absence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsec.errors import ConfigError
from fedsec.federation.engines.serial import Serial
from fedsec.federation.participation import Participation
from fedsec.federation.strategy import FedAvg
from fedsec.strategies import adaptation, distilled, graph, inverted, longtail, replay
from fedsec.strategies.adaptation import DANN, FeatureStats
from fedsec.strategies.distilled import EKD, FedMAS, relative_fairness
from fedsec.strategies.graph import SiteAwareGNN
from fedsec.strategies.inverted import MediSecFed, believed, invert
from fedsec.strategies.longtail import BalancedSoftmax, Focal
from fedsec.strategies.replay import Replay
from fedsec.types import RoundContext

from ..federation import toy
from . import small

G = torch.Generator().manual_seed(0)
LOGITS = torch.randn(12, 3, generator=G)
Y = torch.arange(12) % 3
EQUAL = torch.tensor([4.0, 4.0, 4.0])


def test_losses_are_cross_entropy_where_nothing_is_unbalanced() -> None:
    plain = F.cross_entropy(LOGITS, Y)
    torch.testing.assert_close(longtail.balanced_softmax(LOGITS, Y, EQUAL), plain)
    torch.testing.assert_close(longtail.focal(LOGITS, Y, 0.0), plain)
    torch.testing.assert_close(longtail.class_balanced(LOGITS, Y, EQUAL, 0.9999), plain)
    torch.testing.assert_close(longtail.ldam(LOGITS, Y, EQUAL, 0.0), plain)


def test_balanced_softmax_of_equal_logits_is_the_prior() -> None:
    counts = torch.tensor([90.0, 10.0])
    loss = longtail.balanced_softmax(torch.zeros(1, 2), torch.tensor([1]), counts)
    assert float(loss) == pytest.approx(-math.log(0.1), rel=1e-5)


def test_ldam_margins_follow_the_fourth_root_and_the_rarest_has_the_largest() -> None:
    counts = torch.tensor([1600.0, 100.0])  # (100/1600)^(1/4) = 1/2
    z = torch.zeros(1, 2)
    for label, margin in ((1, 0.5), (0, 0.25)):
        expected = -math.log(math.exp(-margin) / (math.exp(-margin) + 1))
        assert float(longtail.ldam(z, torch.tensor([label]), counts, 0.5)) == pytest.approx(expected, rel=1e-5)


def test_class_balanced_weights_and_classes_that_are_missing() -> None:
    weights = longtail.effective(torch.tensor([100.0, 1.0, 0.0]), 0.99)
    ratio = (1 - 0.99**100) / (1 - 0.99)
    assert float(weights[1] / weights[0]) == pytest.approx(ratio, rel=1e-4)
    assert float(weights[2]) == 0 and float(weights[:2].mean()) == pytest.approx(1)


def test_an_image_s_loss_does_not_depend_on_its_batch() -> None:
    """Where a batch's weights were normalised by their sum, clipping single images would bound nothing."""
    counts = torch.tensor([9.0, 2.0, 1.0])
    whole = longtail.class_balanced(LOGITS, Y, counts, 0.9)
    each = torch.stack([longtail.class_balanced(LOGITS[i : i + 1], Y[i : i + 1], counts, 0.9) for i in range(12)])
    torch.testing.assert_close(whole, each.mean())


def test_the_prior_stays_at_the_client() -> None:
    seen: list[Any] = []
    data = small.clients()
    table, state = small.federation(BalancedSoftmax())
    small.rounds(table, state, data, Serial(table, data).train, 1, watch=seen.append)
    assert all(not u.extras for v in seen for u in v.updates) and not state.side
    assert torch.equal(small.trained(Focal(gamma=0))[1].params, small.trained(Focal(gamma=0))[1].params)


# --- Fed-MAS -------------------------------------------------------------------------------------------------------

BEFORE = [torch.tensor([0.6, 0.4, 0.0]), torch.tensor([0.3, 0.5, 0.9])]
DURING = [torch.tensor([0.5, 0.2, 0.0]), torch.tensor([0.2, 0.4, 0.6])]


def weights_of(strategy: FedMAS, inverse: bool, weights: dict[int, float], ctx: RoundContext) -> list[float]:
    rf = {k: {"rf": relative_fairness(BEFORE[k], DURING[k], inverse).reshape(1)} for k in (0, 1)}
    return list(strategy.reweigh(weights, rf, ctx).values())


def test_worked_weights_of_fedmas() -> None:
    assert [float(relative_fairness(b, d)) for b, d in zip(BEFORE, DURING, strict=True)] == pytest.approx(
        [0.542857, 0.392157], abs=1e-6
    )
    inverse = [float(relative_fairness(b, d, True)) for b, d in zip(BEFORE, DURING, strict=True)]
    assert inverse == pytest.approx([0.457143, 0.272727], abs=1e-6)
    half, late, early = {0: 0.5, 1: 0.5}, RoundContext(0, 9, 10), RoundContext(0, 8, 10)
    assert weights_of(FedMAS(), False, half, late) == pytest.approx([0.580587, 0.419413], abs=1e-6)
    assert weights_of(FedMAS(variant="inv"), True, half, late) == pytest.approx([0.626335, 0.373665], abs=1e-6)
    sizes = {0: 0.25, 1: 0.75}
    assert weights_of(FedMAS(variant="drw"), False, sizes, late) == pytest.approx([0.315738, 0.684262], abs=1e-6)
    assert weights_of(FedMAS(variant="drw"), False, sizes, early) == [0.25, 0.75]


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_few_classes_win_and_doubling_a_class_changes_nothing(classes: int) -> None:
    hard = torch.full((classes,), 0.7)
    assert float(relative_fairness(hard, hard)) == pytest.approx(1 / classes)
    each, y = torch.rand(10, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3
    once = distilled.by_class(each, y, 3)[0]
    twice = torch.cat([each, each[y == 1]]), torch.cat([y, y[y == 1]])
    torch.testing.assert_close(distilled.by_class(*twice, 3)[0], once)


def test_the_teacher_does_not_learn_and_the_distance_is_bounded() -> None:
    z = torch.randn(6, 4, generator=G)
    assert float(distilled.distances(z, z).abs().max()) < 1e-5
    torch.testing.assert_close(distilled.distances(z, -z), torch.full((6,), 4.0))
    seen: list[nn.Module] = []
    strategy = EKD()
    table, state = small.federation(strategy)
    from fedsec.federation.desk import Site

    x, y = small.clients()[0]
    site = Site(0, table.model, table.sharing, state.params, table.recipe, RoundContext(0, 1, 1, 0), {}, {}, x, y)
    seen.append(strategy.teaching(site))
    before = {k: t.clone() for k, t in seen[0].state_dict().items()}
    objective = strategy.objective(site, lambda m, a, b: m(a).sum())
    objective(table.model.train(), x[:8], y[:8]).backward()
    assert all(p.grad is None for p in seen[0].parameters())
    assert all(torch.equal(t, before[k]) for k, t in seen[0].state_dict().items())
    other = Site(1, table.model, table.sharing, state.params, table.recipe, RoundContext(0, 2, 2, 1), {}, {}, x, y)
    assert all(torch.equal(t, before[k]) for k, t in strategy.teaching(other).state_dict().items())  # one for all


def test_without_distillation_ekd_is_balanced_softmax_bit_for_bit() -> None:
    assert torch.equal(small.trained(EKD(lam=0))[1].params, small.trained(BalancedSoftmax())[1].params)


def test_only_the_scalar_leaves_and_identical_clients_weigh_the_same() -> None:
    seen: list[Any] = []
    x, y = small.clients()[0]
    data = ((x, y), (x, y))
    table, state = small.federation(FedMAS(), count=2, recipe=toy.recipe(batch_size=24))
    records = small.rounds(table, state, data, Serial(table, data).train, 1, watch=seen.append)
    assert [{k: t.numel() for k, t in u.extras.items()} for u in seen[0].updates] == [{"rf": 1}, {"rf": 1}]
    assert records[0].weights[0] == pytest.approx(0.5, abs=1e-3)


# --- label graphs --------------------------------------------------------------------------------------------------


def test_without_edges_no_logit_looks_at_another_node() -> None:
    head = graph.LabelGraph(5, 3)
    h0 = torch.randn(1, 3, graph.WIDTH, generator=G, requires_grad=True)
    for i in range(3):
        (slope,) = torch.autograd.grad(head.propagate(h0)[0, i], h0)
        assert bool(slope[0, i].any()) and not bool(slope[0, [j for j in range(3) if j != i]].any())
    head.adjacency.copy_(graph.normalised(torch.ones(3, 3)))
    (slope,) = torch.autograd.grad(head.propagate(h0)[0, 0], h0)
    assert bool(slope[0, 1].any())


def test_planted_co_occurrence_is_found_and_rows_sum_to_one() -> None:
    rng = torch.Generator().manual_seed(1)
    first = torch.rand(4000, generator=rng) < 0.4
    second = torch.where(first, torch.rand(4000, generator=rng) < 0.7, torch.rand(4000, generator=rng) < 0.05)
    y = torch.stack([first, second], 1).float()
    found = graph.co_occurrence(y, 2, 0.1)
    assert float(found[0, 1]) == pytest.approx(0.7, abs=0.05)
    single = graph.co_occurrence(torch.tensor([0, 1, 1, 2]), 3, 0.1)
    assert torch.equal(single, torch.eye(3))
    torch.testing.assert_close(graph.normalised(found).sum(1), torch.ones(2))


def test_only_the_cnn_leaves_the_hospital() -> None:
    table, state, _ = small.trained(SiteAwareGNN())
    assert all(n.startswith("net.net.features") for n in table.sharing.params.names)
    assert all(n.startswith("net.label_graph") for n in table.sharing.local.names)
    assert table.sharing.buffers.size == 0
    assert not torch.equal(state.local[0], state.local[1])
    shared = small.federation(SiteAwareGNN(nodes="shared"))[0].sharing
    assert {n for n in shared.local.names} == {
        f"net.label_graph.{n}" for n in ("first.weight", "second.weight", "adjacency")
    }


# --- replay --------------------------------------------------------------------------------------------------------


def test_replay_switched_off_is_fedavg_bit_for_bit_and_sends_nothing() -> None:
    table, state, records = small.trained(Replay(generator_rounds=0))
    plain, _, before = small.trained(FedAvg())[1], None, small.trained(FedAvg())[2]
    assert torch.equal(state.params, plain.params) and not state.side
    assert [r.upload_bytes for r in records] == [r.upload_bytes for r in before]
    assert table.sharing.params.size == plain.params.numel()


def test_replayed_images_balance_the_classes_and_the_encoder_stays() -> None:
    strategy = Replay(generator_rounds=1, generator_epochs=1)
    seen: list[Any] = []
    data = small.clients()
    table, state = small.federation(strategy)
    small.rounds(table, state, data, Serial(table, data).train, 2, watch=seen.append)
    assert [set(u.extras) for v in seen for u in v.updates] == [{"decoder"}] * 3 + [set()] * 3
    generator = replay.Generator((1, small.SIDE, small.SIDE), 2)
    assert seen[0].updates[0].extras["decoder"].numel() == sum(p.numel() for p in generator.decoder.parameters())
    weights = FedAvg().weights({0: 24, 1: 17, 2: 32}).values()
    mean = sum(w * u.extras["decoder"] for w, u in zip(weights, seen[0].updates, strict=True))
    torch.testing.assert_close(state.side["decoder"], mean, rtol=1e-5, atol=1e-6)
    from fedsec.federation.desk import Site

    x, y = data[0]
    y = torch.zeros_like(y).index_fill(0, torch.arange(3), 1)
    ctx = RoundContext(0, 2, 2, 0)
    site = Site(0, table.model, table.sharing, state.params, table.recipe, ctx, dict(state.own[0]), state.side, x, y)
    strategy.begin(site)
    assert torch.bincount(site.y).tolist() == [21, 21]
    assert torch.equal(site.x[: len(x)], x) and 0 <= float(site.x.min()) <= float(site.x.max()) <= 1


# --- adaptation ----------------------------------------------------------------------------------------------------


def test_reversed_gradients_and_their_ramp() -> None:
    x = torch.ones(3, requires_grad=True)
    adaptation.reversed_gradient(x, 0.3).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((3,), -0.3))
    assert adaptation.ramp(0.5, 0, 10) == 0 and adaptation.ramp(0.5, 10, 10) == pytest.approx(0.5, abs=1e-3)


def test_dann_at_zero_trains_as_fedavg_and_noises_before_it_sends() -> None:
    assert torch.equal(small.trained(DANN(lam=0))[1].params, small.trained(FedAvg())[1].params)

    def sent(sigma: float) -> torch.Tensor:
        seen: list[Any] = []
        data = small.clients()
        table, state = small.federation(DANN(sigma=sigma))
        small.rounds(table, state, data, Serial(table, data).train, 1, watch=seen.append)
        return torch.cat([u.extras["features"] for u in seen[0].updates])

    clean, noised = sent(0.0), sent(0.05)
    torch.testing.assert_close(clean.norm(dim=1), torch.ones(len(clean)))
    assert float((noised - clean).std()) == pytest.approx(0.05, rel=0.03)


def test_feature_moments_become_equal_when_nothing_else_counts() -> None:
    target = torch.stack([torch.linspace(-1, 1, 6), torch.linspace(0.5, 2, 6)])
    features = torch.randn(64, 6, generator=G).requires_grad_(True)
    optimizer = torch.optim.Adam([features], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        adaptation.moment_distance(features, target).backward()
        optimizer.step()
    torch.testing.assert_close(adaptation.moments(features.detach()), target, rtol=0, atol=1e-3)
    assert torch.equal(small.trained(FeatureStats(lam=0))[1].params, small.trained(FedAvg())[1].params)


# --- inverted images -----------------------------------------------------------------------------------------------


def test_no_parameter_leaves_under_medisecfed_and_bytes_are_those_of_the_images() -> None:
    seen: list[Any] = []
    data = small.clients()
    strategy = MediSecFed(images=2, steps=2)
    table, state = small.federation(strategy)
    records = small.rounds(table, state, data, Serial(table, data).train, 2, watch=seen.append)
    assert all(u.delta.numel() == 0 and u.buffers is None for v in seen for u in v.updates)
    pixels = 2 * 2 * small.SIDE**2
    assert records[0].upload_bytes == 4 * pixels
    assert records[1].upload_bytes == 4 * (pixels + 3 * 4 * 2)  # and a vote of two classes on twelve pictures
    assert state.side["pool"].shape == (12, 1, small.SIDE, small.SIDE)


def test_liars_pictures_are_dropped_and_the_median_is_the_label() -> None:
    honest, liar = torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9])
    votes = torch.stack([honest.repeat(4, 1), honest.repeat(4, 1), liar.repeat(4, 1)])
    owners = torch.tensor([0, 0, 2, 2])
    keep, labels = believed(votes, owners, {0: 0, 1: 1, 2: 2}, 0.5)
    assert keep.tolist() == [True, True, False, False]
    torch.testing.assert_close(labels, honest.repeat(4, 1))
    unsure = torch.full((3, 1, 2), 0.5)
    assert not believed(unsure, torch.tensor([0]), {0: 0}, 0.5)[0].any()
    assert not believed(votes, torch.tensor([0, 0, 5, 5]), {0: 0, 1: 1, 2: 2}, 0.5)[0][2:].any()


def test_inversion_makes_pictures_of_their_class() -> None:
    torch.manual_seed(0)
    x, y = toy.images(64, 0, small.SIDE)
    model = small.network("group")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    classes = torch.tensor([0, 1] * 3)
    start = torch.rand(6, 1, small.SIDE, small.SIDE, generator=G)
    found = invert(model.eval(), start, classes, 40, 0.1)
    assert torch.equal(model(found).argmax(1), classes)
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    brightness = [float(found[classes == c].mean()) for c in (0, 1)]
    assert brightness[1] > brightness[0]
    assert inverted.TV > 0


# --- who is there --------------------------------------------------------------------------------------------------


def who(text: str, rounds: int = 6, clients: int = 4, seed: int = 0) -> list[list[int]]:
    schedule = Participation.parse(text)
    return [schedule.select(clients, RoundContext(seed, t, rounds)) for t in range(1, rounds + 1)]


def test_schedules_are_pure_functions_of_seed_and_round() -> None:
    assert who("leave:0=3,2=5")[1:5] == [[0, 1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 3]]
    assert who("join:3=4")[2:4] == [[0, 1, 2], [0, 1, 2, 3]]
    for text in ("flaky:drop=0.3,back=0.5", "intermittent:p=0.5", "0.5"):
        assert who(text) == who(text) != who(text, seed=1)
        later = Participation.parse(text)
        assert later.select(4, RoundContext(0, 6, 6)) == who(text)[5]  # whichever rounds were asked before
    assert who("intermittent:p=1") == who("full") == who("flaky:drop=0")


def test_a_flaky_line_has_its_stationary_share() -> None:
    schedule = Participation.parse("flaky:drop=0.2,back=0.6")
    present = [len(schedule.select(50, RoundContext(s, 12, 12))) / 50 for s in range(40)]
    assert sum(present) / len(present) == pytest.approx(0.75, abs=0.03)
    assert schedule.expected(100) == pytest.approx(75)


BAD = ["leave", "leave:a=2", "join:0=0", "flaky:drop=2", "flaky:loss=1", "never", "0", "leave:-1=2"]


@pytest.mark.parametrize("text", BAD)
def test_bad_schedules_are_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="write full"):
        Participation.parse(text)


def test_schedules_of_clients_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="client 9 does not exist"):
        Participation.parse("leave:9=2").check(4)
    with pytest.raises(ConfigError, match="nobody is left"):
        Participation.parse("join:0=2,1=2").check(2)


def test_who_joins_starts_from_the_current_model() -> None:
    data = small.clients()
    table, state = small.federation(FedAvg())
    seen: list[Any] = []
    schedule = Participation.parse("join:2=2")
    small.rounds(
        table, state, data, Serial(table, data).train, 2, watch=seen.append,
        present=lambda t: schedule.select(3, RoundContext(0, t, 2)),
    )  # fmt: skip
    assert [[u.client for u in v.updates] for v in seen] == [[0, 1], [0, 1, 2]]
    assert not torch.equal(seen[0].params, seen[1].params)
