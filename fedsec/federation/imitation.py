"""How a curious server imitates a client's loss: as the strategy would have it, with public images for the client's.

The server wrote the strategy, broadcast the model and sent what goes with it. It lacks the client's images, its labels
and what the client keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedsec.federation.composition import overrides
from fedsec.federation.desk import Objective, ServerState, Site
from fedsec.federation.local import plain_objective
from fedsec.federation.seats import Seats
from fedsec.federation.sharing import Sharing
from fedsec.federation.strategy import Strategy
from fedsec.types import Descent, Layout, LocalRecipe, RoundContext, ServerView


@dataclass(frozen=True)
class StrategyImitation:
    """What the server knows of one client's turn; can be pickled."""

    strategy: Strategy
    sharing: Sharing
    client: int
    params: Tensor
    """(d,) what the client was sent."""
    received: Mapping[str, Tensor]
    """What it was sent beside the model."""
    remembered: Mapping[str, Tensor]
    """What the client keeps and the server has seen (`Strategy.remembered`)."""
    recipe: LocalRecipe
    ctx: RoundContext
    """Of that round, with draws that are not the client's."""

    @property
    def descent(self) -> Descent:
        """What the client's steps do beside following the gradient."""
        return self.strategy.descent()

    def trained(self, view: ServerView, model: nn.Module) -> tuple[ServerView, nn.Module]:
        """As `fedsec.types.Imitation`."""
        part = None if view.knowledge else self.strategy.part(model, self.client)
        if part is None:
            return view, model
        small, places = part
        layout = Layout.of({name: p for name, p in small.named_parameters() if name in view.layout.names})

        def cut(flat: Tensor) -> Tensor:
            whole = view.layout.views(flat)
            return torch.cat([whole[name][places[name]].reshape(-1) for name in layout.names])

        updates = tuple(replace(u, delta=cut(u.delta)) for u in view.updates)
        return replace(view, layout=layout, params=cut(view.params), updates=updates), small

    def objective(self, model: nn.Module, images: Tensor, labels: Tensor) -> Objective | None:
        """As `fedsec.types.Imitation`."""
        like = next(model.parameters())

        def cast(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {k: t.to(like) if t.is_floating_point() else t.to(like.device) for k, t in tensors.items()}

        site = Site(
            client=self.client,
            model=model,
            sharing=self.sharing,
            params=self.params.to(like),
            recipe=self.recipe,
            ctx=self.ctx,
            own=cast(self.remembered),
            received=cast(self.received),
            x=images.to(like),
            y=labels.to(like.device),
        )
        base = plain_objective(self.recipe.task)
        with torch.no_grad():
            found = self.strategy.objective(site, base)
        return None if found is base else found


def imitation(seats: Seats, state: ServerState, client: int, ctx: RoundContext) -> StrategyImitation | None:
    """What a server that sees this client's update can imitate; None where it trains as the recipe says."""
    strategy = seats.strategy
    if not overrides(strategy, ("objective", "descent", "part")):
        return None
    # What a client sent is what it keeps only where nothing came between.
    clear = seats.aggregator.sees_individuals and not seats.defenses
    own = state.own.get(client, {}) if clear else {}
    return StrategyImitation(
        strategy=strategy,
        sharing=seats.sharing,
        client=client,
        params=state.params_for(client).cpu(),
        received={k: t.cpu() for k, t in strategy.received(state, client).items()},
        remembered={k: own[k].cpu() for k in strategy.remembered if k in own},
        recipe=seats.recipe,
        ctx=ctx.for_client(client).adversary(),
    )
