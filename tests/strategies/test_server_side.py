"""HeteroFL, gossip, FedSM and weights: what the server, or nobody, makes of the uploads."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsec.errors import ConfigError
from fedsec.federation.composition import check_privacy, check_rule, check_seat, compose
from fedsec.federation.engines.serial import Serial
from fedsec.federation.round import run_round
from fedsec.federation.strategy import FedAvg, report_fault
from fedsec.strategies.gossip import Gossip, adjacency, among, metropolis, second_eigenvalue
from fedsec.strategies.heterofl import HeteroFL, held, slim
from fedsec.strategies.selector import FedSM, Selected, accuracy_by_client, soft_pull
from fedsec.strategies.weighting import FedSLID, LossWeighted, class_weights
from fedsec.types import RoundContext, Update

from ..federation import toy
from . import small

CTX = RoundContext(0, 1, 2)


def spec_cnn() -> nn.Sequential:
    """The specification's `cnn`: grey, two classes, 107,510 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(1568, 60), nn.ReLU(), nn.Linear(60, 2)),
    )


# --- HeteroFL ------------------------------------------------------------------------------------------------------


def test_parameters_of_each_capacity() -> None:
    counts = [sum(p.numel() for p in slim(spec_cnn(), r)[0].parameters()) for r in (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)]
    assert counts == [107_510, 27_036, 6_839, 1_850, 484]


def test_slices_are_leading_and_nested_and_keep_whole_channels() -> None:
    model = spec_cnn()
    layout = FedAvg().sharing(model).params
    masks = [held(layout, slim(model, r)[1]) for r in (1.0, 0.5, 0.25, 0.125)]
    assert masks[0].all()
    for larger, smaller in itertools.pairwise(masks):
        assert bool((smaller <= larger).all()) and int(smaller.sum()) < int(larger.sum())
    flat = layout.views(masks[1])["8.weight"]  # 30 of 60 outputs, the first 16 of 32 channels with all 49 pixels
    assert flat[:30, : 16 * 49].all() and not flat[30:].any() and not flat[:, 16 * 49 :].any()
    assert layout.views(masks[1])["0.weight"].any(dim=(2, 3)).squeeze(1).tolist() == [True] * 8 + [False] * 8


def test_a_whole_slice_is_the_network_itself_and_others_are_scaled_in_training() -> None:
    model, x = small.network(), small.clients()[0][0]
    same = slim(model, 1.0)[0]
    assert torch.equal(same.eval()(x), model.eval()(x))
    half = slim(toy.network(), 0.5)[0]
    first = next(m for m in half if isinstance(m, nn.Conv2d))  # type: ignore[attr-defined]
    picture = toy.images(2, 0)[0]
    evaluated = first.eval()(picture)
    torch.testing.assert_close(first.train()(picture), evaluated / 0.5)


def test_full_capacity_is_fedavg_with_equal_weights() -> None:
    state = small.trained(HeteroFL(rates="1", mask_classes=False))[1]
    plain = small.trained(FedAvg(uniform=True))[1]
    torch.testing.assert_close(state.params, plain.params, rtol=0, atol=1e-6)


def test_inside_a_block_the_mean_outside_the_large_client_and_nobody_s_stays() -> None:
    seen: list[Any] = []
    data = small.clients((24, 17))
    for rates in ("1|0.5", "0.5|0.25"):
        seen.clear()
        strategy = HeteroFL(rates=rates, mask_classes=False)
        table, state = small.federation(strategy, count=2)
        before = state.params.clone()
        small.rounds(table, state, data, Serial(table, data).train, 1, watch=seen.append)
        big, little = seen[0].updates
        layout = table.sharing.params
        outer = strategy.mask(table.model, layout, float(rates.split("|")[0]), torch.ones(2))
        inner = strategy.mask(table.model, layout, float(rates.split("|")[1]), torch.ones(2))
        moved = state.params - before
        torch.testing.assert_close(moved[inner], (big.delta + little.delta)[inner] / 2, rtol=0, atol=1e-6)
        only = outer & ~inner
        torch.testing.assert_close(moved[only], big.delta[only], rtol=0, atol=1e-6)
        assert torch.equal(state.params[~outer], before[~outer])
        assert not bool(little.delta[~inner].any())
        assert little.wire.num_bytes == 4 * int(inner.sum())
        assert int((state.side["holders"] == 1).sum()) == int(only.sum())


def test_rows_of_classes_that_a_client_lacks_are_not_its_to_average() -> None:
    strategy = HeteroFL(rates="1")
    table, state = small.federation(strategy)
    mask = table.sharing.params.views(strategy.mask(table.model, table.sharing.params, 1.0, torch.tensor([1.0, 0.0])))
    assert mask["net.fc.weight"][0].all() and not mask["net.fc.weight"][1].any()
    assert mask["net.fc.bias"].tolist() == [True, False]
    x, y = small.clients()[0]
    data = ((x, torch.zeros_like(y)),)
    before = state.params.clone()
    small.rounds(table, state, data, Serial(table, data).train, 1)
    old, new = (table.sharing.params.views(p)["net.fc.weight"] for p in (before, state.params))
    assert torch.equal(old[1], new[1]) and not torch.equal(old[0], new[0])


@pytest.mark.parametrize(("name", "norm"), [("resnet18", "group"), ("densenet121", "group"), ("cnn", "batch")])
def test_networks_that_are_no_chain_are_refused(name: str, norm: str) -> None:
    with pytest.raises(ConfigError, match="heterofl"):
        slim(small.network(norm, name=name), 0.5)


# --- gossip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "value"), [("ring", (1 + 2 * math.cos(math.pi / 4)) / 3), ("star", 0.875), ("complete", 0.0)]
)
def test_consensus_rates(graph: str, value: float) -> None:
    w = metropolis(adjacency(graph, 8, 3, np.random.default_rng(0)))
    assert second_eigenvalue(w) == pytest.approx(value, abs=1e-12)
    x = np.random.default_rng(1).normal(size=(8, 5))
    gap = x - x.mean(0)
    assert np.linalg.norm(w @ gap) <= (value + 1e-12) * np.linalg.norm(gap)


@pytest.mark.parametrize("graph", ["ring", "star", "grid", "complete", "random"])
@pytest.mark.parametrize("nodes", [2, 3, 6, 7, 8])
def test_mixing_is_symmetric_stochastic_and_keeps_the_mean(graph: str, nodes: int) -> None:
    w = metropolis(adjacency(graph, nodes, 3, np.random.default_rng(0)))
    assert (w >= -1e-15).all() and np.allclose(w, w.T) and np.allclose(w.sum(1), 1)
    x = np.random.default_rng(1).normal(size=(nodes, 4))
    assert np.abs((w @ x).mean(0) - x.mean(0)).max() < 1e-15 * 10
    part = among(w, list(range(nodes - 1)) if nodes > 2 else [0])
    assert np.allclose(part.sum(1), 1) and np.allclose(part, part.T)


def test_a_complete_graph_is_fedavg_with_equal_weights() -> None:
    state = small.trained(Gossip(graph="complete"))[1]
    plain = small.trained(FedAvg(uniform=True))[1]
    for client in range(3):
        torch.testing.assert_close(state.sent[client], plain.params, rtol=0, atol=1e-6)
    torch.testing.assert_close(state.params, plain.params, rtol=0, atol=1e-6)


def test_absent_nodes_keep_their_models() -> None:
    data = small.clients((24, 17, 32, 20))
    strategy = Gossip(graph="ring")
    table, state = small.federation(strategy, count=4)
    run_round(table, state, [0, 1, 2, 3], RoundContext(0, 1, 2), Serial(table, data).train)
    kept = state.sent[3].clone()
    run_round(table, state, [0, 1], RoundContext(0, 2, 2), Serial(table, data).train)
    assert torch.equal(state.sent[3], kept) and not torch.equal(state.sent[0], state.sent[2])


def test_a_neighbour_sees_its_neighbours_alone_and_there_is_no_server() -> None:
    data = small.clients((24, 17, 32, 20))
    seen: list[Any] = []
    table, state = small.federation(Gossip(graph="ring", observer=0), count=4)
    small.rounds(table, state, data, Serial(table, data).train, 2, watch=seen.append)
    assert [[u.client for u in v.updates] for v in seen] == [[1, 3], [1, 3]]
    assert torch.equal(seen[1].sent[1] + seen[1].updates[0].delta, seen[1].sent[1] + seen[1].updates[0].delta)
    assert set(seen[1].sent) == {1, 3}

    class Curious:
        seat, name = "server", "gradinversion"

    with pytest.raises(ConfigError, match="gossip:observer=0"):
        check_seat(Gossip(), Curious())  # type: ignore[arg-type]
    check_seat(Gossip(observer=0), Curious())  # type: ignore[arg-type]


# --- FedSM ---------------------------------------------------------------------------------------------------------


def test_soft_pull_limits() -> None:
    models = {k: torch.randn(5, generator=torch.Generator().manual_seed(k)) for k in range(4)}
    mean = torch.stack(list(models.values())).mean(0)
    assert all(torch.allclose(q, models[k]) for k, q in soft_pull(models, 1.0).items())
    assert all(torch.allclose(q, mean, atol=1e-6) for q in soft_pull(models, 1 / 4).values())
    total = sum(soft_pull(models, 0.7).values())
    torch.testing.assert_close(total, sum(models.values()))


def test_at_gamma_one_everybody_uses_the_shared_model_and_q_is_no_one_else_s() -> None:
    table, state, _ = small.trained(FedSM(gamma=1.0))
    x = small.clients()[1][0]
    judged = FedSM(gamma=1.0).personal_model(small.twin(table), table.sharing, 1, state, x)
    shared = small.twin(table)
    from fedsec.federation.sharing import load

    load(shared, table.sharing, state.params, state.buffers, None)
    assert torch.equal(judged.eval()(x), shared.eval()(x))
    received = FedSM().received(state, 1)
    assert [k for k in received if k.startswith("personal")] == ["personal/1"]


def test_the_selector_finds_every_hospital_by_one_gradient_a_round() -> None:
    """Sites that differ by gain and offset: the lowest recall of any site is 1, which averaged selectors miss."""
    base = small.clients((40, 40, 40, 40))
    shifts = ((1.0, 0.0), (0.5, 0.3), (0.7, 0.0), (0.3, 0.1))
    data = tuple((x * gain + offset, y) for (x, y), (gain, offset) in zip(base, shifts, strict=True))
    strategy = FedSM(selector_lr=0.3)
    _, state = small.federation(strategy, count=4)
    state.side["personal/0"] = state.params
    side = state.side
    from fedsec.strategies.selector import adam, described

    for _ in range(60):
        gradients = []
        for k, (x, _) in enumerate(data):
            weights = side["selector"].clone().requires_grad_(True)
            loss = nn.functional.cross_entropy(described(x) @ weights.T, torch.full((len(x),), k))
            gradients.append(torch.autograd.grad(loss, weights)[0])
        adam(side, "selector", torch.stack(gradients).mean(0), 0.3)
    judged = Selected(small.network(), {}, side["selector"], 0.9)
    assert min(accuracy_by_client(judged, [x for x, _ in data])) >= 0.95


# --- weights -------------------------------------------------------------------------------------------------------


def reports(*losses: float) -> dict[int, dict[str, torch.Tensor]]:
    return {k: {"loss": torch.tensor([v])} for k, v in enumerate(losses)}


def test_worked_loss_weights() -> None:
    equal = dict.fromkeys(range(3), 1 / 3)
    found = LossWeighted().reweigh(equal, reports(0.5, 1.0, 2.0), CTX)
    assert [round(w, 4) for w in found.values()] == [0.5465, 0.3315, 0.1220]
    inverse = LossWeighted(form="inverse").reweigh(equal, reports(0.5, 1.0, 2.0), CTX)
    assert [round(w, 4) for w in inverse.values()] == [0.5714, 0.2857, 0.1429]
    sizes = {0: 0.2, 1: 0.3, 2: 0.5}
    assert LossWeighted().reweigh(sizes, reports(0.7, 0.7, 0.7), CTX) == pytest.approx(sizes)
    huge = LossWeighted().reweigh(sizes, reports(800.0, 801.0, 900.0), CTX)
    assert sum(huge.values()) == pytest.approx(1) and all(math.isfinite(w) for w in huge.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_report_that_is_no_loss_is_screened_before_it_can_be_a_weight(value: float) -> None:
    update = Update(1, torch.zeros(3), 5, extras={"loss": torch.tensor([value])})
    assert str(report_fault(LossWeighted(), update)).startswith("report: loss")
    extra = Update(1, torch.zeros(3), 5, extras={"loss": torch.ones(1), "age": torch.ones(1)})
    assert report_fault(LossWeighted(), extra) == "report: age is not declared by loss_weighted"
    assert report_fault(LossWeighted(), Update(1, torch.zeros(3), 5)) == "report: loss is missing"


def test_a_liar_takes_the_weight() -> None:
    found = LossWeighted(form="inverse").reweigh(dict.fromkeys(range(3), 1 / 3), reports(1.0, 1.0, 1e-9), CTX)
    assert found[2] > 0.999


def test_worked_class_weights_of_fedslid() -> None:
    weights = class_weights(torch.tensor([9.0, 1.0]), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(weights, torch.tensor([0.5556, 5.0]), rtol=0, atol=1e-4)
    assert float((torch.tensor([0.9, 0.1]) * weights).sum()) == pytest.approx(1)
    _, state, _ = small.trained(FedSLID())
    counts = sum(torch.bincount(y, minlength=2).float() for _, y in small.clients())
    torch.testing.assert_close(state.side["labels"], counts / counts.sum())


# --- what may stand beside what -------------------------------------------------------------------------------------


class Hiding:
    sees_individuals = False


@pytest.mark.parametrize(
    "word", ["pfa", "heterofl", "gossip", "fedsm", "medisecfed", "dann", "loss_weighted", "fedslid"]
)
def test_what_needs_single_updates_is_refused_where_they_are_hidden(word: str) -> None:
    with pytest.raises(ConfigError, match=rf"{word}.*secagg"):
        check_rule(compose(word), Hiding(), ["secagg"])  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["fedavg", "fedprox", "moon", "silobn", "harmofl", "iopfl", "cusfl", "pfedme", "ekd"])
def test_what_needs_sums_alone_stands_beside_secure_sums(word: str) -> None:
    check_rule(compose(word), Hiding(), ["secagg"])  # type: ignore[arg-type]


def test_an_epsilon_that_would_not_hold_is_refused() -> None:
    from fedsec import plugins

    dp = plugins.build("defenses", plugins.PluginSpec("dp"))
    for word in ("harmofl:alpha=0.05", "loss_weighted", "bsm", "pfa", "moon"):
        with pytest.raises(ConfigError, match=r"^dp: "):
            check_privacy(compose(word), [dp])
    for word in ("fedavg", "fedprox", "iopfl", "finetune", "focal"):
        check_privacy(compose(word), [dp])
