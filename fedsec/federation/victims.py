"""What a curious server is shown of chosen victims: uploads made by the very code of a federated round.

A victim is a batch of a client's images. In an observed round the client trains on that batch, from the model that
was broadcast, through its whole defense; the server sees what reaches it. What a strategy takes from all of a client's
images, such as its class counts, it takes from all of them. Where the aggregator hides individuals, every other client
takes part with a batch of its own, and the server sees the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedsec.errors import ConfigError, PayloadError, RunError
from fedsec.federation.assemble import Federation, tensors
from fedsec.federation.desk import ServerState
from fedsec.federation.imitation import imitation
from fedsec.federation.local import shuffled_batches
from fedsec.federation.round import aggregate, client_turn, collect, server_view, turn_of
from fedsec.federation.seats import Seats
from fedsec.federation.training import Training
from fedsec.findings import VictimPlan
from fedsec.types import LocalRecipe, RoundContext, ServerView


@dataclass(frozen=True)
class Victim:
    """The truth behind one view. No attack ever receives it."""

    client: int
    round: int
    rows: np.ndarray
    """Data set rows."""
    images: Tensor
    labels: Tensor


def rounds_of(plan: VictimPlan, rounds: int) -> tuple[int, ...]:
    """The plan's rounds as 1-based numbers, -1 being the last; each once, sorted."""
    chosen = sorted({rounds if r == -1 else r for r in plan.rounds})
    for number in chosen:
        if not 1 <= number <= rounds + 1:
            raise ConfigError(f"round {number} cannot be observed: this run has rounds 1 to {rounds}")
    return tuple(chosen)


def choose(federation: Federation, plan: VictimPlan) -> list[tuple[int, np.ndarray]]:
    """(client, data set rows) of each victim: a function of data, partition and seed, whatever the defense."""
    rng = RoundContext(federation.cell.seed, 0, 0).numpy("victims")
    owned = federation.rows if plan.split == "train" else federation.partition.deal(federation.dataset, "test")
    seen = federation.seats.strategy.visible(federation.initial_state())
    pools = {k: list(rng.permutation(rows)) for k, rows in enumerate(owned) if len(rows) >= plan.batch}
    pools = {k: rows for k, rows in pools.items() if seen is None or k in seen}
    victims: list[tuple[int, np.ndarray]] = []
    count = max(1, plan.images // plan.batch)
    while len(victims) < count and pools:
        for client in list(pools):
            if len(pools[client]) < plan.batch:
                del pools[client]
            elif len(victims) < count:
                rows = [pools[client].pop() for _ in range(plan.batch)]
                victims.append((client, np.array(rows)))
    if len(victims) < count:
        raise ConfigError(
            f"{count} victim batches of {plan.batch} images were asked for, the clients' {plan.split} images make only "
            f"{len(victims)}: lower images or batch"
        )
    return victims


def victims_of(federation: Federation, plan: VictimPlan) -> list[tuple[int, Victim]]:
    """(index, victim), round by round; the index tells the victims of one round apart."""
    chosen = choose(federation, plan)
    found = []
    for number in rounds_of(plan, federation.cell.federation.rounds):
        for index, (client, rows) in enumerate(chosen):
            x, y = _images(federation, rows)
            found.append((index, Victim(client, number, rows, x.cpu(), y.cpu())))
    return found


def victim_context(federation: Federation, victim: Victim, index: int) -> RoundContext:
    """A stream of its own for each victim: no two share noise with each other or with the training."""
    here = RoundContext(federation.cell.seed, victim.round, federation.cell.federation.rounds, victim.client)
    return replace(here.apart(f"victim/{index}"), client=None)


def observe(federation: Federation, training: Training, plan: VictimPlan) -> tuple[list[ServerView], list[Victim]]:
    """The views that the plan asks for, round by round, and the truth behind each."""
    views: list[ServerView] = []
    victims = victims_of(federation, plan)
    seats = replace(federation.seats, recipe=victim_recipe(federation.seats.recipe, plan))
    for index, victim in victims:
        state = training.state(victim.round, federation)
        ctx = victim_context(federation, victim, index)
        labels = victim.labels if plan.oracle_labels else None
        views.append(upload_view(federation, seats, state, victim, plan, ctx, labels))
    return views, [victim for _, victim in victims]


def victim_recipe(recipe: LocalRecipe, plan: VictimPlan) -> LocalRecipe:
    """The clients' recipe for a victim's few steps or epochs on its images."""
    steps = plan.local_steps if plan.epochs is None else None
    size = min(plan.batch_size or plan.batch, plan.batch)
    return replace(recipe, steps=steps, epochs=plan.epochs, batch_size=size, mode=plan.mode or recipe.mode)


def local_batches(recipe: LocalRecipe, size: int, ctx: RoundContext) -> list[Tensor]:
    """Index batches of a victim's local training on `size` images; the order of several is the client's secret."""
    if size > recipe.batch_size:
        return list(shuffled_batches(size, recipe, ctx.generator("batches")))
    return [torch.arange(size)] * (recipe.steps or recipe.epochs or 0)


def upload_view(
    federation: Federation,
    seats: Seats,
    state: ServerState,
    victim: Victim,
    plan: VictimPlan,
    ctx: RoundContext,
    labels: Tensor | None,
    draw: RoundContext | None = None,
) -> ServerView:
    """What reaches the server when this client trains on this batch.

    Args:
        ctx: of the noise. draw: of the bystanders' batches, where it is another one.
    """
    hidden = not seats.aggregator.sees_individuals
    replies = []
    for client in range(len(federation.clients)) if hidden else [victim.client]:
        x, y = federation.clients[client]
        if client == victim.client:
            x, y, rows = _with_victim(federation, victim)
        else:
            rows = _bystander(len(x), plan.batch, (draw or ctx).for_client(client))
        batches = local_batches(seats.recipe, len(rows), ctx.for_client(client))
        turn = turn_of(seats, state, client, ctx)
        try:
            replies.append(client_turn(seats, turn, x, y, batches, rows.to(y.device)))
        except PayloadError as error:
            raise RunError(f"observing client {victim.client}: client {client} sends nothing: {error}") from None
    payloads = collect(seats, replies, ctx)
    result = aggregate(seats, payloads, ctx)[0] if hidden else None
    known = None if hidden else imitation(seats, state, victim.client, ctx)
    view = server_view(seats, state, payloads, result, max(r.steps for r in replies), ctx, labels, known)
    own = tuple(u for u in view.updates if u.client == victim.client)  # bystanders are in the sum, not in the view
    return replace(view, params=view.params.cpu(), updates=own or view.updates)


def _with_victim(federation: Federation, victim: Victim) -> tuple[Tensor, Tensor, Tensor]:
    """All images and labels of the victim's client, and which of them it trains on; images not its own come last."""
    x, y = federation.clients[victim.client]
    place = {row: i for i, row in enumerate(federation.rows[victim.client].tolist())}
    if all(row in place for row in victim.rows.tolist()):
        return x, y, torch.tensor([place[row] for row in victim.rows.tolist()])
    new = tensors(federation.dataset, victim.rows, federation.device)
    return torch.cat([x, new[0]]), torch.cat([y, new[1]]), torch.arange(len(x), len(x) + len(victim.rows))


def _bystander(images: int, batch: int, ctx: RoundContext) -> Tensor:
    return torch.from_numpy(ctx.numpy("bystander").choice(images, min(batch, images), replace=False))


def _images(federation: Federation, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    x, y = federation.dataset.batch(rows)
    return x.to(device=federation.device, memory_format=torch.channels_last), y.to(federation.device)
