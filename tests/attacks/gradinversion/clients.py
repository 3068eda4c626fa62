"""Uploads made by the code of a federated round itself, with BatchNorm's statistics shared or kept at the client."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fedsec.federation.desk import ServerState
from fedsec.federation.round import client_turn, server_view
from fedsec.federation.seats import Seats, Turn
from fedsec.federation.strategy import FedAvg, resolve
from fedsec.types import LocalRecipe, Payload, RoundContext, ServerView


def view_of_round(
    model: nn.Module, x: Tensor, y: Tensor, recipe: LocalRecipe, *, shared: bool = True, oracle: Tensor | None = None
) -> ServerView:
    """What the server sees of one client that takes `recipe.steps` steps on the whole batch.

    `shared=False`: running statistics stay at the client, and never reach the server (SiloBN).
    """
    client = copy.deepcopy(model)
    sharing = resolve(client, () if shared else ("key:*running_*",), "test")
    tensors = dict(client.state_dict(keep_vars=True))
    params, buffers = (layout.flatten(tensors) for layout in (sharing.params, sharing.buffers))
    local = sharing.local.flatten(tensors) if sharing.local.size else None
    seats = Seats(client, recipe, FedAvg(), sharing)
    ctx, steps = RoundContext(0, 1, 1), recipe.steps or 1
    turn = Turn(0, params, buffers, ctx.for_client(0), local)
    reply = client_turn(seats, turn, x, y, [torch.arange(len(x))] * steps)
    assert isinstance(reply.content, Payload)
    return server_view(seats, ServerState(params, buffers), [reply.content], None, steps, ctx, oracle)
