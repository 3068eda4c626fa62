"""What a malicious server gets out of its victims: it chooses the model that each of them is sent, query by query.

The training stays honest. Only the victims of a `VictimPlan` are sent crafted models, up to `plan.queries` of them for
the same batch, each through the whole of the client's defense. The adversary sees the answer to one query before it
crafts the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from fedsec.attack import Attack
from fedsec.federation.assemble import Federation
from fedsec.federation.desk import ServerState
from fedsec.federation.seats import Seats
from fedsec.federation.training import Training
from fedsec.federation.victims import Victim, upload_view, victim_context, victim_recipe
from fedsec.findings import PublicData, VictimPlan
from fedsec.types import RoundContext, ServerView


def interrogate(
    federation: Federation,
    training: Training,
    plan: VictimPlan,
    victims: Sequence[tuple[int, Victim]],
    attack: Attack,
    public: PublicData,
) -> list[tuple[ServerView, ...]]:
    """The views of every victim in the order of its queries; one of the honest model where nothing was crafted.

    Args:
        victims: (index, victim) as `victims.victims_of` gives them.
        attack: from the seat `malicious-server`. public: what it may craft with.
    """
    seats = replace(federation.seats, recipe=victim_recipe(federation.seats.recipe, plan), attack=None)
    answers = []
    for index, victim in victims:
        ctx = victim_context(federation, victim, index)
        weights = tuple(t.to(federation.device) for t in training.snapshots[victim.round])
        side = training.state(victim.round, federation).side
        views: list[ServerView] = []
        while len(views) < plan.queries:
            honest = federation.build_model((weights[0], weights[1]))
            model = attack.craft(honest, tuple(views), public, seats.recipe, ctx.adversary())
            if model is None and views:
                break
            sent = federation.build_model((weights[0], weights[1])) if model is None else model
            views.append(query(federation, seats, sent, side, victim, plan, ctx, len(views)))
            if model is None:
                break
        answers.append(tuple(views))
    return answers


def query(
    federation: Federation,
    seats: Seats,
    model: nn.Module,
    side: Mapping[str, Tensor],
    victim: Victim,
    plan: VictimPlan,
    ctx: RoundContext,
    n: int,
) -> ServerView:
    """What reaches the server when this victim, and whoever is summed with it, is sent this model.

    Args:
        side: what goes with the model.
        n: the number of queries that the victim has answered before: each has noise of its own.
    """
    sharing = seats.strategy.sharing(model)
    known = replace(federation.plan, layout=sharing.params)
    defenses = tuple(d.calibrate(known) for d in seats.defenses)
    tensors = dict(model.state_dict(keep_vars=True))
    state = ServerState(
        sharing.params.flatten(tensors),
        sharing.buffers.flatten(tensors),
        federation.initial_state().local,
        side=dict(side),
    )
    noise = replace(ctx, seed=ctx.entropy(f"query/{n}")) if n else ctx
    crafted = replace(seats, model=model, sharing=sharing, defenses=defenses)
    labels = victim.labels if plan.oracle_labels else None
    # Bystanders inside a sum keep their batches from query to query, as the victim does.
    return upload_view(federation, crafted, state, victim, plan, noise, labels, draw=ctx)
