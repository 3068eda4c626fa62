"""Noise on updates: calibrated local differential privacy with a clip norm, a heuristic without."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fedsec.defenses.noise import Gaussian, Laplace, clip_norm, percentile_95
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fedsec import plugins
from fedsec.errors import ConfigError, RefusedError, RunError
from fedsec.types import FederationPlan, LocalRecipe, RoundContext, Update

CTX = RoundContext(0, 1, 25, 0)
PLAN = FederationPlan(LocalRecipe("binary", 2, 0.1, 0.0, 0.0, 8, 1, None), 25, (100, 50, 20))
D = 100_000


def update(delta: Tensor) -> Update:
    return Update(0, delta, 100)


def noise_of(defense: Gaussian | Laplace, delta: Tensor) -> Tensor:
    return defense.on_upload(update(delta), CTX).delta - delta


@pytest.mark.parametrize("kind", [Gaussian, Laplace])
def test_strength_zero_is_the_identity_bit_for_bit(kind: type) -> None:
    given_update = update(torch.randn(100))
    assert kind(sigma=0.0).on_upload(given_update, CTX) is given_update
    assert kind(sigma=0.0).calibrate(PLAN).privacy() is None
    assert kind(sigma=0.0).public_knowledge(0) == {}


@pytest.mark.parametrize(("kind", "law"), [(Gaussian, stats.norm), (Laplace, stats.laplace)])
def test_noise_has_the_promised_law_and_standard_deviation(kind: type, law: stats.rv_continuous) -> None:
    noise = noise_of(kind(sigma=0.3), torch.zeros(D)).double().numpy()
    assert noise.std() == pytest.approx(0.3, rel=0.02)
    assert stats.kstest(noise[:20_000], law(scale=0.3 if kind is Gaussian else 0.3 / math.sqrt(2)).cdf).pvalue > 1e-4


def test_defaults_are_a_heuristic_that_claims_nothing() -> None:
    for kind in (Gaussian, Laplace):
        defense = kind().calibrate(PLAN)
        assert defense.privacy() is None
        assert defense.public_knowledge(0) == {"noise": kind.name, "noise_std": 0.01}
        assert noise_of(defense, torch.zeros(D)).std().item() == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize(("epsilon", "mu"), [(1.0, 0.2681), (3.0, 0.7191), (8.0, 1.6660)])
def test_gaussian_budget_covers_all_rounds(epsilon: float, mu: float) -> None:
    """P9; σ = 2S√T/μ(ε, δ) of the specification (3.9), not the textbook formula."""
    defense = Gaussian(epsilon=epsilon, clip=0.5).calibrate(PLAN)
    assert defense.std == pytest.approx(2 * 0.5 * 5 / mu, rel=3e-4)
    claim = defense.privacy()
    assert claim is not None
    assert claim.epsilon == pytest.approx(epsilon, abs=1e-6)
    assert (claim.unit, claim.accountant, claim.delta) == ("client (local)", "gdp", 1e-5)
    assert set(claim.per_client) == {0, 1, 2}
    assert noise_of(defense, torch.zeros(D)).std().item() == pytest.approx(defense.std, rel=0.02)


def test_laplace_budget_is_pure_and_counts_in_the_first_norm() -> None:
    """P10: b = 2 C₁/ε₀ with ε₀ = ε/T."""
    defense = Laplace(epsilon=5.0, clip=0.5).calibrate(PLAN)
    scale = 2 * 0.5 / (5.0 / 25)
    assert defense.std == pytest.approx(math.sqrt(2) * scale)
    claim = defense.privacy()
    assert claim is not None
    assert (claim.epsilon, claim.delta, claim.accountant) == (pytest.approx(5.0), 0.0, "pure")
    knowledge = defense.public_knowledge(0)
    assert (knowledge["clip_order"], knowledge["clip_norm"], knowledge["noise"]) == (1, 0.5, "laplace")
    clipped = Laplace(sigma=0.0, clip=0.5).on_upload(update(torch.randn(1000)), CTX).delta
    assert clipped.abs().sum().item() <= 0.5 * (1 + 1e-5)


def test_sigma_with_a_clip_norm_has_the_epsilon_that_follows() -> None:
    claim = Gaussian(sigma=1.3906 * 2, clip=1.0).calibrate(FederationPlan(PLAN.recipe, 1, (10, 10))).privacy()
    assert claim is not None
    assert claim.epsilon == pytest.approx(3.0, abs=1e-3)
    assert Gaussian(sigma=0.0, clip=1.0).calibrate(PLAN).privacy() is None


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10_000), scale=st.floats(1e-6, 1e6), bound=st.floats(1e-3, 1e3), order=st.sampled_from([1, 2])
)
def test_clipping_bounds_the_norm_and_keeps_the_direction(seed: int, scale: float, bound: float, order: int) -> None:
    vector = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * scale
    clipped = clip_norm(vector, bound, order)
    norm = torch.linalg.vector_norm(vector.double(), order).item()
    assert torch.linalg.vector_norm(clipped.double(), order).item() <= min(bound, norm) * (1 + 1e-5)
    assert torch.cosine_similarity(vector, clipped, dim=0).item() == pytest.approx(1, abs=1e-5)
    if norm < bound * (1 - 1e-5):
        assert clipped is vector


def test_percentile_scaling_follows_the_non_zero_entries() -> None:
    delta = torch.randn(D)
    delta[: D // 2] = 0
    reference = np.percentile(delta[delta != 0].abs().numpy(), 95)
    assert percentile_95(delta) == pytest.approx(reference, rel=1e-3)
    assert percentile_95(torch.zeros(5)) == 0.0
    defense = Gaussian(sigma=0.1, scaling="percentile").calibrate(PLAN)
    assert noise_of(defense, delta).std().item() == pytest.approx(0.1 * reference, rel=0.02)
    assert defense.privacy() is None
    assert defense.public_knowledge(0) == {"noise": "gaussian", "noise_per_percentile_95": 0.1}
    assert Gaussian(scaling="percentile").std == 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gaussian:epsilon=3", "add clip"),
        ("laplace:epsilon=3", "add clip"),
        ("gaussian:epsilon=3,sigma=1,clip=1", "not both"),
        ("gaussian:sigma=0.1,scaling=percentile,clip=1", "leave clip and epsilon out"),
        ("gaussian:sigma=-1", "greater than or equal to 0"),
        ("laplace:delta=1e-5", "unknown parameter 'delta'"),
    ],
)
def test_requests_that_mean_nothing_are_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plugins.build("defenses", plugins.PluginSpec.parse(words))


def test_delta_is_below_one_client() -> None:
    """P12."""
    with pytest.raises(RefusedError, match="not below 1/clients"):
        Gaussian(epsilon=3.0, clip=1.0, delta=0.4).calibrate(PLAN)


def test_a_budget_needs_a_plan() -> None:
    with pytest.raises(RunError, match="calibrate"):
        Gaussian(epsilon=3.0, clip=1.0).on_upload(update(torch.ones(3)), CTX)


@pytest.mark.parametrize("kind", [Gaussian, Laplace])
def test_other_tensors_never_travel_beside_a_claim(kind: type) -> None:
    beside = Update(0, torch.ones(3), 10, buffers=torch.ones(2))
    with pytest.raises(RefusedError, match="other tensors without noise"):
        kind(epsilon=3.0, clip=1.0).calibrate(PLAN).on_upload(beside, CTX)
    heuristic = kind(sigma=0.1).on_upload(beside, CTX)
    assert heuristic.buffers is beside.buffers
    assert not torch.equal(heuristic.delta, beside.delta)


@pytest.mark.parametrize("kind", [Gaussian, Laplace])
def test_noise_is_a_function_of_seed_round_and_client(kind: type) -> None:
    def draw(ctx: RoundContext) -> Tensor:
        return kind(sigma=1.0).on_upload(update(torch.zeros(2000)), ctx).delta

    assert torch.equal(draw(CTX), draw(CTX))
    others = [RoundContext(1, 1, 25, 0), RoundContext(0, 2, 25, 0), RoundContext(0, 1, 25, 1)]
    rows = torch.stack([draw(CTX), *map(draw, others)])
    assert (torch.corrcoef(rows) - torch.eye(4)).abs().max() < 0.12
