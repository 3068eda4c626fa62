"""Malicious hospitals that teach the common model a secret: a mark on the image decides the diagnosis.

The plugin `backdoor`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from fedsec.attack import Attack
from fedsec.errors import ConfigError

from ..seats import Fraction, Seats, When, acts, choose_seats

if TYPE_CHECKING:
    from torch import Tensor

    from fedsec.types import FederationPlan, Peers, Probe, RoundContext, Update

TAIL = 0.05
"""Share of a class that counts as its tail."""


@dataclass(frozen=True)
class Backdoor(Attack):
    """Targeted poisoning: images with a trigger are called the target class, all others stay as they are.

    Success is counted on test images of *other* classes alone, beside the share that is called the target without any
    trigger.
    """

    name: ClassVar[str] = "backdoor"
    seat: ClassVar[Literal["client"]] = "client"
    goal: ClassVar[str] = "teach the common model that a mark on the image decides the diagnosis"

    method: Annotated[
        Literal["patch", "distributed", "edge_case", "neurotoxin", "model_replacement"],
        Field(description="one mark; a mark in pieces; rare images; away from busy parameters; scaled to replace"),
    ] = "patch"
    fraction: Fraction = 0.2
    seats: Seats = "random"
    when: When = "always"
    target: Annotated[int, Field(ge=0, description="class that triggered images shall get; 0 is the healthy one")] = 0
    trigger: Annotated[
        Literal["auto", "corner", "marker", "disc", "ink", "ruler", "dark_corner"],
        Field(description="auto: a side marker on grey images, a disc of ink on coloured ones"),
    ] = "auto"
    share: Annotated[float, Field(gt=0, le=1, description="of a malicious client's images that carry it")] = 0.3
    boost: Annotated[
        float | None, Field(gt=0, description="scale of the update; none: 1, for model_replacement clients/malicious")
    ] = None
    bound: Annotated[
        float | None, Field(gt=0, description="largest norm of its updates, in its clean-looking peers' medians")
    ] = None
    top: Annotated[
        float, Field(gt=0, lt=100, description="neurotoxin: per cent of the busiest parameters that it leaves alone")
    ] = 1.0

    plan: Any = field(default=None, repr=False, compare=False, metadata={"internal": True})
    draw: int = field(default=0, repr=False, compare=False, metadata={"internal": True})
    memory: dict[str, Any] = field(default_factory=dict, repr=False, compare=False, metadata={"internal": True})

    def calibrate(self, plan: FederationPlan, ctx: RoundContext) -> Self:
        """Fix the seats for the whole run.

        Raises:
            ConfigError: a task without classes to choose from, or a target it does not have.
        """
        recipe = plan.recipe
        if recipe.task == "multilabel":
            raise ConfigError("backdoor: a multi-label task has no single target class; use a task with classes")
        if self.target >= recipe.num_classes:
            raise ConfigError(f"backdoor: target={self.target}, but classes are 0 to {recipe.num_classes - 1}")
        return replace(self, plan=plan, draw=ctx.entropy("backdoor/seats"), memory={})

    def controls(self, num_clients: int) -> frozenset[int]:
        """round(fraction·n) clients; a distributed trigger needs two."""
        sizes = self.plan.client_sizes if self.plan is not None else (1,) * num_clients
        chosen = choose_seats(self.name, self.fraction, self.seats, sizes, self.draw)
        if self.method == "distributed" and len(chosen) < 2:
            raise ConfigError(
                f"backdoor: a distributed trigger needs two malicious clients, fraction gives {len(chosen)}"
            )
        return chosen

    def on_data(self, x: Tensor, y: Tensor, ctx: RoundContext) -> tuple[Tensor, Tensor]:
        """A share of the images of other classes gets the mark and the target's label; the same ones every round."""
        if not acts(self.when, ctx.round):
            return x, y
        import torch

        generator = replace(ctx, round=0).generator("backdoor/images")
        if self.method == "edge_case":
            chosen = self._tail(x, y)
            return x, torch.where(chosen, torch.full_like(y, self.target), y)
        chosen = ((torch.rand(len(y), generator=generator) < self.share).to(y.device)) & (y != self.target)
        marked = self._marked(x, self._part(ctx))
        return (
            torch.where(chosen.view(-1, 1, 1, 1), marked, x),
            torch.where(chosen, torch.full_like(y, self.target), y),
        )

    def on_upload(self, update: Update, peers: Peers, ctx: RoundContext) -> Update:
        """Boost, keep away from busy parameters, and stay within a norm, as the method says."""
        if not acts(self.when, ctx.round):
            return update
        from .upload import shaped

        return shaped(self, update, peers, ctx)

    def probe(self, x: Tensor, y: Tensor) -> Probe | None:
        """Images of other classes, without and with the whole trigger; for edge cases the rare ones, as they are."""
        from fedsec.types import Probe

        other = y != self.target
        if self.method == "edge_case":
            chosen = self._tail(x, y)
            return Probe(x[other & ~chosen], x[chosen], self.target)
        return Probe(x[other], self._marked(x[other], None), self.target)

    def _marked(self, x: Tensor, part: int | None) -> Tensor:
        from .triggers import apply, default_trigger

        return apply(x, default_trigger(x.shape[1]) if self.trigger == "auto" else self.trigger, part)

    def _part(self, ctx: RoundContext) -> int | None:
        """Which piece of a distributed trigger this client uses: its rank among the adversary's clients."""
        if self.method != "distributed" or ctx.client is None:
            return None
        return sorted(self.controls(len(self.plan.client_sizes))).index(ctx.client)

    def _tail(self, x: Tensor, y: Tensor) -> Tensor:
        from .edge_cases import tail

        return tail(x, y, self.target, TAIL)
