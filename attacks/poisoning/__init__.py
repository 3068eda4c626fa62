"""Malicious hospitals that spoil the common model. The plugin `poisoning`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from fedsec.attack import Attack

from ..seats import Fraction, Seats, When, acts, choose_seats

if TYPE_CHECKING:
    from torch import Tensor

    from fedsec.types import FederationPlan, Peers, RoundContext, Update

    from .crafted import Known

Method = Literal[
    "min_max",
    "min_sum",
    "alie",
    "ipm",
    "fang",
    "mimic",
    "rule_aware",
    "label_flip",
    "drift",
    "gaussian",
    "sign_flip",
    "scale",
    "zero",
    "size_liar",
    "garbage",
]
OWN_DATA = frozenset({"label_flip", "drift"})
"""Methods that train honestly on spoilt data."""
DEFAULT_FACTORS = {"ipm": 0.5, "sign_flip": 1.0, "scale": 100.0, "gaussian": 1.0, "size_liar": 1e6}


@dataclass(frozen=True)
class Poisoning(Attack):
    """Untargeted poisoning: a share of the clients sends updates that make the common model worse.

    The server is never told how many clients are malicious: rules go by their own `declared_f`.
    """

    name: ClassVar[str] = "poisoning"
    seat: ClassVar[Literal["client"]] = "client"
    goal: ClassVar[str] = "make the common model worse, from the seats of some clients"

    method: Annotated[Method, Field(description="what malicious clients do; rule_aware searches against the rule")] = (
        "min_max"
    )
    fraction: Fraction = 0.2
    seats: Seats = "random"
    knowledge: Annotated[
        Literal["all", "own", "rule"] | Annotated[int, Field(ge=1)],
        Field(description="honest updates it knows: all, none but its own clean ones, all and the rule, or a number"),
    ] = "all"
    when: When = "always"
    factor: Annotated[
        float | None,
        Field(description="strength: epsilon of ipm, z of alie, gamma of scale and sign_flip, sigma of gaussian"),
    ] = None
    direction: Annotated[
        Literal["mean", "std", "sign"], Field(description="of min_max and min_sum: away from the mean, along σ, sign")
    ] = "mean"
    jitter: Annotated[float, Field(ge=0, description="noise on each colluder, in standard deviations")] = 0.0
    norm_match: Annotated[bool, Field(description="shorten or stretch to the median known norm")] = False
    share: Annotated[float, Field(gt=0, le=1, description="of a client's labels that are flipped")] = 1.0
    flip: Annotated[Literal["all", "random"], Field(description="to the next class, or to any other")] = "all"
    objective: Annotated[Literal["deviation", "reverse", "weight"], Field(description="what rule_aware maximises")] = (
        "deviation"
    )
    garbage: Annotated[
        Literal["nan_row", "one_nan", "inf_row", "one_inf", "huge", "shape", "empty", "dtype", "none"],
        Field(description="what garbage sends"),
    ] = "one_nan"

    plan: Any = field(default=None, repr=False, compare=False, metadata={"internal": True})
    draw: int = field(default=0, repr=False, compare=False, metadata={"internal": True})
    memory: dict[str, Any] = field(default_factory=dict, repr=False, compare=False, metadata={"internal": True})

    def calibrate(self, plan: FederationPlan, ctx: RoundContext) -> Self:
        """Fix the seats for the whole run."""
        return replace(self, plan=plan, draw=ctx.entropy("poisoning/seats"), memory={})

    def controls(self, num_clients: int) -> frozenset[int]:
        """round(fraction·n) clients."""
        sizes = self.plan.client_sizes if self.plan is not None else (1,) * num_clients
        return choose_seats(self.name, self.fraction, self.seats, sizes, self.draw)

    @property
    def knows_rule(self) -> bool:
        """The rule-aware search needs it."""
        return self.knowledge == "rule" or self.method == "rule_aware"

    def sees(self, honest: Sequence[int], ctx: RoundContext) -> Collection[int]:
        """As `knowledge` says; a number is a fixed random subset."""
        if self.knowledge in ("all", "rule"):
            return honest
        if self.knowledge == "own":
            return ()
        from dataclasses import replace as change

        order = change(ctx, round=0, client=None).numpy("poisoning/knowledge").permutation(1 + max(honest, default=0))
        return sorted(honest, key=lambda k: int(order[k]))[: int(self.knowledge)]

    def on_data(self, x: Tensor, y: Tensor, ctx: RoundContext) -> tuple[Tensor, Tensor]:
        """Flip labels; the same ones in every round, more and more of them under drift."""
        if self.method not in OWN_DATA or not acts(self.when, ctx.round) or self.plan is None:
            return x, y
        from .flip import flipped

        share = self.share * (ctx.round / ctx.rounds if self.method == "drift" else 1.0)
        generator = replace(ctx, round=0).generator("poisoning/flip")
        return x, flipped(y, self.plan.recipe.num_classes, self.flip, share, generator)

    def on_upload(self, update: Update, peers: Peers, ctx: RoundContext) -> Update:
        """Replace the update by what the method makes up."""
        from .methods import forge

        if self.method in OWN_DATA or not acts(self.when, ctx.round):
            return update
        return forge(self, update, peers, ctx)

    def strength(self) -> float:
        """`factor`, or the method's own default."""
        return DEFAULT_FACTORS[self.method] if self.factor is None else self.factor

    def once_a_round(self, key: str, number: int, make: Any) -> Any:
        """What all colluders share is made up once."""
        if self.memory.get("round") != number:
            kept = {k: v for k, v in self.memory.items() if k.startswith("run/")}
            self.memory.clear()
            self.memory.update(kept, round=number)
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]

    def known(self, peers: Peers, number: int) -> Known:
        """The honest updates it knows or, with knowledge of its own alone, its clients' clean ones."""
        from .crafted import known_from

        rows = [u.delta for u in peers.honest] or [u.delta for u in peers.own]
        known: Known = self.once_a_round("known", number, lambda: known_from(rows))
        return known
