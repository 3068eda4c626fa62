"""A rule as the server applies it: clips, memory by client, shadows, and failing closed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fedsec.defenses.robust.centered_clipping import CenteredClipping
from fedsec.defenses.robust.dos import DOS
from fedsec.defenses.robust.fedavg import FedAvg
from fedsec.defenses.robust.fltrust import FLTrust
from fedsec.defenses.robust.foolsgold import FoolsGold
from fedsec.defenses.robust.krum import Krum, MultiKrum
from fedsec.defenses.robust.norm_clip import NormClip

from fedsec.robust.aggregator import RuleAggregator, median_buffers
from fedsec.types import Update
from tests.robust.cases import one_round, rows


def test_the_safety_clip_bounds_every_client() -> None:
    x = rows(5)
    x[2] *= 1e8
    result = one_round(RuleAggregator(FedAvg()), x)
    norms = np.linalg.norm(x, axis=1)
    assert result.clipped == {2: pytest.approx(10 * np.median(norms) / norms[2])}
    assert float(result.delta.norm()) < 5 * np.median(norms)


def test_paper_exact_mode_clips_nothing() -> None:
    x = rows(5)
    x[2] *= 1e4
    result = one_round(RuleAggregator(FedAvg(kappa=float("inf"))), x)
    np.testing.assert_allclose(result.delta.numpy(), x.mean(0), rtol=1e-4)
    assert result.clipped == {}


def test_too_few_clients_leave_the_model_as_it_was() -> None:
    result = one_round(RuleAggregator(Krum(declared_f=2)), rows(6))
    assert result.delta is None
    assert any("infeasible" in flag and "2f + 3" in flag for flag in result.flags)


def test_an_assumed_f_is_named() -> None:
    assert any("f_assumed, reckoning with 2 of 10" in f for f in one_round(RuleAggregator(Krum()), rows(10)).flags)
    assert not one_round(RuleAggregator(Krum(declared_f=1)), rows(10)).flags


def test_shadows_see_the_same_updates_and_change_nothing() -> None:
    x = rows(9)
    alone = one_round(RuleAggregator(FedAvg()), x)
    result = one_round(RuleAggregator(FedAvg(), (Krum(declared_f=2), DOS(), MultiKrum(declared_f=4))), x)
    assert torch.equal(result.delta, alone.delta)
    krum = one_round(RuleAggregator(Krum(declared_f=2)), x)
    assert result.shadows["krum"]["weights"] == krum.weights
    assert sum(result.shadows["dos"]["weights"].values()) == pytest.approx(1)
    assert "2f + 3" in result.shadows["multi_krum"]["infeasible"]


def test_memory_belongs_to_clients_not_to_positions() -> None:
    first, second = rows(4, seed=1), rows(4, seed=2)
    straight, shuffled = RuleAggregator(FoolsGold()), RuleAggregator(FoolsGold())
    one_round(straight, first, [3, 5, 7, 9])
    one_round(shuffled, first, [3, 5, 7, 9])
    a = one_round(straight, second, [3, 5, 7, 9])
    b = one_round(shuffled, second[::-1], [9, 7, 5, 3])
    assert a.weights == pytest.approx(b.weights)
    np.testing.assert_allclose(a.delta.numpy(), b.delta.numpy(), atol=1e-5)


def test_centred_clipping_starts_from_the_last_aggregate() -> None:
    aggregator = RuleAggregator(CenteredClipping(tau=0.5, iterations=1))
    x = rows(5)
    first = one_round(aggregator, x).delta.numpy()
    second = one_round(aggregator, x).delta.numpy()
    distance = np.linalg.norm(x - first, axis=1)
    expected = first + ((x - first) * np.minimum(1, 0.5 / distance)[:, None]).mean(0)
    np.testing.assert_allclose(second, expected, atol=1e-5)


def test_adaptive_norm_clip_follows_the_median() -> None:
    aggregator = RuleAggregator(NormClip(bound="adaptive"))
    one_round(aggregator, rows(6))
    for seed in range(40):
        one_round(aggregator, 0.1 * rows(6, seed=seed))
    typical = np.median([np.linalg.norm(0.1 * row) for seed in range(40) for row in rows(6, seed=seed)])
    assert aggregator._memory["norm_clip"]["limit"] == pytest.approx(typical, rel=0.3)


def test_fltrust_follows_the_servers_own_images() -> None:
    aggregator = RuleAggregator(FLTrust())
    x = rows(4)
    root = torch.tensor(x[0]) * 0.5
    x[3] = -x[0]
    aggregator.receive_root(root)
    result = one_round(aggregator, x)
    cosines = np.array([np.dot(r, x[0]) / np.linalg.norm(r) / np.linalg.norm(x[0]) for r in x.astype(np.float64)])
    trust = np.maximum(0, cosines)
    expected = (trust[:, None] * x / np.linalg.norm(x, axis=1)[:, None]).sum(0) * float(root.norm()) / trust.sum()
    np.testing.assert_allclose(result.delta.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert result.weights[3] == 0


def test_fltrust_falls_back_on_itself() -> None:
    aggregator = RuleAggregator(FLTrust())
    x = np.repeat(rows(1), 3, axis=0)
    aggregator.receive_root(torch.tensor(-x[0]))
    result = one_round(aggregator, x)
    np.testing.assert_allclose(result.delta.numpy(), -x[0], rtol=1e-6)
    assert any("no_trusted_client" in f for f in result.flags)


def test_submitted_tensors_are_left_alone() -> None:
    x = rows(5)
    x[1] *= 1e5
    kept = [torch.tensor(r) for r in x]
    updates = [Update(i, t, 10) for i, t in enumerate(kept)]
    copies = [t.clone() for t in kept]
    one_round(RuleAggregator(NormClip(c=0.5)), x)
    assert all(torch.equal(u.delta, c) for u, c in zip(updates, copies, strict=True))


def test_buffers_are_the_median_of_valid_ones() -> None:
    values = [torch.tensor([1.0, 5.0]), torch.tensor([2.0, 1e9]), torch.tensor([3.0, 4.0])]
    updates = [Update(i, torch.zeros(1), 1, v) for i, v in enumerate(values)] + [Update(9, torch.zeros(1), 1, None)]
    assert median_buffers(updates).tolist() == [2.0, 5.0]
    assert median_buffers([Update(0, torch.zeros(1), 1)]) is None
