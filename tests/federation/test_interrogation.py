"""What a malicious server can do to its victims, and what it cannot touch: the honest training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fedsec import plugins
from fedsec.attack import Attack
from fedsec.config import Cell, DataConfig, FederationConfig, ModelConfig
from fedsec.defense import Aggregation, Aggregator, Defense
from fedsec.errors import ConfigError
from fedsec.experiment import public_data, training_key
from fedsec.federation.assemble import Federation, assemble, resolve
from fedsec.federation.interrogation import interrogate
from fedsec.federation.training import Training
from fedsec.federation.victims import observe, victims_of
from fedsec.findings import PublicData, VictimPlan
from fedsec.plugins import PluginSpec
from fedsec.types import LocalRecipe, Payload, RoundContext, Seat, ServerView, Update


@dataclass(frozen=True)
class Insistent(Attack):
    """Asks `wanted` times, adding a number to all parameters each time; keeps what it was given."""

    name: ClassVar[str] = "insistent"
    seat: ClassVar[Seat] = "malicious-server"
    wanted: int = 3
    widen: bool = False
    seen: list[tuple[int, int]] = field(default_factory=list)

    def craft(
        self, model: nn.Module, views: Sequence[ServerView], public: PublicData, recipe: LocalRecipe, ctx: RoundContext
    ) -> nn.Module | None:
        self.seen.append((len(views), ctx.entropy("same for all queries")))
        assert len(public.images) > 10
        assert recipe.steps == 1
        if len(views) == self.wanted:
            return None
        if self.widen:
            model.extra = nn.Linear(3, 4)  # type: ignore[assignment]
        else:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01 * len(views))
        return model


class Sum(Aggregator):
    """Hides individuals: the server sees the mean alone."""

    sees_individuals: ClassVar[bool] = False

    def begin(self, weights: Mapping[int, float], ctx: RoundContext) -> None:
        self.total: Tensor | None = None
        self.weights = weights

    def accumulate(self, payload: Payload, ctx: RoundContext) -> None:
        part = payload.content.delta * self.weights[payload.client]
        self.total = part if self.total is None else self.total + part

    def finish(self, ctx: RoundContext) -> Aggregation:
        return Aggregation(self.total)


@dataclass(frozen=True)
class Noisy(Defense):
    """Noise from the client's own stream."""

    name: ClassVar[str] = "noisy"
    protects: ClassVar[str] = "nothing"
    sizes: list[int] = field(default_factory=list)

    def on_upload(self, update: Update, ctx: RoundContext) -> Update:
        self.sizes.append(len(update.delta))
        return replace(update, delta=update.delta + torch.randn(len(update.delta), generator=ctx.generator("noise")))


PLAN = VictimPlan(rounds=(1,), images=4, batch=2, queries=5)


@pytest.fixture
def federation() -> Federation:
    cell = Cell(
        data=DataConfig(name="synthetic-cxr:images=120"),
        model=ModelConfig(name="lenet"),
        federation=FederationConfig(clients=3, rounds=1, engine="serial", device="cpu", local_epochs=1),
    )
    return assemble(resolve(cell))


def untrained(federation: Federation) -> Training:
    """As after a training of no rounds, whatever the model object of the process has been used for since."""
    state = assemble(federation.cell).initial_state()
    pair = state.params, state.buffers
    return Training({1: pair, 2: pair}, (), {}, {}, {}, (), federation.dataset.fingerprint)


def ask(federation: Federation, attack: Attack, plan: VictimPlan = PLAN) -> list[tuple[ServerView, ...]]:
    chosen = victims_of(federation, plan)
    public = public_data(federation, [victim for _, victim in chosen])
    return interrogate(federation, untrained(federation), plan, chosen, attack, public)


def test_the_server_asks_adaptively_and_within_the_limit(federation: Federation) -> None:
    attack = Insistent(wanted=3)
    answers = ask(federation, attack)
    assert [len(views) for views in answers] == [3, 3]
    assert [n for n, _ in attack.seen] == [0, 1, 2, 3] * 2
    assert len({entropy for _, entropy in attack.seen}) == 2
    assert [len(views) for views in ask(federation, Insistent(wanted=9))] == [5, 5]
    for views in answers:
        base = views[0].params
        for n, view in enumerate(views):
            torch.testing.assert_close(view.params, base + 0.01 * n)


def test_the_same_batch_answers_every_query(federation: Federation) -> None:
    honest, _ = observe(federation, untrained(federation), PLAN)
    for view, views in zip(honest, ask(federation, Insistent(wanted=2)), strict=True):
        assert torch.equal(view.params, views[0].params)
        torch.testing.assert_close(view.updates[0].delta, views[0].updates[0].delta)
    model = federation.build_model()
    for (_, victim), views in zip(victims_of(federation, PLAN), ask(federation, Insistent(wanted=2)), strict=True):
        for view in views:
            tensors = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in view.layout.views(view.params).items():
                    tensors[name].copy_(value)
            loss = torch.nn.functional.cross_entropy(model.train()(victim.images), victim.labels)
            gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(tensors.values()))])
            expected = -federation.plan.recipe.lr * gradient
            torch.testing.assert_close(view.updates[0].delta, expected, rtol=1e-3, atol=1e-7)


def test_an_attack_that_crafts_nothing_sees_the_honest_upload(federation: Federation) -> None:
    honest, _ = observe(federation, untrained(federation), PLAN)
    for view, views in zip(honest, ask(federation, Insistent(wanted=0)), strict=True):
        assert len(views) == 1
        assert torch.equal(views[0].updates[0].delta, view.updates[0].delta)


def test_every_query_has_noise_of_its_own_and_a_crafted_architecture_is_defended_too(federation: Federation) -> None:
    noise = Noisy()
    federation.seats.defenses = (noise,)
    plain = federation.seats.sharing.params.size
    views = ask(federation, Insistent(wanted=2, widen=True))[0]
    assert noise.sizes == [plain + 16] * 4
    assert views[0].layout.size == plain + 16
    extra = [view.layout.views(view.updates[0].delta)["extra.weight"] for view in views]
    assert not torch.equal(*extra)  # nothing trains there: this is the noise
    assert "noisy" in views[0].knowledge


def test_a_hidden_sum_stays_hidden_and_its_bystanders_stay_the_same(federation: Federation) -> None:
    federation.seats.aggregator = Sum()
    views = ask(federation, Insistent(wanted=2))[0]
    assert [view.clients_in_sum for view in views] == [3, 3]
    again = interrogate_unchanged(federation)
    torch.testing.assert_close(again[0].updates[0].delta, again[1].updates[0].delta)


def interrogate_unchanged(federation: Federation) -> tuple[ServerView, ...]:
    class Same(Insistent):
        def craft(self, model: nn.Module, views: Sequence[ServerView], *rest: Any) -> nn.Module | None:
            return model if len(views) < 2 else None

    return ask(federation, Same())[0]


@dataclass(frozen=True)
class Broadcasting(Insistent):
    """Changes what everybody is sent."""

    def on_broadcast(self, params: Tensor, client: int, ctx: RoundContext) -> Tensor:
        return params + 1


def test_only_what_reaches_the_training_changes_its_hash() -> None:
    crafting = PluginSpec("gradinversion", {"method": "imprint", "server": "malicious"})
    cell = Cell(attack=crafting)
    attack = plugins.build("attacks", crafting)
    assert attack.seat == "malicious-server"
    assert type(attack).seat == "server"
    assert training_key(cell, attack) == training_key(replace(cell, attack=None), None)
    assert training_key(cell, Insistent()) == training_key(cell, None)
    assert training_key(cell, Broadcasting()) != training_key(cell, None)


@pytest.mark.parametrize("method", ["imprint", "fishing"])
def test_breaking_the_protocol_has_to_be_said(method: str) -> None:
    with pytest.raises(ConfigError, match=f"write method={method},server=malicious"):
        plugins.build("attacks", PluginSpec("gradinversion", {"method": method}))
    with pytest.raises(ConfigError, match="server=malicious is for method=imprint and method=fishing"):
        plugins.build("attacks", PluginSpec("gradinversion", {"server": "malicious"}))
    with pytest.raises(ConfigError, match="single local step"):
        parameters = {"method": method, "server": "malicious", "local_steps": 2}
        plugins.build("attacks", PluginSpec("gradinversion", parameters))
