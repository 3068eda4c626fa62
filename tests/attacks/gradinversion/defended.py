"""Victims behind a defense: their uploads go through the code of a federated round, every hook included."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedsec.defense import Aggregation, Aggregator, Defense
from fedsec.federation.aggregate import WeightedMean
from fedsec.federation.desk import ServerState
from fedsec.federation.round import aggregate, client_turn, collect, server_view
from fedsec.federation.seats import Seats, Turn
from fedsec.federation.sharing import load
from fedsec.federation.strategy import FedAvg
from fedsec.types import FederationPlan, LocalRecipe, Payload, RoundContext, ServerView, Update

Batch = tuple[Tensor, Tensor]


class HiddenSum(Aggregator):
    """What secure aggregation leaves to see: the weighted mean, and nobody's own update."""

    sees_individuals = False

    def __init__(self) -> None:
        self._mean = WeightedMean()

    def begin(self, weights: Mapping[int, float], ctx: RoundContext) -> None:
        self._mean.begin(weights, ctx)

    def accumulate(self, payload: Payload, ctx: RoundContext) -> None:
        self._mean.accumulate(payload, ctx)

    def finish(self, ctx: RoundContext) -> Aggregation:
        return self._mean.finish(ctx)


def prepared(model: nn.Module, defenses: Sequence[Defense]) -> nn.Module:
    """A copy of the model as the defenses want it."""
    model = copy.deepcopy(model)
    for defense in defenses:
        model = defense.prepare_model(model)
    return model


def seats_of(
    model: nn.Module,
    defenses: Sequence[Defense],
    recipe: LocalRecipe,
    *,
    training: LocalRecipe | None = None,
    clients: int = 1,
    size: int = 471,
    rounds: int = 10,
    hidden: bool = False,
) -> Seats:
    """Seats of `clients` hospitals with `size` images each, around a prepared model.

    Args:
        recipe: of the victim's steps. training: what budgets are calibrated on; the same where not given.
    """
    strategy = FedAvg(uniform=True, max_weight=1.0)
    sharing = strategy.sharing(model)
    plan = FederationPlan(training or recipe, rounds, (size,) * clients, layout=sharing.params)
    calibrated = tuple(defense.calibrate(plan) for defense in defenses)
    aggregator: Aggregator = HiddenSum() if hidden else WeightedMean()
    return Seats(copy.deepcopy(model), recipe, strategy, sharing, calibrated, aggregator=aggregator)


def view_of(seats: Seats, batches: Sequence[Batch], *, seed: int = 0, told: bool = False) -> ServerView:
    """What the server sees after each client took its local steps on its whole batch; one client unless hidden."""
    tensors = dict(seats.model.state_dict(keep_vars=True))
    state = ServerState(seats.sharing.params.flatten(tensors), seats.sharing.buffers.flatten(tensors))
    ctx = RoundContext(seed, 1, 10)
    replies = []
    for client, (x, y) in enumerate(batches):
        turn = Turn(client, state.params, state.buffers, ctx.for_client(client))
        replies.append(client_turn(seats, turn, x, y, [torch.arange(len(x))] * (seats.recipe.steps or 1)))
    load(seats.model, seats.sharing, state.params, state.buffers, None)  # the next view is of the same broadcast
    payloads = collect(seats, replies, ctx)
    result = aggregate(seats, payloads, ctx)[0] if not seats.aggregator.sees_individuals else None
    labels = torch.cat([y for _, y in batches]) if told else None
    return server_view(seats, state, payloads, result, seats.recipe.steps or 1, ctx, labels)


def update_of(view: ServerView) -> Update:
    """The one entry of a view."""
    (update,) = view.updates
    return update
