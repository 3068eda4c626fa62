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
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedsec.defense import Aggregation, Aggregator, LocalStep
from fedsec.errors import PayloadError
from fedsec.federation.desk import Desk, ServerState, Site
from fedsec.federation.footprint import changed_images, footprint
from fedsec.federation.local import PlainStep, plain_objective, train_locally
from fedsec.federation.screening import screen
from fedsec.federation.seats import Reply, RoundRecord, Seats, Turn
from fedsec.federation.sharing import load
from fedsec.federation.strategy import report_fault
from fedsec.types import Imitation, Payload, Peers, RoundContext, ServerView, Update, sorted_by_client

# --- the client's seat ------------------------------------------------------------------------------------------


def client_update(
    seats: Seats, turn: Turn, x: Tensor, y: Tensor, batches: Iterable[Tensor] | None = None
) -> tuple[Update, float, int]:
    """As `train_at`, without what the strategy leaves at the client.

    Returns:
        the update, the mean loss, and the number of local steps.
    """
    update, site, steps = train_at(seats, turn, x, y, batches)
    return update, site.loss, steps


def train_at(
    seats: Seats,
    turn: Turn,
    x: Tensor,
    y: Tensor,
    batches: Iterable[Tensor] | None = None,
    rows: Tensor | None = None,
) -> tuple[Update, Site, int]:
    """Train on (x, y) from what was broadcast, and pass the update through the client's defenses.

    Args:
        x, y: all that the client has. batches: what each step takes of those it trains on; None: as the step draws.
        rows: which of its images it trains on in this turn; None: all. What a strategy counts, it counts of all.

    Returns:
        the update, the client's turn as its strategy leaves it, and the number of local steps.
    """
    sharing, ctx, strategy = seats.sharing, turn.ctx, seats.strategy
    load(seats.model, sharing, turn.params, turn.buffers, turn.local)
    own = dict(turn.own)
    site = Site(turn.client, seats.model, sharing, turn.params, seats.recipe, ctx, own, turn.received, x, y)
    strategy.begin(site)
    objective = strategy.objective(site, plain_objective(seats.recipe.task))
    planted = seats.planted if seats.planted is not None and not seats.planted.of_clients else None
    plain = PlainStep(site.model, seats.recipe, objective)
    if planted is not None:
        plain = planted.step(site.model, seats.recipe, objective, seats.defenses, ctx)
    step: LocalStep = strategy.local_step(plain, site)
    for defense in seats.defenses:
        step = defense.local_step(step, ctx)
    if planted is not None:
        step = planted.witness(step, seats.recipe, seats.defenses, ctx, len(site.x))
    chosen = (site.x, site.y) if rows is None else (site.x[rows], site.y[rows])
    site.loss, steps = train_locally(step, *chosen, seats.recipe, ctx, batches, turn.max_steps)
    strategy.finish(site)
    update = Update(
        client=turn.client,
        delta=site.shared().sub_(turn.params),
        num_samples=len(x) if rows is None else len(rows),
        buffers=site.buffers() if sharing.buffers.size else None,
        extras=strategy.report(site),
        wire=strategy.wire(site),
    )
    for defense in seats.defenses:
        update = sized(defense.on_upload(update, ctx), update)
    return update, site, steps


def polish(seats: Seats, turn: Turn, x: Tensor, y: Tensor) -> Reply:
    """A client trains on for itself alone: no defense acts, since nothing leaves it."""
    start = time.perf_counter()
    recipe = replace(seats.recipe, epochs=seats.strategy.final_epochs, steps=None)
    load(seats.model, seats.sharing, turn.params, turn.buffers, turn.local)
    loss, steps = train_locally(PlainStep(seats.model, recipe), x, y, recipe, turn.ctx)
    own = dict(turn.own)
    site = Site(turn.client, seats.model, seats.sharing, turn.params, recipe, turn.ctx, own, turn.received, x, y, loss)
    site.keep_personal()
    return Reply(turn.client, None, _local(seats), loss, steps, time.perf_counter() - start, own=own)


def _local(seats: Seats) -> Tensor | None:
    local = seats.sharing.local
    return local.flatten(dict(seats.model.state_dict(keep_vars=True))) if local.size else None


def sized(update: Update, before: Update) -> Update:
    """A size on the wire describes one vector: who replaces the vector and is silent about its size sends it whole."""
    stale = update.wire is not None and update.wire is before.wire and update.delta is not before.delta
    return replace(update, wire=None) if stale else update


def client_turn(
    seats: Seats,
    turn: Turn,
    x: Tensor,
    y: Tensor,
    batches: Iterable[Tensor] | None = None,
    rows: Tensor | None = None,
) -> Reply:
    """A whole turn at one client: train, defend, encode. A malicious client's update is finished by the adversary.

    `batches` and `rows` are those of `train_at`.
    """
    if turn.keep:
        return polish(seats, turn, x, y)
    start = time.perf_counter()
    malicious = turn.client in seats.malicious
    tampered = 0
    if malicious and seats.attack is not None:
        clean = x, y
        x, y = seats.attack.on_data(x, y, turn.ctx.adversary())
        tampered = changed_images(clean, (x, y))
    update, site, steps = train_at(seats, turn, x, y, batches, rows)
    content = update if malicious else seats.aggregator.encode(update, turn.ctx)
    seconds = time.perf_counter() - start
    seen = seats.planted.seen() if seats.planted is not None else None
    local = _local(seats)
    return Reply(turn.client, content, local, site.loss, steps, seconds, tampered=tampered, own=site.own, seen=seen)


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
    turns = [turn_of(seats, state, k, ctx, limits.get(k)) for k in participants]
    replies: list[Reply] = sorted_by_client(train(turns))
    failed = {r.client: r.failure for r in replies if r.failure is not None}
    replies = [r for r in replies if r.failure is None]
    payloads = collect(seats, replies, ctx, state.params)
    if seats.planted is not None:
        for reply in replies:
            seats.planted.collect(reply.client, reply.seen)
        payloads = sorted_by_client([*payloads, *seats.planted.payloads(seats.defenses, seats.aggregator, ctx)])
    state.local.update({r.client: r.local for r in replies if r.local is not None})
    state.own.update({r.client: dict(r.own) for r in replies if r.own})
    state.trained.update(r.client for r in replies)

    if seats.root is not None and seats.aggregator.needs_root:
        seats.aggregator.receive_root(root_update(seats, state, ctx))
    result, rejected, flags, accepted = aggregate(seats, payloads, ctx)
    failed |= rejected
    looks = seats.attack is not None and seats.attack.seat in ("server", "malicious-server")
    if looks or watch is not None:
        steps = max((r.steps for r in replies), default=0)
        view = server_view(seats, state, payloads, result, steps, ctx)
        if seats.attack is not None and looks:
            seats.attack.on_view(view, ctx.adversary())
        if watch is not None:
            watch(view)
    before = state.params
    flags += apply(seats, state, result, ctx)
    given = dict(result.weights) if result is not None else {}
    seats.strategy.serve(Desk(state, before, accepted, given, seats.model, seats.sharing, ctx))
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


def turn_of(seats: Seats, state: ServerState, client: int, ctx: RoundContext, limit: int | None = None) -> Turn:
    """A client's work order: what the server sends it, and what it kept itself."""
    return Turn(
        client,
        broadcast(seats, state.params_for(client), client, ctx),
        state.buffers,
        ctx.for_client(client),
        state.local.get(client),
        limit,
        state.own.get(client, {}),
        seats.strategy.received(state, client),
    )


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
) -> tuple[Aggregation | None, dict[int, str], list[str], tuple[Update, ...]]:
    """Screen, let the defenses look, and combine. None where no payload survived; last, the updates in clear."""
    accepted = list(payloads)
    rejected: dict[int, str] = {}
    flags: list[str] = []
    if seats.aggregator.sees_individuals:
        accepted, rejected, flags = screen(payloads, seats.sharing.params, seats.sharing.buffers)
        faults = {p.client: report_fault(seats.strategy, p.content) for p in accepted}
        rejected |= {client: fault for client, fault in faults.items() if fault is not None}
        accepted = [p for p in accepted if faults[p.client] is None]
        by_client = {p.client: p for p in accepted}
        updates: Sequence[Update] = [p.content for p in accepted]
        for defense in reversed(seats.defenses):
            updates = defense.on_receive(updates, ctx)
        accepted = [replace(by_client[u.client], content=u) for u in updates]
    if not accepted:
        return None, rejected, flags, ()
    seats.aggregator.turned_away(rejected)
    clear = tuple(p.content for p in accepted if seats.aggregator.sees_individuals)
    weights = seats.strategy.weights({p.client: p.num_samples for p in accepted})
    weights = seats.strategy.reweigh(weights, {u.client: u.extras for u in clear}, ctx)
    seats.aggregator.begin(weights, ctx)
    for payload in accepted:
        seats.aggregator.accumulate(payload, ctx)
    result = seats.aggregator.finish(ctx)
    return result, rejected | dict(result.rejected), [*flags, *result.flags], clear


def server_view(
    seats: Seats,
    state: ServerState,
    payloads: Sequence[Payload],
    result: Aggregation | None,
    local_steps: int,
    ctx: RoundContext,
    oracle_labels: Tensor | None = None,
    imitated: Imitation | None = None,
) -> ServerView:
    """What reached the server: individual updates (or what the rule lets it read of them), else the sum alone."""
    individual = [seats.aggregator.readable(p) for p in payloads]
    seen = seats.strategy.visible(state)
    updates = tuple(u for u in individual if isinstance(u, Update) and (seen is None or u.client in seen))
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
        params=state.params_for(updates[0].client) if len(updates) == 1 else state.params,
        sent={u.client: state.sent[u.client] for u in updates if u.client in state.sent},
        buffers=state.buffers if seats.sharing.buffers.size else None,
        layout=seats.sharing.params,
        buffer_layout=seats.sharing.buffers,
        updates=updates,
        clients_in_sum=clients_in_sum,
        recipe=seats.recipe,
        local_steps=local_steps,
        knowledge=knowledge,
        oracle_labels=oracle_labels,
        imitation=imitated,
    )


def _in_clear(payload: Payload) -> bool:
    return isinstance(payload.content, Update)
