"""Central DP of whole clients: one noise on the sum, a constant divisor, exact accounting, an honest warning."""

from __future__ import annotations

import math

import pytest
import torch
from fedsec.defenses.dp_client import ClientDP
from torch import Tensor

from fedsec.config import Cell, FederationConfig
from fedsec.errors import ConfigError, RefusedError, RunError
from fedsec.federation.assemble import build_stack
from fedsec.federation.rules import choose_aggregator, with_shadows
from fedsec.plugins import PluginSpec
from fedsec.types import FederationPlan, Layout, Payload, RoundContext, Update
from tests.federation import toy

SIZE = 40_000


def plan(clients: int = 4, rounds: int = 50, present: float | None = None) -> FederationPlan:
    layout = Layout(("w",), ((SIZE,),))
    return FederationPlan(toy.recipe(), rounds, (20,) * clients, layout=layout, clients_per_round=present)


def aggregate(defense: ClientDP, deltas: list[Tensor], number: int = 1) -> Tensor:
    rule = defense.aggregator()
    ctx = RoundContext(0, number, 50)
    rule.begin({}, ctx)
    for client, delta in enumerate(deltas):
        rule.accumulate(Payload(client, Update(client, delta, 20), 0), ctx)
    result = rule.finish(ctx).delta
    assert result is not None
    return result


def test_fifty_rounds_of_ten_hospitals_are_the_specifications_number() -> None:
    """3.7: full participation is exact; z = 1.1 gives 47.3, and ε = 8 / 3 / 1 need 4.244 / 9.833 / 26.38."""
    claim = ClientDP(noise_multiplier=1.1).calibrate(plan(10)).privacy()
    assert claim is not None
    assert (claim.accountant, claim.unit) == ("gdp", "client (central)")
    assert claim.epsilon == pytest.approx(47.31, abs=0.005)
    for epsilon, z in ((8, 4.244), (3, 9.833), (1, 26.38)):
        assert ClientDP(epsilon=epsilon).calibrate(plan(10)).noise_multiplier == pytest.approx(z, rel=5e-4)


def test_noise_is_added_once_to_the_sum_whoever_replies() -> None:
    """P8, P11: variance z²S² of the sum for any number of clients, and a divisor that was fixed before."""
    defense = ClientDP(noise_multiplier=2.0, clip=0.5).calibrate(plan(8))
    for replied in (1, 3, 8):
        noise = aggregate(defense, [torch.zeros(SIZE)] * replied, replied)
        assert noise.std().item() * 8 == pytest.approx(2.0 * 0.5, rel=0.03)
    assert ClientDP(noise_multiplier=1.0).calibrate(plan(8, present=3.0)).divisor == 3.0
    assert ClientDP(noise_multiplier=1.0, expected=5).calibrate(plan(8)).divisor == 5
    with pytest.raises(RunError, match="calibrate"):
        _ = ClientDP().divisor


def test_one_client_more_moves_the_sum_by_at_most_the_clip_norm() -> None:
    """Also one that did not clip, or claims to be huge."""
    defense = ClientDP(noise_multiplier=1e-9, clip=0.5).calibrate(plan(3))
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(SIZE, generator=generator) * s for s in (1e-4, 1.0, 1e6)]
    difference = (aggregate(defense, own) - aggregate(defense, own[:2])) * 3
    assert difference.norm().item() == pytest.approx(0.5, rel=1e-5)
    short = torch.full((SIZE,), 1e-6)
    assert torch.equal(defense.on_upload(Update(0, short, 20), RoundContext(0, 1, 50, 0)).delta, short)


def test_noise_is_fresh_in_every_round_and_secure_noise_in_every_run() -> None:
    zeros = [torch.zeros(SIZE)]
    seeded = ClientDP(noise_multiplier=1.0).calibrate(plan())
    assert torch.equal(aggregate(seeded, zeros, 1), aggregate(seeded, zeros, 1))
    pair = torch.stack([aggregate(seeded, zeros, 1), aggregate(seeded, zeros, 2)])
    assert torch.corrcoef(pair)[0, 1].abs() < 0.03
    system = ClientDP(noise_multiplier=1.0, secure_rng=True).calibrate(plan())
    assert not torch.equal(aggregate(system, zeros, 1), aggregate(system, zeros, 1))


def test_few_hospitals_are_told_how_much_noise_that_is() -> None:
    """P12: the specification's 102 times for 57 thousand parameters at ten hospitals, by its formula."""
    (note,) = ClientDP(epsilon=8).calibrate(plan(10)).notes()
    assert f"{4.244 * math.sqrt(SIZE) / 10:.3g} times" in note
    assert "dp:unit=patient" in note
    assert ClientDP(epsilon=8).calibrate(plan(21)).notes() == ()


def test_what_cannot_be_claimed_is_refused() -> None:
    with pytest.raises(RefusedError, match="clips without noise"):
        ClientDP(noise_multiplier=0.0)
    with pytest.raises(RefusedError, match=r"delta=0\.25 is not below 1/4"):
        ClientDP(delta=0.25).calibrate(plan(4))
    with pytest.raises(RefusedError, match="other tensors beside its update"):
        ClientDP().on_upload(Update(0, torch.zeros(3), 1, buffers=torch.zeros(2)), RoundContext(0, 1, 1, 0))


def test_rules_without_a_sensitivity_are_refused_with_what_to_choose() -> None:
    stack = (PluginSpec("dp_client"), PluginSpec("krum"))
    with pytest.raises(ConfigError, match=r"dp_client and krum both aggregate.*proven for a clipped sum.*gaussian"):
        build_stack(Cell(defense=stack, federation=FederationConfig()))
    rule = choose_aggregator((ClientDP(),))
    with pytest.raises(ConfigError, match="shadow_rules=krum"):
        with_shadows(rule, "krum")


def test_the_budget_stops_before_it_is_exceeded() -> None:
    defense = ClientDP(noise_multiplier=4.0, max_epsilon=5.0).calibrate(plan(4))
    rounds = defense.allowance(0)
    assert rounds is not None and 0 < rounds < 50
    claims = [ClientDP(noise_multiplier=4.0).calibrate(plan(4, rounds=r)).privacy() for r in (rounds, rounds + 1)]
    assert claims[0] is not None and claims[1] is not None
    assert claims[0].epsilon <= 5.0 < claims[1].epsilon
