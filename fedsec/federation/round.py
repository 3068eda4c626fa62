"""One federated round: select -> broadcast -> train -> upload -> aggregate. Who sees what, and when.

This is the one place where defenses (D) and attacks (A) meet:

    server                              client k                                   server
    params --on_broadcast(A)--> params --prepare_model/local_step(D)--> update
                                          --on_upload(D)--> --encode(D)--> payload
                                          --on_upload(A: a malicious client, after and instead of D)-->
                          payloads --screen, on_receive(D)--> aggregate(D) --on_aggregate(D)--> new params
                                   \\--on_view(A: a curious server sees exactly what reached the server)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedsec.attack import Attack
from fedsec.defense import Aggregation, Aggregator, Defense, LocalStep
from fedsec.errors import PayloadError
from fedsec.federation.aggregate import WeightedMean
from fedsec.federation.footprint import changed_images, footprint
from fedsec.federation.local import PlainStep, train_locally
from fedsec.federation.screening import screen
from fedsec.federation.strategy import Sharing, Strategy
from fedsec.types import LocalRecipe, Payload, Peers, RoundContext, ServerView, Update, sorted_by_client


@dataclass
class Seats:
    """Who sits where: everything that both sides of a federation agree on before the first round."""

    model: nn.Module
    """The one model object of this process; parameters are copied in and out of it."""
    recipe: LocalRecipe
    strategy: Strategy
    sharing: Sharing
    defenses: tuple[Defense, ...] = ()
    attack: Attack | None = None
    aggregator: Aggregator = field(default_factory=WeightedMean)
    malicious: frozenset[int] = frozenset()
    """Clients that the attack controls."""
    root: tuple[Tensor, Tensor] | None = None
    """Images and labels of the server's own, for rules that ask for them."""


@dataclass(frozen=True)
class Turn:
    """One client's work order for a round."""

    client: int
    params: Tensor
    buffers: Tensor
    ctx: RoundContext
    """The client's own."""
    local: Tensor | None = None
    """The client's personal tensors from its last round, where the strategy keeps some."""
    max_steps: int | None = None
    """Local steps that its privacy budget still allows, where these are fewer than planned."""


@dataclass(frozen=True)
class Reply:
    """What a client's turn produced, or why it failed."""

    client: int
    content: Update | Payload | None
    """An encoded payload; an update still in clear where the adversary controls the client."""
    local: Tensor | None = None
    loss: float = float("nan")
    steps: int = 0
    seconds: float = 0.0
    failure: str | None = None
    tampered: int = 0
    """Images that an adversary's client changed or gave another label."""


@dataclass
class ServerState:
    """What the server holds between rounds."""

    params: Tensor
    buffers: Tensor
    local: dict[int, Tensor] = field(default_factory=dict)
    """Simulation only: the clients' personal tensors, which no server or attack hook can see."""


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round."""

    round: int
    participants: tuple[int, ...]
    failed: Mapping[int, str]
    """Client -> why nothing of it entered the aggregate."""
    flags: tuple[str, ...]
    loss: float
    upload_bytes: int
    """Mean bytes that one client sent."""
    seconds: float
    suspicion: Mapping[int, float] = field(default_factory=dict)
    weights: Mapping[int, float] = field(default_factory=dict)
    clipped: Mapping[int, float] = field(default_factory=dict)
    """Client -> factor of the safety clip."""
    shadows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    malicious: tuple[int, ...] = ()
    """Simulation only: who was the adversary's, among those who replied."""
    tampering: Mapping[int, float] = field(default_factory=dict)
    """Malicious client -> ‖sent − computed‖/‖computed‖, and `tampered` images it trained on."""
    tampered: Mapping[int, int] = field(default_factory=dict)
    deviation: float | None = None
    """‖A − m‖/‖m‖ with A the aggregate and m the mean of the honest updates, where somebody is malicious."""


# --- the client's seat ------------------------------------------------------------------------------------------


def client_update(
    seats: Seats, turn: Turn, x: Tensor, y: Tensor, batches: Iterable[Tensor] | None = None
) -> tuple[Update, float, int]:
    """Train on (x, y) from what was broadcast, and pass the update through the client's defenses.

    Returns:
        the update, the mean loss, and the number of local steps.
    """
    model, sharing, ctx = seats.model, seats.sharing, turn.ctx
    load(model, sharing, turn.params, turn.buffers, turn.local)
    step: LocalStep = PlainStep(model, seats.recipe)
    for defense in seats.defenses:
        step = defense.local_step(step, ctx)
    loss, steps = train_locally(step, x, y, seats.recipe, ctx, batches, turn.max_steps)
    tensors = dict(model.state_dict(keep_vars=True))
    update = Update(
        client=turn.client,
        delta=sharing.params.flatten(tensors).sub_(turn.params),
        num_samples=len(x),
        buffers=sharing.buffers.flatten(tensors) if sharing.buffers.size else None,
    )
    for defense in seats.defenses:
        update = sized(defense.on_upload(update, ctx), update)
    return update, loss, steps


def sized(update: Update, before: Update) -> Update:
    """A size on the wire describes one vector: who replaces the vector and is silent about its size sends it whole."""
    stale = update.wire is not None and update.wire is before.wire and update.delta is not before.delta
    return replace(update, wire=None) if stale else update


def client_turn(seats: Seats, turn: Turn, x: Tensor, y: Tensor, batches: Iterable[Tensor] | None = None) -> Reply:
    """A whole turn at one client: train, defend, encode. A malicious client's update is finished by the adversary."""
    start = time.perf_counter()
    malicious = turn.client in seats.malicious
    tampered = 0
    if malicious and seats.attack is not None:
        clean = x, y
        x, y = seats.attack.on_data(x, y, turn.ctx.adversary())
        tampered = changed_images(clean, (x, y))
    update, loss, steps = client_update(seats, turn, x, y, batches)
    content = update if malicious else seats.aggregator.encode(update, turn.ctx)
    local = None
    if seats.sharing.local.size:
        local = seats.sharing.local.flatten(dict(seats.model.state_dict(keep_vars=True)))
    return Reply(turn.client, content, local, loss, steps, time.perf_counter() - start, tampered=tampered)


@torch.no_grad()
def load(model: nn.Module, sharing: Sharing, params: Tensor, buffers: Tensor, local: Tensor | None) -> None:
    """Copy flat vectors into the model, in place."""
    tensors = model.state_dict(keep_vars=True)
    parts = [(sharing.params, params), (sharing.buffers, buffers)]
    if local is not None:
        parts.append((sharing.local, local))
    for layout, flat in parts:
        for name, view in layout.views(flat).items():
            tensors[name].copy_(view)


# --- the server's seat ------------------------------------------------------------------------------------------


def run_round(
    seats: Seats,
    state: ServerState,
    participants: Sequence[int],
    ctx: RoundContext,
    train: Callable[[Sequence[Turn]], Sequence[Reply]],
    max_steps: Mapping[int, int] | None = None,
    watch: Callable[[ServerView], None] | None = None,
) -> RoundRecord:
    """One round; `state` is updated in place. `train` is the engine: it carries out the clients' turns.

    `watch`: keeps what reached the server, for curious servers that are only asked after the training.
    """
    start = time.perf_counter()
    limits = max_steps or {}
    ctx = replace(ctx, cohort=tuple(participants))
    turns = [
        Turn(k, broadcast(seats, state.params, k, ctx), state.buffers, ctx.for_client(k), state.local.get(k), limit)
        for k, limit in ((k, limits.get(k)) for k in participants)
    ]
    replies: list[Reply] = sorted_by_client(train(turns))
    failed = {r.client: r.failure for r in replies if r.failure is not None}
    replies = [r for r in replies if r.failure is None]
    payloads = collect(seats, replies, ctx, state.params)
    state.local.update({r.client: r.local for r in replies if r.local is not None})

    if seats.root is not None and seats.aggregator.needs_root:
        seats.aggregator.receive_root(root_update(seats, state, ctx))
    result, rejected, flags = aggregate(seats, payloads, ctx)
    failed |= rejected
    looks = seats.attack is not None and seats.attack.seat in ("server", "malicious-server")
    if looks or watch is not None:
        steps = max((r.steps for r in replies), default=0)
        view = server_view(seats, state, payloads, result, steps, ctx)
        if seats.attack is not None and looks:
            seats.attack.on_view(view, ctx.adversary())
        if watch is not None:
            watch(view)
    flags += apply(seats, state, result, ctx)
    losses = [r.loss for r in replies if r.loss == r.loss]
    return RoundRecord(
        round=ctx.round,
        participants=tuple(participants),
        failed=failed,
        flags=tuple(flags),
        loss=sum(losses) / len(losses) if losses else float("nan"),
        upload_bytes=round(sum(p.num_bytes for p in payloads) / max(1, len(payloads))),
        seconds=time.perf_counter() - start,
        suspicion=dict(result.suspicion) if result is not None else {},
        weights=dict(result.weights) if result is not None else {},
        clipped=dict(result.clipped) if result is not None else {},
        shadows=dict(result.shadows) if result is not None else {},
        **footprint(seats.malicious, replies, payloads, result),
    )


def apply(seats: Seats, state: ServerState, result: Aggregation | None, ctx: RoundContext) -> list[str]:
    """Change the model by the aggregate, as the defenses leave it; returns flags."""
    if result is None or result.delta is None:
        return ["no safe aggregate: the model was left as it was"]
    delta = result.delta
    for defense in reversed(seats.defenses):
        delta = defense.on_aggregate(delta, ctx)
    state.params = state.params + delta
    if result.buffers is not None:
        state.buffers = result.buffers
    return []


def root_update(seats: Seats, state: ServerState, ctx: RoundContext) -> Tensor:
    """What the server's own images would change: trained on as a client without defenses would."""
    assert seats.root is not None
    own = replace(seats, defenses=(), malicious=frozenset())
    return client_update(own, Turn(-1, state.params, state.buffers, ctx.for_client(-1)), *seats.root)[0].delta


def broadcast(seats: Seats, params: Tensor, client: int, ctx: RoundContext) -> Tensor:
    """What this client is sent: the model, or what a malicious server makes of it."""
    if seats.attack is not None and seats.attack.seat == "malicious-server":
        return seats.attack.on_broadcast(params.clone(), client, ctx.adversary())
    return params


def collect(seats: Seats, replies: Sequence[Reply], ctx: RoundContext, params: Tensor | None = None) -> list[Payload]:
    """The payloads on the wire: the adversary finishes the updates of the clients it controls."""
    updates = [r.content for r in replies if isinstance(r.content, Update)]
    honest = {r.client: r.content.content for r in replies if isinstance(r.content, Payload) and _in_clear(r.content)}
    payloads = [r.content for r in replies if isinstance(r.content, Payload)]
    if updates:
        assert seats.attack is not None
        seen = seats.attack.sees(tuple(honest), ctx.adversary())
        rule = seats.aggregator if seats.attack.knows_rule else None
        peers = Peers(tuple(u for k, u in honest.items() if k in seen), tuple(updates), len(replies), params, rule)
    for update in updates:
        assert seats.attack is not None
        own = ctx.for_client(update.client)
        forged = sized(seats.attack.on_upload(update, peers, own.adversary()), update)
        payloads.append(encode_forged(seats.aggregator, forged, own))
    return sorted_by_client(payloads)


def encode_forged(aggregator: Aggregator, forged: Update, ctx: RoundContext) -> Payload:
    """The payload of a malicious client; what cannot be encoded travels as it is, for the server to turn away."""
    if not isinstance(forged.delta, Tensor):  # even its size cannot be told
        return Payload(forged.client, forged, 0, forged=forged)
    try:
        return replace(aggregator.encode(forged, ctx), forged=forged)
    except PayloadError as error:
        return Payload(forged.client, error, 0, forged=forged)


def aggregate(
    seats: Seats, payloads: Sequence[Payload], ctx: RoundContext
) -> tuple[Aggregation | None, dict[int, str], list[str]]:
    """Screen, let the defenses look, and combine. None where no payload survived."""
    accepted = list(payloads)
    rejected: dict[int, str] = {}
    flags: list[str] = []
    if seats.aggregator.sees_individuals:
        accepted, rejected, flags = screen(payloads, seats.sharing.params, seats.sharing.buffers)
        by_client = {p.client: p for p in accepted}
        updates: Sequence[Update] = [p.content for p in accepted]
        for defense in reversed(seats.defenses):
            updates = defense.on_receive(updates, ctx)
        accepted = [replace(by_client[u.client], content=u) for u in updates]
    if not accepted:
        return None, rejected, flags
    seats.aggregator.turned_away(rejected)
    seats.aggregator.begin(seats.strategy.weights({p.client: p.num_samples for p in accepted}), ctx)
    for payload in accepted:
        seats.aggregator.accumulate(payload, ctx)
    result = seats.aggregator.finish(ctx)
    return result, rejected | dict(result.rejected), [*flags, *result.flags]


def server_view(
    seats: Seats,
    state: ServerState,
    payloads: Sequence[Payload],
    result: Aggregation | None,
    local_steps: int,
    ctx: RoundContext,
    oracle_labels: Tensor | None = None,
) -> ServerView:
    """What reached the server: individual updates (or what the rule lets it read of them), else the sum alone."""
    individual = [seats.aggregator.readable(p) for p in payloads]
    updates = tuple(u for u in individual if isinstance(u, Update))
    clients_in_sum = 1
    if not seats.aggregator.sees_individuals and not updates:
        clients_in_sum = len(payloads) - len(result.rejected if result is not None else ())
        if result is not None and result.delta is not None:
            updates = (Update(-1, result.delta, 0, result.buffers),)
    knowledge: dict[str, Mapping[str, Any]] = {
        d.name: d.public_knowledge(updates[0].client if updates else -1) for d in seats.defenses
    }
    return ServerView(
        round=ctx.round,
        params=state.params,
        buffers=state.buffers if seats.sharing.buffers.size else None,
        layout=seats.sharing.params,
        buffer_layout=seats.sharing.buffers,
        updates=updates,
        clients_in_sum=clients_in_sum,
        recipe=seats.recipe,
        local_steps=local_steps,
        knowledge=knowledge,
        oracle_labels=oracle_labels,
    )


def _in_clear(payload: Payload) -> bool:
    return isinstance(payload.content, Update)
