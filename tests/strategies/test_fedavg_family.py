"""Identities of the strategies that change local training or what is judged, and keep FedAvg's exchange."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from fedsec.errors import ConfigError
from fedsec.federation.composition import compose
from fedsec.federation.desk import Site
from fedsec.federation.engines.serial import Serial
from fedsec.federation.local import PlainStep
from fedsec.federation.strategy import FedAvg, Partial, Strategy
from fedsec.strategies.contrastive import Moon, contrastive
from fedsec.strategies.guided import CusFL
from fedsec.strategies.personalised import IOPFL, Finetune, Local, PFedMe
from fedsec.strategies.proximal import FedProx
from fedsec.types import LocalRecipe, RoundContext

from ..federation import toy
from . import small


class Bowl(nn.Module):
    """A quadratic: the `loss` of `bowl` below is ½a(θ − c)², whatever the data say."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([start]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.theta


A, C = 2.0, 3.0


def bowl(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 0.5 * A * (model.theta - C).square().sum()  # type: ignore[operator, union-attr]


def site_of(model: Bowl, strategy: Strategy, recipe: LocalRecipe) -> tuple[Site, PlainStep]:
    sharing = strategy.sharing(model)
    params = sharing.params.flatten(dict(model.state_dict(keep_vars=True)))
    x, y = torch.zeros(4, 1), torch.zeros(4, dtype=torch.long)
    site = Site(0, model, sharing, params, recipe, RoundContext(0, 1, 1, 0), {}, {}, x, y)
    return site, PlainStep(model, recipe, bowl)


def settle(strategy: Strategy, steps: int, lr: float) -> tuple[Site, float]:
    model = Bowl(0.0)
    site, step = site_of(model, strategy, toy.recipe(lr=lr, momentum=0.0))
    wrapped = strategy.local_step(step, site)
    for _ in range(steps):
        wrapped(site.x, site.y)
    return site, float(model.theta.detach())


@pytest.mark.parametrize(
    "strategy", [FedProx(mu=0), Moon(mu=0), IOPFL(), Finetune(), CusFL(lam=0)], ids=lambda s: s.name
)
def test_at_zero_strength_the_shared_model_is_fedavg_s_bit_for_bit(strategy: Strategy) -> None:
    _, plain, _ = small.trained(FedAvg())
    _, state, _ = small.trained(strategy)
    if strategy.name == "cusfl":  # trains private models: its first upload is FedAvg's
        _, plain, _ = small.trained(FedAvg(), number=1)
        table, state, _ = small.trained(strategy, number=1)
        whole = small.federation(FedAvg())[0].sharing.params.views(plain.params)
        assert all(torch.equal(t, whole[n]) for n, t in table.sharing.params.views(state.params).items())
        return
    assert torch.equal(state.params, plain.params)


def test_the_proximal_pull_has_its_closed_form_and_grows_with_mu() -> None:
    for mu in (0.5, 4.0):
        _, theta = settle(FedProx(mu=mu), 400, 0.05)
        assert theta == pytest.approx((A * C + mu * 0.0) / (A + mu), abs=1e-5)
    ways = [abs(settle(FedProx(mu=mu), 20, 0.01)[1]) for mu in (0.0, 0.01, 0.1, 1.0, 10.0)]
    assert ways == sorted(ways, reverse=True) and ways[0] > ways[-1]


def test_the_pull_comes_after_a_defense_has_set_the_gradient() -> None:
    """A defense's noised gradient goes to the optimiser, which adds the pull: no clipping touches it."""
    model = Bowl(1.0)
    strategy = FedProx(mu=0.5)
    site, step = site_of(model, strategy, toy.recipe(lr=1.0, momentum=0.0))
    site.params.fill_(0.0)
    wrapped = strategy.local_step(step, site)
    model.theta.grad = torch.tensor([0.25])  # what a defense released
    wrapped.optimizer.step()
    assert float(model.theta.detach()) == pytest.approx(1.0 - (0.25 + 0.5 * 1.0))


def test_the_contrastive_term_at_its_limits() -> None:
    z = torch.nn.functional.normalize(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), dim=1)
    other = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    assert float(contrastive(z, other, other, 0.5)) == pytest.approx(math.log(2), abs=1e-6)
    e = torch.eye(2)[:1]
    assert float(contrastive(e, e, torch.eye(2)[1:], 0.5)) == pytest.approx(0.126928, abs=1e-6)


def test_moon_teachers_do_not_learn_and_do_not_drift() -> None:
    table, state, _ = small.trained(Moon(), norm="batch")
    model = table.model
    site = Site(
        0,
        model,
        table.sharing,
        state.params,
        table.recipe,
        RoundContext(0, 3, 3, 0),
        dict(state.own[0]),
        {},
        *small.clients()[0],
    )
    seen: list[nn.Module] = []

    @dataclass(frozen=True)
    class Watched(Moon):
        name: ClassVar[str] = "moon"

    import fedsec.strategies.contrastive as module

    original = module.frozen_copy
    try:
        module.frozen_copy = lambda m: seen.append(original(m)) or seen[-1]  # type: ignore[func-returns-value, assignment]
        objective = Watched().objective(site, lambda m, x, y: m(x).sum())
        before = [{k: t.clone() for k, t in m.state_dict().items()} for m in seen]
        model.train()
        objective(model, site.x[:8], site.y[:8]).backward()
    finally:
        module.frozen_copy = original
    assert len(seen) == 2
    for teacher, state_before in zip(seen, before, strict=True):
        assert all(p.grad is None for p in teacher.parameters())
        assert all(torch.equal(t, state_before[k]) for k, t in teacher.state_dict().items())


def test_moon_s_projection_is_not_part_of_the_released_model() -> None:
    table, _, _ = small.trained(Moon(), number=1)
    projection = [n for n in table.sharing.params.names if n.startswith(Moon().auxiliary())]
    assert len(projection) == 4
    assert Moon(mu=0).auxiliary() == ()


def test_iopfl_limits_are_the_last_and_the_first_local_model() -> None:
    def locals_of(alpha: float, number: int) -> torch.Tensor:
        return small.trained(IOPFL(alpha=alpha), number=number)[1].own[0]["params"]

    assert torch.equal(locals_of(1.0, 3), locals_of(0.0, 1))
    last = locals_of(0.0, 3)
    half = torch.lerp(locals_of(0.0, 2), locals_of(0.5, 1), 0.5)
    torch.testing.assert_close(locals_of(0.5, 2), half, rtol=0, atol=1e-6)
    assert not torch.equal(last, locals_of(1.0, 3))


@pytest.mark.parametrize("lam", [1.0, 15.0])
def test_pfedme_has_the_quadratic_s_closed_form(lam: float) -> None:
    """Many inner steps at an outer model that hardly moves: θ̃ = (a c + λ u)/(a + λ)."""
    site, _ = settle(PFedMe(lam=lam, eta=1e-9, inner_steps=800), 1, 0.02)
    assert float(site.own["envelope"]) == pytest.approx((A * C + lam * 0.0) / (A + lam), abs=1e-4)


def test_pfedme_s_personal_model_nears_the_shared_one_like_one_over_lambda() -> None:
    lams = [30.0, 100.0, 300.0]
    gaps = [float(settle(PFedMe(lam=v, eta=1e-9, inner_steps=800), 1, 0.5 / v)[0].own["envelope"]) for v in lams]
    slope = (math.log(gaps[-1]) - math.log(gaps[0])) / (math.log(lams[-1]) - math.log(lams[0]))
    assert slope == pytest.approx(-1, abs=0.05)


def test_pfedme_beta_is_the_server_s_mixture() -> None:
    full = small.trained(PFedMe(beta=1.0), number=1)[1].params
    half = small.trained(PFedMe(beta=0.5), number=1)[1].params
    start = small.federation(PFedMe())[1].params
    torch.testing.assert_close(half, (start + full) / 2, rtol=0, atol=1e-6)


def test_nothing_leaves_under_local_and_training_is_the_client_s_own() -> None:
    table, state, records = small.trained(Local())
    assert table.sharing.params.size == 0 and table.sharing.buffers.size == 0
    assert [r.upload_bytes for r in records] == [0, 0]
    assert not torch.equal(state.local[0], state.local[1])
    _, own, _ = small.trained(Local(), data=small.clients()[:1])
    assert torch.equal(own.local[0], state.local[0])


def test_cusfl_keeps_private_models_from_the_broadcast_and_its_head_at_home() -> None:
    table, state, _ = small.trained(CusFL(lam=0), number=2)
    _, alone, _ = small.trained(Local(), number=2)
    whole = small.federation(Local())[0].sharing.local.views(alone.local[0])
    mine = table.sharing.params.views(state.own[0]["params"])
    assert all(torch.equal(t, whole[n]) for n, t in mine.items())  # λ = 0 is local training, bit for bit
    head = table.sharing.local.views(state.local[0])
    assert head and all(torch.equal(t, whole[n]) for n, t in head.items())
    guided = small.trained(CusFL(lam=0.5, warmup=0), number=2)[1]
    assert not torch.equal(guided.own[0]["params"], state.own[0]["params"])
    warm = small.trained(CusFL(lam=0.5, warmup=2), number=2)[1]
    assert torch.equal(warm.own[0]["params"], state.own[0]["params"])


def test_partial_keeps_heads_apart_and_the_encoder_equal() -> None:
    table, state, _ = small.trained(Partial(local="key:net.fc.*"))
    assert set(table.sharing.local.names) == {"net.fc.weight", "net.fc.bias"}
    assert not torch.equal(state.local[0], state.local[1])


def test_pieces_that_decide_different_things_compose_and_others_do_not() -> None:
    both = compose("silobn+fedprox:mu=0.1")
    table, state, _ = small.trained(both, norm="batch")
    assert table.sharing.local.size and both.name == "silobn+fedprox" and both.personal
    plain = small.trained(compose("silobn"), norm="batch")[1]
    assert not torch.equal(plain.params, state.params)
    zero = small.trained(compose("silobn+fedprox:mu=0"), norm="batch")[1]
    assert torch.equal(plain.params, zero.params)
    for word, why in (
        ("fedbn+silobn", "fedbn and silobn both decide which tensors stay"),
        ("gossip+fedprox", "gossip stands alone"),
        ("fedprox+fedprox", "each piece stands once"),
    ):
        with pytest.raises(ConfigError, match=why):
            compose(word)


def test_a_client_alone_is_local_training_under_every_exchange_of_fedavg_s() -> None:
    data = small.clients((24,))
    plain = small.trained(FedAvg(), data=data)[1]
    for strategy in (FedProx(mu=0), IOPFL(), Finetune()):
        assert torch.equal(small.trained(strategy, data=data)[1].params, plain.params)


def test_client_order_changes_nothing_and_names_hold_the_state() -> None:
    """Own state is keyed by client id: who is absent in between finds it again, untouched."""
    data = small.clients()
    table, state = small.federation(IOPFL())
    train = Serial(table, data).train
    small.rounds(table, state, data, train, 1)
    kept = {k: t.clone() for k, t in state.own[2].items()}
    for t in (2, 3):
        from fedsec.federation.round import run_round

        record = run_round(table, state, [0, 1], RoundContext(0, t, 3), train)
        assert sum(record.weights.values()) == pytest.approx(1)
        assert set(record.weights) == {0, 1}
    assert all(torch.equal(state.own[2][k], t) for k, t in kept.items())
    assert not torch.equal(state.own[0]["params"], kept["params"])
